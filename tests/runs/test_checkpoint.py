"""Checkpoints: what was saved comes back, bit for bit and anywhere; and a directory says what it is."""

import contextlib
import dataclasses
import functools
import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import mtp_jax
from mtp_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mtp_jax.data.placement import place
from mtp_jax.data.preparation import prepare
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.parameters import row
from mtp_jax.runs import layout as run_dir_module
from mtp_jax.runs.checkpoints import CheckpointError, Checkpoints
from mtp_jax.runs.layout import read_config, versions, write_config
from mtp_jax.runs.manifest import seal
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.state import TrainState, split
from mtp_jax.train import loop
from mtp_jax.train.evaluate import evaluate_run
from mtp_jax.train.loggers import read_metrics
from mtp_jax.validate import ConfigError, from_dict
from support import REPOSITORY, tiny
from support.states import on_disk

VOCAB = 258
MESHES = {"adamw": MeshConfig(2, 2, 2), "muon": MeshConfig()}


# What is compared here is one program with itself; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Trained:
    path: Path
    config: TrainConfig
    states: dict[int, Any]
    """What was handed to be saved, as it was in memory, by step."""


def fit(config, path, **options):
    """Train, and return the states that were saved."""
    states, save = {}, CheckpointWriter.save

    def record(self, state, *rest):
        states[int(state.step)] = jax.device_get(state)
        return save(self, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", record)
        loop.train(config, path, **options)
    return states


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A run of 8 steps on 8 devices, saved at step 4 and at step 8, by the name of its optimizer."""
    root = tmp_path_factory.mktemp("runs")
    data = tiny.text_data(root)

    @functools.cache
    def train(name):
        config = tiny.text_run(
            data,
            optimizer=OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=2),
            mesh=MESHES[name],
            ema_decay=0.75 if name == "muon" else 0,
        )
        return Trained(root / name, config, fit(config, root / name))

    return train


@pytest.fixture(scope="module")
def trained(train):
    return train("adamw")


@pytest.fixture(scope="module")
def loaded(trained):
    return mtp_jax.load(trained.path)


def assert_equal(tree, expected):
    """Bit for bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


def numbers(run_dir):
    """Every number of metrics.jsonl that does not depend on the clock."""
    clock = ("time", "tokens_per_second", "compile_seconds", "goodput")
    return [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(run_dir)]


# Resuming


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=pytest.mark.slow if name == "muon" else ()) for name in MESHES]
)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(train, optimizer, tmp_path, caplog):
    straight = train(optimizer)
    assert on_disk(straight.path) == ["4", "8"]
    run_dir = tmp_path / "run"
    shutil.copytree(straight.path, run_dir)
    # As if it had been killed between step 4 and step 8.
    shutil.rmtree(run_dir / "checkpoints" / "8")
    with jax.log_compiles():
        states = fit(straight.config, run_dir, resume=True)

    assert list(states) == [8]
    assert_equal(states[8], straight.states[8])
    assert numbers(run_dir) == numbers(straight.path)
    train_steps = [record["step"] for record in numbers(run_dir) if record["kind"] == "train"]
    assert train_steps == list(range(1, 9))
    assert on_disk(run_dir) == ["4", "8"]
    compiled = [r for r in caplog.records if r.getMessage().startswith("Compiling jit(train_step)")]
    assert len(compiled) == 1, "a restored state is placed as a trained one"


def test_the_run_learned_something(trained):
    """Else its states could be equal for no good reason."""
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained.states[4].params, trained.states[8].params)
    assert min(jax.tree.leaves(moved)) > 1e-4


# Loading


@pytest.mark.parametrize("mesh", [None, MeshConfig(1, 4, 2)])
def test_what_eight_devices_saved_loads_on_any_mesh(trained, loaded, mesh):
    run = loaded if mesh is None else mtp_jax.load(str(trained.path), mesh=mesh)
    _, params = split(run.model)
    assert_equal(jax.device_get(params), trained.states[8].params)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {1 if mesh is None else 8}
    assert params["embed_VD"].sharding.spec == row("embed_VD").spec
    assert dict(run.mesh.shape) == ({"data": 1, "fsdp": 1, "tensor": 1} if mesh is None else vars(mesh))


