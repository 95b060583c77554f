"""What `pip install` of the wheel gives, in an environment that has nothing else."""

import os
import shutil
import subprocess
import sys

import pytest

from support import REPOSITORY

EXPERIMENT = """
from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(d_model=16, d_ff=32, num_layers=1, num_heads=2, num_kv_heads=1, context_length=64),
    head=HeadConfig(window=2, rank=2),
    data=DataConfig(source="stdlib", seq_len=32, batch_size=2),
    optimizer=OptimizerConfig(warmup_steps=0),
    steps=1,
    eval_every=1,
    eval_batches=1,
)
"""


@pytest.mark.slow
def test_the_wheel_alone_helps_imports_and_trains_a_step(tmp_path):
    """Needs the network, as every installation does."""
    (tmp_path / "one.py").write_text(EXPERIMENT)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def run(*command):
        # Away from the checkout, which Python would find the package in.
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    shutil.copytree(REPOSITORY / "mtp_jax", tmp_path / "source" / "mtp_jax")  # a build leaves files beside it
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path / "source")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels", "./source")
    run(sys.executable, "-m", "venv", "env")
    (wheel,) = (tmp_path / "wheels").glob("mtp_jax-*.whl")
    constraints = str(REPOSITORY / "constraints.txt")
    run("env/bin/python", "-m", "pip", "install", "--quiet", "-c", constraints, str(wheel))
    assert "train     EXPERIMENT.py" in run("env/bin/mtp-jax", "--help")
    where = run("env/bin/python", "-c", "import mtp_jax; print(mtp_jax.__version__, mtp_jax.__file__)")
    assert str(tmp_path) in where and wheel.name.split("-")[1] in where
    assert "step 1/1" in run("env/bin/mtp-jax", "train", "one.py", "--run-dir", "run")
    assert (tmp_path / "run" / "config.json").exists()
