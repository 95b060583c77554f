"""Sweeps over heads on a base: expected acceptance on its texts, losses of rows, costs of steps from cached states."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from mtp_jax import MeasureConfig, Sweep, load
from mtp_jax.cli import main
from mtp_jax.commands.experiment import load_sweep
from mtp_jax.data.config import SourceConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.rows import pack
from mtp_jax.data.store import Store
from mtp_jax.distill.asks import asks
from mtp_jax.distill.hidden import cache_hidden
from mtp_jax.distill.regenerate import Regenerate, regenerate
from mtp_jax.interop.importing import import_run
from mtp_jax.runs.base import open_base
from mtp_jax.sweep.on_base import base_texts, held_out_row_losses
from mtp_jax.validate import ConfigError
from support import pretrained, tiny
from support.sweeps import go

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
EXPERIMENT = '''"""Which head on a base?"""
from mtp_jax import DataConfig, HeadConfig, MeasureConfig, OptimizerConfig, Sweep, TrainConfig

BASE = TrainConfig(
    head=HeadConfig(window=4, rank=2, factors="lowrank", factor_width=8, target="ntp", shortlist=96),
    data=DataConfig(source="store", files={states!r}, separator="", seq_len=64, batch_size=8, valid_fraction=0.2,
                    cache_dir={cache!r}),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    steps=4, eval_every=4, eval_batches=1, checkpoint_every=1, keep_checkpoints=4, base={base!r},
)
SWEEPS = {{
    "tiny": Sweep(
        BASE,
        cases={{"token": {{"head.encoder": "token"}}, "chain": {{"head.kind": "sequential"}}}},
        reference={{"case": "token"}},
        measure=MeasureConfig(
            suite={suite!r}, held_out_sequences=3, prompts=2, batch_size=2, prompt_tokens=8, new_tokens=24, rounds=2,
            temperatures=(0.7, 0.0), ks=(1,),
        ),
    ),
}}
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The file of a sweep over heads on an imported model, whose hidden states are kept. What it was imported from is
    gone."""
    pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
    pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
    root = tmp_path_factory.mktemp("on_base")
    published = pretrained.write(root / "published", max_position_embeddings=96)[0]
    base = open_base(import_run(str(published), root / "base"))
    shutil.rmtree(published)
    run, asked = load(root / "base"), root / "asks.jsonl"
    asked.write_text("\n".join(json.dumps({"prompt": f"What is {i}?"}) for i in range(40)))
    config = Regenerate(max_new_tokens=16, max_prompt_tokens=48, batch_size=8, valid_fraction=0.2)
    store = regenerate(run, base, list(asks(SourceConfig(str(asked)), root, chat=True)), root / "own", config)
    cache_hidden(run, base, Store.open(store), root / "states", seq_len=64, batch_size=4)
    prompts = [("a", "Who is it?"), ("b", "Why?"), ("a", "Is 1 more than 2?"), ("b", "When, and where?")]
    (root / "suite.jsonl").write_text("\n".join(json.dumps({"category": c, "prompt": p}) for c, p in prompts))
    paths = {"states": root / "states", "cache": root / "cache", "base": root / "base", "suite": root / "suite.jsonl"}
    (root / "heads.py").write_text(EXPERIMENT.format(**{name: str(path) for name, path in paths.items()}))
    return root / "heads.py"


@pytest.fixture(scope="module")
def done(file):
    """The sweep, after it was run."""
    return go(file, "costs", "token", "chain")


@pytest.fixture(scope="module")
def run(done):
    """The mixture of it, loaded."""
    return load(done.place.run("token"))


def test_both_are_trained_on_the_base_and_measured_on_its_texts(done):
    assert [run["state"] for run in done.results["runs"]] == ["done", "done"]
    emitted = set()
    for run in done.results["runs"]:
        assert set(run["readings"]) == {"steps", "flops", "seconds"}
        assert run["measured"].keys() == {str(step) for step in run["readings"].values()}
        for found in run["measured"].values():
            assert [(row["temperature"], row["k"]) for row in found["decoding"]] == [
                (0.7, 3), (0.7, 1), (0.0, 3), (0.0, 1),
            ]  # fmt: skip
            for row in found["decoding"]:
                assert row["expected"] and row["tokens_per_forward"]["mean"] >= 1 and len(row["acceptance"]) == row["k"]
                emitted.add((row["temperature"], tuple(row["documents"]["emitted"])))
    assert len(emitted) == 2  # whatever the head: what is preserved is the base's law


