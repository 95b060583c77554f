"""Evaluation: its numbers on any devices, and the names that they have in a run."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import mtp_jax
from mtp_jax import cli
from mtp_jax.data.prompts import some_prompts
from mtp_jax.train.evaluate import evaluate, evaluate_run, expected_of_run, named, store_of
from mtp_jax.train.loggers import read_metrics
from mtp_jax.validate import ConfigError
from support.loop import RANK, WINDOW

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_metrics_have_the_names_that_readers_know(trained):
    losses = {"loss", "loss_first_token", "joint_loss", *(f"loss_offset_{s + 1}" for s in range(WINDOW))}
    gate = {"gate_entropy", "gate_effective", *(f"gate_share_{r + 1}" for r in range(RANK))}
    both = {"kind", "step", "time"} | losses | gate
    records = read_metrics(trained)
    assert {record["kind"] for record in records} == {"train", "eval"}
    for record in records:
        train = {"grad_norm", "learning_rate", "tokens", "tokens_per_second", "goodput"}
        own = train if record["kind"] == "train" else set()
        # There is no MFU on a device whose peak is not known.
        own |= {"compile_seconds"} if (record["kind"], record["step"]) == ("train", 1) else set()
        assert both | own == set(record)
        assert all(math.isfinite(value) for name, value in record.items() if name != "kind")
        assert sum(record[f"gate_share_{r + 1}"] for r in range(RANK)) == pytest.approx(1, abs=1e-5)
        assert 1 <= record["gate_effective"] <= RANK + 1e-5
        assert record["joint_loss"] == pytest.approx(sum(record[f"loss_offset_{s + 1}"] for s in range(WINDOW)))
        assert record["kind"] == "eval" or record["tokens_per_second"] > 0
    first, last = (next(r for r in records if (r["kind"], r["step"]) == ("eval", step)) for step in (4, 8))
    assert last["loss"] < first["loss"]


def test_eight_devices_evaluate_as_one_does(config, trained):
    there = evaluate_run(mtp_jax.load(trained, mesh=config.mesh))
    run = mtp_jax.load(trained)
    here = evaluate_run(run)
    assert there.keys() == here.keys()
    np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-5)
    # And as the training loop did.
    here, then = evaluate_run(run, limit=2), next(r for r in read_metrics(trained)[::-1] if r["kind"] == "eval")
    np.testing.assert_allclose([here[name] for name in here], [then[name] for name in here], rtol=1e-5)


def test_what_drafting_will_count_is_said(trained, capsys):
    """At temperature 0 it is what decoding counts; the texts are the same few for every head on the same trunk."""
    run, k = mtp_jax.load(trained), WINDOW - 1
    prompts = some_prompts(store_of(run), 3, 8)
    assert {len(prompt) for prompt in prompts} == {8}
    (found,) = expected_of_run(run, prompts, 0.0, k, 12)
    out = run.generate_tokens(prompts, max_new_tokens=12, k=k, stop_tokens=run.stop_tokens)
    assert found["tokens_per_forward"] == pytest.approx(out.block_efficiency)
    assert found["acceptance"] == pytest.approx(out.acceptance)
    options = ["--prompts", "3", "--prompt-tokens", "8", "--new-tokens", "12", "--batches", "1"]
    cli.main(["eval", str(trained), "--temperatures", "0", "0.5", *options])
    *said, last = capsys.readouterr().out.strip().splitlines()
    rows = json.loads(last)["expected"]
    assert rows[0] == found and rows[1]["temperature"] == 0.5 and len(rows) == 2
    assert any(line.startswith("0.5 ") and f"{rows[1]['tokens_per_forward']:.3f}" in line for line in said)
    cli.main(["eval", str(trained), "--temperatures", *options])
    assert "expected" not in json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for wrong in (["--k", str(WINDOW)], ["--k", "0"], ["--new-tokens", "1"], ["--temperatures", "-1"]):
        with pytest.raises(SystemExit):
            cli.main(["eval", str(trained), *wrong])
        assert wrong[0].strip("-").rstrip("s").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


def test_it_is_said_for_several_draft_temperatures(trained, capsys):
    """A row each where texts are sampled; each is what a run loaded with it says."""
    options = ["--prompts", "3", "--prompt-tokens", "8", "--new-tokens", "12", "--batches", "1"]
    cli.main(["eval", str(trained), "--temperatures", "0", "0.5", "--draft-temperatures", "1", "0.4", *options])
    *said, last = capsys.readouterr().out.strip().splitlines()
    rows = json.loads(last)["expected"]
    assert [(row["temperature"], row["draft_temperature"]) for row in rows] == [(0.0, 1.0), (0.5, 1.0), (0.5, 0.4)]
    assert rows[1]["overlap"] != rows[2]["overlap"] and any(line.split()[:2] == ["0.5", "0.4"] for line in said)
    run = mtp_jax.load(trained, draft_temperature=0.4)
    assert run.config.head.draft_temperature == run.model.head.config.draft_temperature == 0.4
    assert expected_of_run(run, some_prompts(store_of(run), 3, 8), 0.5, WINDOW - 1, 12) == rows[2:]
    with pytest.raises(ConfigError, match=r"HeadConfig.draft_temperature is -1.0; it must be at least 0"):
        mtp_jax.load(trained, draft_temperature=-1.0)
    for drafts, at, words in (("-1", "0.5", "draft_temperature is -1.0"), ("1", "0", "only where texts are sampled")):
        with pytest.raises(SystemExit):
            cli.main(["eval", str(trained), "--draft-temperatures", drafts, "--temperatures", at])
        assert words in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_texts_do_not_depend_on_how_many_are_looked_at_together(trained, config, monkeypatch):
    run = mtp_jax.load(trained)
    prompts = (some_prompts(store_of(run), 3, 8) * 2)[:5]
    (found,) = expected_of_run(run, prompts, 0.9, WINDOW - 1, 12)
    monkeypatch.setattr("mtp_jax.train.evaluate.ROWS", 2)
    for loaded in (run, mtp_jax.load(trained, mesh=config.mesh)):
        (again,) = expected_of_run(loaded, prompts, 0.9, WINDOW - 1, 12)
        for name, value in found.items():
            assert again[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4)), name


def test_short_documents_have_short_beginnings():
    lengths = np.array([1, 2, 9, 5])

    class Valid:
        """Four documents."""

        def __init__(self):
            self.lengths, self.names = lengths, "abcd"

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return np.arange(lengths[i])

    store = SimpleNamespace(valid=Valid(), masked=False)
    assert [len(ids) for ids in some_prompts(store, 2, 8)] == [4, 4]
    assert [len(ids) for ids in some_prompts(store, 9, 8)] == [1, 1, 1]
    lengths[:] = 1
    assert some_prompts(store, 9, 8) == []


def test_every_target_weighs_the_same_whichever_batch_it_is_in():
    rng = np.random.default_rng(0)
    batches = [
        {"valid_BTW": rng.random((2, 5, WINDOW)) < p, "nll_BTW": rng.random((2, 5, WINDOW))} for p in (0.1, 0.5, 0.9)
    ]

    def loss(params, batch, counts_2W):
        nll_W = (batch["nll_BTW"] * batch["valid_BTW"] / np.asarray(counts_2W[0])).sum((0, 1))
        return nll_W.sum(), {"loss_offset": nll_W, "gate_share": np.array([0.5, 0.5]) / len(batches)}

    found = evaluate(loss, None, batches)
    valid, nll = (np.concatenate([batch[name] for batch in batches]) for name in ("valid_BTW", "nll_BTW"))
    for s in range(WINDOW):
        assert found[f"loss_offset_{s + 1}"] == pytest.approx(nll[..., s][valid[..., s]].mean())
    assert found["loss"] == found["joint_loss"]
    assert found["gate_effective"] == pytest.approx(2)


def test_components_that_are_used_are_counted():
    for shares, effective in (([1, 0, 0], 1), ([0.5, 0.5, 0], 2), ([1 / 3] * 3, 3)):
        assert named({"loss_offset": np.ones(2), "gate_share": shares})["gate_effective"] == pytest.approx(effective)
