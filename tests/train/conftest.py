"""A run that is real, and one whose steps take no time."""

import dataclasses

import pytest

from mtp_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mtp_jax.train import loop
from support import tiny
from support.compilation import quick
from support.loop import FakeTrainer


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A run of 8 steps, saved and evaluated every 4."""
    root = tmp_path_factory.mktemp("data")
    return tiny.text_run(tiny.text_data(root), mesh=MeshConfig(2, 2, 2))


@pytest.fixture
def fake(monkeypatch):
    """A function that makes a `FakeTrainer` and lets the loop have it."""

    def make(**options):
        trainer = FakeTrainer(**options)
        monkeypatch.setattr(loop, "make_trainer", lambda config, **_: trainer)
        return trainer

    return make


@pytest.fixture(scope="session")
def trained(config, tmp_path_factory):
    """A run that is real. Who changes it takes a copy."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    with quick():
        loop.train(config, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run to train heads on, and the data that they read."""
    root = tmp_path_factory.mktemp("base")
    data = dataclasses.replace(tiny.text_data(root), seq_len=32)
    head = tiny.head_config(circuit="independent", rank=1, window=1, balance="none", target="ntp", factors="shared")
    model = tiny.model_config(vocab_size=264)
    config = TrainConfig(model, head, data, OptimizerConfig(warmup_steps=0), steps=4, eval_batches=1)
    with quick():
        loop.train(config, root / "run")
    return root / "run", data


@pytest.fixture(scope="session")
def head_run(base, tmp_path_factory):
    """A run whose head is on that base."""
    run_dir = tmp_path_factory.mktemp("head") / "run"
    with quick():
        loop.train(tiny.head_on(base, keep_checkpoints=5), run_dir)
    return run_dir
