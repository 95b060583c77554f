"""Hidden states that are kept: training from them is training with the trunk, and never reads it."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.config import OptimizerConfig, TrainConfig
from mtp_jax.data.batches import batches
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.distill import hidden
from mtp_jax.distill.hidden import cache_hidden
from mtp_jax.model.config import ModelConfig
from mtp_jax.runs.base import open_base
from mtp_jax.runs.lock import one_maker
from mtp_jax.train import loop
from mtp_jax.train.checks import check_cache
from mtp_jax.train.loggers import read_metrics
from mtp_jax.train.loop import train
from mtp_jax.validate import BusyError, ConfigError
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")
T = 32


@dataclasses.dataclass
class Setting:
    """A base, a store, and states of the one over the other in float32."""

    root: object
    base: str
    store: Store
    cached: str
    data: object = None

    def cache(self, out, **options):
        run = mtp_jax.load(self.base)
        return cache_hidden(run, open_base(self.base), self.store, out, **{"seq_len": T, "batch_size": 3, **options})

    def config(self, source, **changes):
        data = dataclasses.replace(self.data, source="store", files=str(source), separator="", seq_len=T, batch_size=8)
        head = tiny.head_config(target="ntp", encoder="token", factors="lowrank", rank=2)
        values = dict(steps=3, log_every=1, eval_every=1, eval_batches=2, base=self.base, model=ModelConfig())
        return TrainConfig(head=head, data=data, optimizer=OptimizerConfig(warmup_steps=0), **{**values, **changes})


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("hidden")
    data = dataclasses.replace(tiny.text_data(root), seq_len=T)
    model = tiny.model_config(vocab_size=264)
    head = tiny.head_config(circuit="independent", rank=1, window=1, balance="none", target="ntp", factors="shared")
    train(TrainConfig(model, head, data, OptimizerConfig(warmup_steps=0), steps=4, eval_batches=1), root / "base")
    found = Setting(root, str(root / "base"), prepare(data), str(root / "cached"))
    found.data = data
    found.cache(found.cached)
    return found


def losses(run):
    return [(row["kind"], row["step"], row["loss"]) for row in read_metrics(run)]


def test_training_from_the_cache_is_training_with_the_trunk(setting, tmp_path, monkeypatch):
    states = []
    original = loop.TrainRun.fit
    monkeypatch.setattr(
        loop.TrainRun,
        "fit",
        lambda run, state, batch, data, **options: (
            states.append((state.base, batch)),
            original(run, state, batch, data, **options),
        )[1],
    )
    found = {}
    half = setting.cache(tmp_path / "half", dtype="bfloat16")
    for name, source in (("trunk", setting.store.path), ("cache", setting.cached), ("half", half)):
        train(setting.config(source), tmp_path / name)
        found[name] = losses(tmp_path / name)
    assert [row[:2] for row in found["trunk"]] == [row[:2] for row in found["cache"]]
    values = {name: np.array([row[2] for row in rows]) for name, rows in found.items()}
    np.testing.assert_allclose(values["cache"], values["trunk"], atol=1e-6)
    np.testing.assert_allclose(values["half"], values["trunk"], atol=1e-3)
    assert (values["half"] != values["trunk"]).any()
    assert ["trunk" in base for base, _ in states] == [True, False, False]
    for name in states[0][1]:
        np.testing.assert_array_equal(states[0][1][name], states[1][1][name])
    run = mtp_jax.load(tmp_path / "cache")
    assert run.generate("The", max_new_tokens=4)


def test_losses_against_the_law_take_its_normaliser_from_the_cache(setting, tmp_path):
    """Training is that with the trunk, and with the states alone, as older caches have them."""
    cached = setting.cache(tmp_path / "cooler", temperature=0.7)
    older = tmp_path / "older"
    shutil.copytree(cached, older)
    manifest = json.loads((older / "manifest.json").read_text())
    assert manifest["hidden"].pop("temperature") == 0.7
    (older / "manifest.json").write_text(json.dumps(manifest))
    store, found = Store.open(cached), {}
    model = mtp_jax.load(setting.base).model
    table_VD = np.asarray(model.unembed_VD[...])[: model.config.known]
    row = next(batches(store.train, seq_len=T, window=4, batch_size=2, seed=0, rows=True, normalised=True))
    logits_BTV = row["x_BTD"].astype(np.float64) @ table_VD.T / 0.7
    np.testing.assert_allclose(row["normaliser_BT"], np.log(np.exp(logits_BTV).sum(-1)), atol=1e-5)
    for split in (store.train, store.valid):
        logits_NTV = np.asarray(split.hidden, np.float64) @ table_VD.T / 0.7
        np.testing.assert_allclose(split.normaliser, np.log(np.exp(logits_NTV).sum(-1)), atol=1e-5)
    assert Store.open(older).train.normaliser is None
    head = tiny.head_config(
        target="ntp", encoder="token", factors="lowrank", shortlist=64, lk_weight=1.0, kl_weight=0.5, temperature=0.7
    )
    half = setting.cache(tmp_path / "half", temperature=0.7, dtype="bfloat16")
    for name, source in (("trunk", setting.store.path), ("cache", cached), ("older", older)):
        train(dataclasses.replace(setting.config(source), head=head), tmp_path / name)
        found[name] = np.array([row[2] for row in losses(tmp_path / name)])
    np.testing.assert_allclose(found["cache"], found["trunk"], atol=1e-5)
    np.testing.assert_allclose(found["older"], found["trunk"], atol=1e-5)
    half = Store.open(half).train
    logits_NTV = np.asarray(half.hidden, np.float64) @ table_VD.T / 0.7
    np.testing.assert_allclose(half.normaliser, np.log(np.exp(logits_NTV).sum(-1)), atol=1e-5)


def sampled_at(setting, path, temperature):
    """The store as if a model had written it."""
    shutil.copytree(setting.store.path, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sampled"] = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return dataclasses.replace(setting, store=Store.open(path))


def test_the_law_is_that_of_the_texts_or_of_who_asks(setting, tmp_path):
    kept = {}
    for there, asked in ((None, None), (None, 0.5), (0.8, None), (0.8, 0.8), (0.0, None)):
        name = f"{there}-{asked}"
        own = setting if there is None else sampled_at(setting, tmp_path / name, there)
        kept[there, asked] = Store.open(own.cache(tmp_path / f"states-{name}", temperature=asked)).law_temperature
    assert kept == {(None, None): 1.0, (None, 0.5): 0.5, (0.8, None): 0.8, (0.8, 0.8): 0.8, (0.0, None): 1.0}
    with pytest.raises(ConfigError, match=r"temperature is 0\.0; it must be above 0"):
        setting.cache(tmp_path / "greedy", temperature=0.0)
    with pytest.raises(ConfigError, match=r"temperature is 0\.5 and the texts in .* were sampled at 0\.8"):
        sampled_at(setting, tmp_path / "again", 0.8).cache(tmp_path / "x", temperature=0.5)


def test_a_head_reads_the_normaliser_of_the_law_that_it_learns(setting, tmp_path, capsys, monkeypatch):
    """Which is at its texts' temperature. One of another law is not read, nor by a head that is compared with none."""
    batches, fit = {}, loop.TrainRun.fit
    monkeypatch.setattr(
        loop.TrainRun,
        "fit",
        lambda run, state, batch, data, **o: (batches.update(last=batch), fit(run, state, batch, data, **o))[1],
    )
    own = sampled_at(setting, tmp_path / "own", 0.8)
    cached = {"own": own.cache(tmp_path / "states"), "other": setting.cached}
    head = tiny.head_config(target="ntp", encoder="token", factors="lowrank", shortlist=64, tv_weight=1.0)
    for name, source, changes, said in (
        ("read", "own", {}, "with the law's normaliser"),
        ("cooler", "other", {"temperature": 0.5}, "without the law's normaliser"),
        ("text", "own", {"tv_weight": 0.0}, None),
    ):
        config = dataclasses.replace(setting.config(cached[source], steps=1), head=dataclasses.replace(head, **changes))
        train(config, tmp_path / name)
        found = re.search(r"with(out)? the law's normaliser", capsys.readouterr().out)
        assert (found and found[0]) == said
        assert ("normaliser_BT" in batches["last"]) == (name == "read")
    assert batches["last"]["x_BTD"].shape[:2] == (8, T)