def test_the_log_likelihood_is_that_of_the_mesh_it_was_trained_on(trained, loaded):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, 16 + 3)).astype(np.int32)
    ahead = np.arange(16)[:, None] + np.arange(1, 4)[None]

    def log_likelihood(run):
        with jax.set_mesh(run.mesh):
            batch = place({"tokens": tokens[:, :16], "targets": tokens[:, ahead]}, run.mesh)
            compute = jax.jit(
                lambda model, batch: model.head.log_likelihood(model.see(batch["tokens"]), batch["targets"])
            )
            return np.asarray(compute(run.model, batch))

    there = log_likelihood(mtp_jax.load(trained.path, mesh=trained.config.mesh))
    assert there.shape == (8, 16, 3) and np.ptp(there) > 0.1
    np.testing.assert_allclose(log_likelihood(loaded), there, rtol=0, atol=1e-5)


def test_a_loaded_run_has_all_that_it_takes(trained, loaded):
    assert loaded.config == trained.config.with_tokenizer(257) and loaded.step == 8
    assert loaded.tokenizer.to_json() == {"name": "bytes"}
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hello")) == "hello"
    assert isinstance(loaded.model, mtp_jax.LanguageModel)


def test_an_earlier_step_can_be_loaded(trained):
    run = mtp_jax.load(trained.path, step=4)
    assert run.step == run.meta["step"] == 4
    assert_equal(jax.device_get(split(run.model)[1]), trained.states[4].params)


def test_the_best_step_can_be_loaded(trained):
    with Checkpoints(trained.path) as checkpoints:
        losses = {step: checkpoints.meta(step)["metrics"]["loss"] for step in (4, 8)}
    assert losses[4] != losses[8] and mtp_jax.load(trained.path, "best").step == min(losses, key=losses.get)


def test_the_averaged_weights_can_be_loaded(train):
    averaged = train("muon")
    run = mtp_jax.load(averaged.path, weights="ema")
    assert_equal(jax.device_get(split(run.model)[1]), averaged.states[8].ema)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), averaged.states[8].ema, averaged.states[8].params)
    assert min(jax.tree.leaves(apart)) > 1e-5
    assert run.meta["metrics"]["ema_loss"] == pytest.approx(evaluate_run(run, 2)["loss"], abs=1e-4)
    assert abs(run.meta["metrics"]["ema_loss"] - run.meta["metrics"]["loss"]) > 1e-3


def test_averaged_weights_that_were_not_kept_are_refused(trained):
    with pytest.raises(CheckpointError, match=re.escape(f"{trained.path} has no ema in step 8: the run kept no aver")):
        mtp_jax.load(trained.path, weights="ema")


def test_a_run_in_the_home_directory_loads(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(trained.path.parent))
    assert mtp_jax.load(f"~/{trained.path.name}").step == 8


def test_a_loaded_run_generates(loaded):
    options = dict(max_new_tokens=12, temperature=0.9)
    text = loaded.generate("The 1st", seed=1, **options)
    assert isinstance(text, str) and text
    assert loaded.generate("The 1st", seed=1, **options) == text
    assert loaded.generate("The 1st", seed=2, **options) != text
    assert loaded.generate(["The 1st"], seed=1, **options) == [text]
    stop = next(c for c in text if c != "\ufffd")
    assert loaded.generate("The 1st", seed=1, stop=stop, **options) == text[: text.index(stop)]
    tokens = loaded.generate_tokens([loaded.tokenizer.encode("The 1st")], seed=1, **options).tokens[0]
    assert loaded.tokenizer.decode(tokens) == text and 1 <= len(tokens) <= 12


def test_generation_stops_at_the_end_of_a_document(loaded, monkeypatch):
    """Here the end is a token that the model is known to choose."""
    prompt, options = loaded.tokenizer.encode("The 1st"), dict(max_new_tokens=12, temperature=0.9, seed=1)
    tokens = loaded.generate_tokens([prompt], stop_tokens=(VOCAB - 1,), **options).tokens[0]
    monkeypatch.setattr(ByteTokenizer, "end_of_document", int(tokens[3]))
    first = list(tokens).index(tokens[3])
    assert list(loaded.generate_tokens([prompt], **options).tokens[0]) == list(tokens[: first + 1])


# What cannot be loaded says why


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=re.escape(f"{path} is not a run directory: it has no config.json")):
            mtp_jax.load(path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoints_is_refused(tmp_path, trained):
    write_config(tmp_path, trained.config)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} holds no complete checkpoint: the run ended")):
        mtp_jax.load(tmp_path)