def test_at_temperature_0_what_is_expected_is_what_decoding_counts(done, run, file):
    measure = load_sweep(f"{file}@tiny").sweep.measure
    texts = base_texts(run, measure, 0.0, done.place.directory / "texts" / "0.json")
    for row in texts.expected(run, [3, 1]):
        parts = [
            run.generate_tokens(prompts, k=row["k"], max_new_tokens=24, temperature=0.0) for prompts, *_ in texts.parts
        ]
        for part, (_, written, *_) in zip(parts, texts.parts, strict=True):
            for ours, theirs in zip(part.tokens, written, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        forwards = np.concatenate([part.forwards for part in parts])
        np.testing.assert_allclose(row["documents"]["forwards"], forwards, atol=1e-9)
        assert row["tokens_per_forward"]["mean"] == pytest.approx(sum(row["documents"]["emitted"]) / forwards.sum())
    (kept,) = [one for one in done.results["runs"] if one["name"] == "token"]
    last = kept["measured"][str(kept["readings"]["steps"])]["decoding"]
    assert last[2:] == json.loads(json.dumps(texts.expected(run, [3, 1])))


def test_losses_of_rows_are_those_of_the_windows_that_are_whole(run):
    store = prepare(run.config.data, tokenizer=run.tokenizer, reading=True)
    found = held_out_row_losses(run, store, 3)
    rows, joint, first = pack(store.valid, 64), [], []
    with jax.set_mesh(run.mesh):
        for number in np.arange(3) * len(rows) // 3:
            tokens_1T, pieces_1T, said_1T = rows.read(np.array([number]))
            seen = run.model.see(tokens_1T.astype(np.int32), pieces_1T.astype(np.int32))
            targets_1TW = np.stack([np.roll(tokens_1T, -s, 1) for s in range(1, 5)], axis=-1).astype(np.int32)
            nll_TW = -np.asarray(run.model.head.log_likelihood(seen, targets_1TW))[0]
            law_TV = np.asarray(run.model.target(seen)[0])[0]
            whole = [t for t in range(60) if len(set(pieces_1T[0, t : t + 5])) == 1 and said_1T[0, t + 1 : t + 5].all()]
            joint.append(np.where(np.isfinite(nll_TW[whole]), nll_TW[whole], 0).sum())
            first.append(-law_TV[whole, tokens_1T[0, np.array(whole) + 1]].sum())
            assert whole
    np.testing.assert_allclose(found["documents"]["joint"], joint, rtol=1e-4)
    np.testing.assert_allclose(found["documents"]["first_token"], first, rtol=1e-4)
    assert found["loss"]["joint"]["mean"] == pytest.approx(sum(joint) / sum(found["documents"]["windows"]), rel=1e-4)
    assert 1 <= found["gate"]["effective"] <= 2


def test_a_step_from_cached_states_is_timed_without_the_trunk(done):
    cost = {run["name"]: run["cost"] for run in done.results["runs"]}
    for found in cost.values():
        assert "over_next_token" not in found and found["head_parameters"] > 0
        assert {(row["temperature"], row["k"]) for row in found["decoding"]} == {
            (t, k) for t in (0.7, 0.0) for k in (0, 1, 3)
        }
    assert cost["token"]["flops"] != cost["chain"]["flops"]


def test_what_is_done_is_not_done_again_though_the_base_says_most_of_its_config(done, file):
    out = go(file, "token").out
    assert f"token is done: {done.place.record('token')}" in out
    record = done.place.record("token")
    before = record.read_bytes()
    record.unlink()  # measured anew, and not trained
    trained = (done.place.run("token") / "metrics.jsonl").read_bytes()
    go(file, "token")
    assert (done.place.run("token") / "metrics.jsonl").read_bytes() == trained
    assert json.loads(record.read_text())["measured"] == json.loads(before)["measured"]


def test_the_page_has_both_temperatures_and_what_a_head_weighs(done, file, capsys):
    main(["report", str(file.parent / "results" / "heads-tiny.json"), "--out", str(file.parent / "report")])
    page = (file.parent / "report" / "report.md").read_text()
    for column in (
        "tokens per forward, T = 0.7",
        "tokens/s, T = 0 ",
        "over plain decoding, T = 0 ",
        "head",
        "training",
    ):
        assert f"| {column.strip()} |" in page
    assert "nan" not in page and "None" not in page


def test_texts_of_a_base_want_heads_on_one(file):
    config = load_sweep(f"{file}@tiny").sweep.base
    for changes in ({"base": ""}, {"head": tiny.head_config(window=4, factors="lowrank")}):
        with pytest.raises(ConfigError, match="what is expected on a base's texts is of heads on a base, with target"):
            Sweep(dataclasses.replace(config, **changes), {"seed": (0,)}, measure=MeasureConfig(suite="suite.jsonl"))
    with pytest.raises(ConfigError, match=r"MeasureConfig.ks is \(0, 1\); give numbers of drafts, each at least 1"):
        MeasureConfig(ks=(0, 1))


def test_a_base_that_is_not_there_is_named(file, tmp_path, capsys):
    text = file.read_text().replace(str(file.parent / "base"), str(tmp_path / "nowhere"))
    (tmp_path / "heads.py").write_text(text)
    sys.modules.pop("heads", None)
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", f"{tmp_path / 'heads.py'}@tiny", "--only", "costs", "--dir", str(tmp_path / "runs")])
    assert stopped.value.code == 2 and f"{tmp_path / 'nowhere'} is not a run directory" in capsys.readouterr().err