@pytest.mark.slow
def test_a_head_that_taps_inner_layers_has_them_from_the_cache(setting, tmp_path):
    taps, found = (2, 1), {}
    cached = setting.cache(tmp_path / "tapped", taps=taps)
    head = tiny.head_config(target="ntp", encoder="block", taps=taps, factors="lowrank", rank=2)
    for name, source in (("trunk", setting.store.path), ("cache", cached)):
        train(dataclasses.replace(setting.config(source), head=head), tmp_path / name)
        found[name] = np.array([row[2] for row in losses(tmp_path / name)])
    np.testing.assert_allclose(found["cache"], found["trunk"], atol=1e-6)
    assert mtp_jax.load(tmp_path / "cache").generate("The", max_new_tokens=4)


def test_a_cache_without_the_layers_that_a_head_taps_is_refused(setting, tmp_path):
    head = tiny.head_config(target="ntp", encoder="block", taps=(1,), factors="lowrank")
    with pytest.raises(ConfigError, match=r"made with taps \[\], and the head's taps is \[1\]"):
        train(dataclasses.replace(setting.config(setting.cached), head=head), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"taps has \[3\] and the base has the layers 1\.\.2; give some of those"):
        setting.cache(tmp_path / "deep", taps=(1, 3))


def test_a_run_says_what_it_reads(setting, tmp_path, capsys):
    train(setting.config(setting.cached, steps=1), tmp_path / "run")
    assert f"reads hidden states of {setting.base} from {setting.cached}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--resume: data\.files is"):
        train(setting.config(setting.store.path, steps=2), tmp_path / "run", resume=True)