def test_a_step_that_does_not_exist_is_answered_with_those_that_do(trained):
    with pytest.raises(CheckpointError, match=re.escape(f"{trained.path} has no step 5; it has [4, 8].")):
        mtp_jax.load(trained.path, step=5)


def test_another_tokenizer_is_refused(trained, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "to_json", lambda self: {"name": "bytes", "version": 2})
    with pytest.raises(ConfigError, match=r"trained with the tokenizer {'name': 'bytes'} and 'bytes' is now {.*2}"):
        mtp_jax.load(trained.path)


def test_a_mesh_that_does_not_fit_is_refused(trained):
    with pytest.raises(ConfigError, match=r"needs 4 devices and there are 8"):
        mtp_jax.load(trained.path, mesh=MeshConfig(2, 2, 1))


# Saving


def make_state(step, value=None):
    w = jnp.full(3, step if value is None else value, jnp.float32)
    return TrainState(jnp.asarray(step, jnp.int32), {"w": w}, {"m": 2 * w})


def test_the_newest_checkpoints_are_kept(tmp_path):
    config = tiny.train_config()
    with CheckpointWriter(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 5, 7):
            assert checkpoints.save(make_state(step), config, {}, "") == step
        checkpoints.wait()
        assert checkpoints.latest_step() == 7
        for step in (5, 7):
            assert_equal(checkpoints.restore(make_state(0), step), make_state(step))
        assert_equal(checkpoints.restore(make_state(0)), make_state(7))
        assert_equal(checkpoints.restore_params(make_state(0).params, 5), make_state(5).params)
    assert on_disk(tmp_path) == ["5", "7"]


def test_a_step_is_saved_once_and_never_behind_a_later_one(tmp_path):
    config = tiny.train_config()
    with CheckpointWriter(tmp_path, keep=3) as checkpoints:
        checkpoints.save(make_state(4), config, {}, "")
        assert checkpoints.save(make_state(4, value=9), config, {}, "") == 4
        with pytest.raises(CheckpointError, match=r"Step 2 was not saved in .*: it holds steps \[4\]"):
            checkpoints.save(make_state(2), config, {}, "")
        checkpoints.wait()
        assert_equal(checkpoints.restore(make_state(0)), make_state(4))


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    begun, release, writing = threading.Event(), threading.Event(), ocp.JsonCheckpointHandler.async_save

    class Slow(ocp.future.Future):
        """A write that goes on when the test says so."""

        def __init__(self, write):
            self.write = write

        def result(self, timeout=None):
            begun.set()
            assert release.wait(10), "the save was waited for"
            return self.write.result(timeout)

    async def slow(*args, **options):
        return [Slow(write) for write in await writing(*args, **options)]

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", slow)
    with CheckpointWriter(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(4), tiny.train_config(), {}, "")
        assert begun.wait(10) and "4" not in on_disk(tmp_path)
        # What a kill would leave at this instant.
        with Checkpoints(tmp_path) as reader:
            assert reader.latest_step() is None
        release.set()
        checkpoints.wait()
        assert on_disk(tmp_path) == ["4"]
        assert_equal(checkpoints.restore(make_state(0)), make_state(4))


