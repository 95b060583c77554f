"""A run that a user trained, and ways of calling commands in this process."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtp_jax import cli
from mtp_jax.train import loop
from support import tiny
from support.commands import user
from support.compilation import quick

EXPERIMENT = """
from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = TrainConfig(
    ModelConfig(258, d_model=16, d_ff=32, num_layers=1, num_heads=4, context_length=128, dtype="float32"),
    HeadConfig(window=3, rank=2, factors="full", balance_weight=0.05, init_noise=1.0),
    DataConfig("text", "{root}/corpus/*.txt", batch_size=8, seq_len=16, valid_fraction=0.2, cache_dir="{root}/cache"),
    OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    steps=8,
    eval_every=4,
    eval_batches=2,
    checkpoint_every=4,
    log_every=1,
)
"""


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """The file of a small run, beside its corpus."""
    root = tmp_path_factory.mktemp("cli")
    tiny.text_data(root)
    file = root / "small_cpd.py"
    file.write_text(EXPERIMENT.replace("{root}", str(root)))
    return file


@pytest.fixture
def refused(capsys, monkeypatch):
    """A function that runs a command which must be refused, and gives the message without its frame."""

    def run(*argv, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(arg) for arg in argv])
        output = "".join(capsys.readouterr())
        assert exit.value.code == status, output
        assert "Traceback" not in output
        return " ".join(re.sub("[│╭╮╰╯─]|\x1b\\[[0-9;]*m", " ", output).split())

    monkeypatch.setenv("COLUMNS", "200")
    return run


@pytest.fixture
def nothing_expensive(monkeypatch):
    """Whatever costs time or writes a file fails the test."""

    def fail(*args, **options):
        pytest.fail("this was to be refused before")

    for name in ("prepare_data", "make_trainer", "write_run", "restore"):
        monkeypatch.setattr(loop, name, fail)


@pytest.fixture
def calls(monkeypatch):
    """What `train` was called with, each time: (config, run directory, flags). Nothing is trained."""
    calls = []
    monkeypatch.setattr(loop, "train", lambda config, run_dir, **flags: calls.append((config, run_dir, flags)))
    return calls


@pytest.fixture(scope="session")
def trained(experiment):
    """A run of 8 steps, trained by a user, and what was printed."""
    run_dir = experiment.parent / "runs" / "mine"
    with quick():
        output = user("train", experiment, "--run-dir", run_dir, "--data.seed", "7")
    return SimpleNamespace(dir=run_dir, output=output)


@pytest.fixture(scope="module")
def run(trained, request):
    """The same for the tests of one file, which leave reports and pages in it."""
    run_dir = trained.dir.with_name(request.module.__name__)
    return SimpleNamespace(dir=Path(shutil.copytree(trained.dir, run_dir)), output=trained.output)


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(run.dir, tmp_path / "copy"))
