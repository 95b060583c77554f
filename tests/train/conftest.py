"""A run that is real, and one whose steps take no time."""

import pytest

from mtp_jax.config import MeshConfig
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