def test_a_checkpoint_that_was_not_finished_is_not_seen_and_is_replaced(tmp_path):
    config = tiny.train_config()
    with CheckpointWriter(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(4), config, {}, "")
    # What a kill leaves behind while step 8 is written.
    shutil.copytree(tmp_path / "checkpoints/4", tmp_path / "checkpoints/8.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert on_disk(tmp_path) == ["4", "8.orbax-checkpoint-tmp"], "who only reads deletes nothing"
    with CheckpointWriter(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 4
        checkpoints.save(make_state(8), config, {}, "")
        assert_equal(checkpoints.restore(make_state(0)), make_state(8))
    assert on_disk(tmp_path) == ["4", "8"]


def test_a_checkpoint_says_what_it_is(trained):
    with Checkpoints(trained.path) as checkpoints:
        latest, earlier = checkpoints.meta(), checkpoints.meta(4)
    for step, meta in ((8, latest), (4, earlier)):
        assert set(meta) == {"step", "config", "tokenizer", "data_sha256", "versions", "metrics"}
        assert meta["step"] == step
        assert from_dict(TrainConfig, meta["config"]) == trained.config.with_tokenizer(257)
        assert meta["tokenizer"] == {"name": "bytes"}
        assert meta["data_sha256"] == prepare(trained.config.data).sha256
        assert {"mtp_jax", "python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(
            meta["versions"]
        )
        evaluation = next(r for r in numbers(trained.path) if (r["kind"], r["step"]) == ("eval", step))
        assert {"kind": "eval", "step": step, **meta["metrics"]} == evaluation
    assert latest["versions"] == versions() and versions()["jax"] == jax.__version__


def test_a_run_directory_says_what_it_is(trained):
    assert read_config(trained.path) == trained.config.with_tokenizer(257)
    assert json.loads((trained.path / "config.json").read_text())["model"]["d_model"] == 16
    assert json.loads((trained.path / "versions.json").read_text()) == versions()
    assert {path.name for path in trained.path.iterdir()} == {
        *("config.json", "versions.json", "metrics.jsonl", "checkpoints", "tensorboard")
    }


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is no checkout")
def test_the_commit_is_that_of_this_checkout():
    def git(*args):
        return subprocess.run(["git", *args], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()

    commit, dirty, _ = versions()["commit"].partition("-dirty")
    assert len(commit) >= 12 and git("rev-parse", "HEAD").startswith(commit)
    assert bool(dirty) == bool(git("status", "--porcelain", "--untracked-files=no"))


def test_a_package_that_lies_in_somebody_elses_repository_has_no_commit(tmp_path, monkeypatch):
    """A virtual environment inside a project: its commit says nothing about this code."""

    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false", *args],
            cwd=tmp_path,
            check=True,
        )

    installed = tmp_path / "site-packages" / "mtp_jax" / "run_dir.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    (tmp_path / "theirs.py").write_text("")
    monkeypatch.setattr(run_dir_module, "__file__", str(installed))
    assert "commit" not in versions(), "there is no repository"
    git("init", "--quiet")
    git("add", "theirs.py")
    git("commit", "--quiet", "-m", "theirs")
    assert "commit" not in versions()
    git("add", "site-packages")
    git("commit", "--quiet", "-m", "vendored")
    assert re.fullmatch("[0-9a-f]{12}", versions()["commit"])
    installed.write_text("changed")
    assert re.fullmatch("[0-9a-f]{12}-dirty", versions()["commit"])
    monkeypatch.setenv("PATH", "")
    assert "commit" not in versions(), "there is no git"


@pytest.mark.parametrize("text", ["{}", "[]", "{", "null", '{"steps": 3}', "[" * 100_000])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'config.json'}")):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [("steps", "__import__('os')"), ("steps", None), ("steps", {"a": 1}), ("model", []), ("head", {"rank": "4"})],
)
def test_a_config_with_odd_values_is_refused_by_name(trained, tmp_path, field, value):
    values = {**json.loads((trained.path / "config.json").read_text()), field: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match=re.escape(f"{tmp_path / 'config.json'} does not fit this version of mtp_jax")
    ):
        read_config(tmp_path)


def test_a_strangers_metadata_names_nothing_that_is_imported(trained, tmp_path, monkeypatch):
    """Sealed anew, so that the hashes agree with it."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained.path, run_dir)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Handler: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = run_dir / "checkpoints/8/_CHECKPOINT_METADATA"
    path.write_text(json.dumps({"item_handlers": {name: "evil.Handler" for name in ("params", "opt_state", "meta")}}))
    path = run_dir / "checkpoints/8/params/_METADATA"
    path.write_text(path.read_text().replace("jax.Array", "evil.Handler"))
    assert "evil" in path.read_text()
    seal(epath.Path(run_dir / "checkpoints/8"))
    with contextlib.suppress(Exception):
        mtp_jax.load(run_dir)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_nothing_is_a_pickle(trained, monkeypatch):
    files = [path for path in trained.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert path.suffix not in {".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".joblib", ".msgpack"}, path
        begin = path.read_bytes()[:2]
        assert not (begin[:1] == b"\x80" and 0 < begin[-1] <= pickle.HIGHEST_PROTOCOL), path

    def refuse(*args, **options):
        raise AssertionError("a checkpoint was unpickled: it could run any code")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(np, "load", refuse)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), trained.states[8])
    with Checkpoints(trained.path) as checkpoints:
        assert_equal(jax.device_get(checkpoints.restore(target)), trained.states[8])
        assert checkpoints.meta()["step"] == 8