def test_states_of_another_base_or_kind_are_refused(setting, tmp_path):
    other = tmp_path / "other"
    config = TrainConfig(
        tiny.model_config(vocab_size=264), tiny.head_config(target="ntp"), setting.data, steps=1, eval_batches=1,
        optimizer=OptimizerConfig(warmup_steps=0),
    )  # fmt: skip
    train(config, other)
    with pytest.raises(ConfigError, match=r"are of a base with sha256 \w{12} \(.*base\), and .*other has"):
        train(setting.config(setting.cached, base=str(other)), tmp_path / "run")
    whole = tiny.model_config(vocab_size=264)
    with pytest.raises(ConfigError, match=f"this run has none. Give --base {re.escape(setting.base)}"):
        train(setting.config(setting.cached, base="", model=whole), tmp_path / "run")
    base, narrow = open_base(setting.base), dataclasses.replace(whole, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"computed_in 'float32', and model\.dtype is 'bfloat16'"):
        check_cache(setting.config(setting.cached, model=narrow), Store.open(setting.cached), base)
    short = dataclasses.replace(setting.config(setting.cached).data, seq_len=16)
    with pytest.raises(ConfigError, match=r"made with seq_len 32, and data\.seq_len is 16"):
        train(dataclasses.replace(setting.config(setting.cached), data=short), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_an_interruption_leaves_is_continued(setting, tmp_path, monkeypatch):
    made, original = [], hidden._states

    def killed(run, rows, first, *rest):
        made.append(first)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(run, rows, first, *rest)

    monkeypatch.setattr(hidden, "_states", killed)
    with pytest.raises(KeyboardInterrupt):
        setting.cache(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = []
    setting.cache(tmp_path / "out", log=lines.append)
    again = made[2:]  # the third batch came twice, and the first ones once
    assert made[:3] == [0, 3, 6] and again[0] == again[0] == 6 and 0 not in again[: again.index(0)]
    assert re.fullmatch(r"\d+ rows of 32 x 16 in float32: 0\.\d{3} GB", lines[0])
    states = [f"{split}.{kind}.bin" for split in ("train", "valid") for kind in ("hidden", "normaliser")]
    files = *states, "manifest.json", "train.tokens.bin"
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (Store.open(setting.cached).path / file).read_bytes(), file


def test_what_cannot_be_cached_is_refused(setting, tmp_path):
    with pytest.raises(ConfigError, match="cached exists; give another --out"):
        setting.cache(setting.cached)
    with pytest.raises(ConfigError, match="seq_len is 500 and the base's context_length is 128"):
        setting.cache(tmp_path / "long", seq_len=500)
    with pytest.raises(ConfigError, match="is a cache of hidden states itself"):
        cache_hidden(
            mtp_jax.load(setting.base), open_base(setting.base), Store.open(setting.cached), tmp_path / "x", seq_len=T
        )
    foreign = tmp_path / "foreign"
    shutil.copytree(setting.store.path, foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    (foreign / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": {"name": "hf"}}))
    with pytest.raises(ConfigError, match=r"was made with the tokenizer \{'name': 'hf'\}.*--base"):
        cache_hidden(
            mtp_jax.load(setting.base), open_base(setting.base), Store.open(foreign), tmp_path / "x", seq_len=T
        )
    run = mtp_jax.load(setting.base)
    with jax.set_mesh(run.mesh):
        run.model.trunk.norm.scale[...] = jax.numpy.full(16, 1e30)
    with pytest.raises(ConfigError, match="Row 0 of the train split has states that are not finite in float16"):
        cache_hidden(run, open_base(setting.base), setting.store, tmp_path / "x", seq_len=T, dtype="float16")


def test_a_second_start_is_refused_while_the_first_one_lives(setting, tmp_path):
    with one_maker(tmp_path / "states"), pytest.raises(BusyError, match=r"Another command makes .*states: it holds"):
        setting.cache(tmp_path / "states")


def test_devices_share_the_rows(setting, tmp_path):
    run = mtp_jax.load(setting.base, mesh=mtp_jax.MeshConfig(2, 2, 2))
    cache_hidden(run, open_base(setting.base), setting.store, tmp_path / "out", seq_len=T, batch_size=3)
    ours, theirs = (Store.open(path).train.hidden for path in (tmp_path / "out", setting.cached))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    ours, theirs = (Store.open(path).train.normaliser for path in (tmp_path / "out", setting.cached))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_mixture_has_a_normaliser_where_all_have_that_of_one_law(setting, tmp_path):
    other = setting.cache(tmp_path / "other", temperature=0.5)
    assert Mixture.open(f"1:{setting.cached},1:{setting.cached}").law_temperature == 1.0
    mixed = Mixture.open(f"1:{setting.cached},1:{other}")
    assert mixed.law_temperature is None and mixed.hidden["seq_len"] == T
    for normalised in (False, True):
        row = next(batches(mixed.train, seq_len=T, window=4, batch_size=2, seed=0, rows=True, normalised=normalised))
        assert ("normaliser_BT" in row) == normalised and "x_BTD" in row


def test_caches_of_one_base_are_mixed_wherever_it_lay(setting, tmp_path):
    for name, changes in (("moved", {"path": "elsewhere"}), ("other", {"sha256": "0"})):
        shutil.copytree(setting.cached, tmp_path / name)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        manifest["hidden"]["base"] |= changes
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    states = Store.open(setting.cached).hidden
    assert Mixture.open(f"1:{setting.cached},1:{tmp_path / 'moved'}").hidden == states
    with pytest.raises(ConfigError, match="are mixed, and their hidden states differ in kind"):
        _ = Mixture.open(f"1:{setting.cached},1:{tmp_path / 'other'}").hidden
