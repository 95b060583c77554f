"""Runs of `mtp-jax train` in processes of their own, one or several at a time."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mtp_jax.config import MeshConfig, OptimizerConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.train.loggers import read_metrics
from support import REPOSITORY, tiny


def make_corpus(root: Path) -> None:
    """Thirty short texts in ROOT/corpus, for `experiment`."""
    (root / "corpus").mkdir()
    for i in range(30):
        (root / "corpus" / f"{i}.txt").write_bytes(bytes(97 + (i * j) % 20 for j in range(60 + i)))


def experiment(root: Path, name: str, mesh: MeshConfig | None = None, **changes: Any) -> Path:
    """A file of that name with a run of 20 steps, evaluated and saved every 5, at a constant rate."""
    data = DataConfig(f"{root}/corpus/*.txt", valid_fraction=0.2, batch_size=8, seq_len=16, cache_dir=f"{root}/cache")
    config = tiny.train_config(tiny.model_config(vocab_size=258, num_layers=1), tiny.head_config(window=2, rank=2))
    values = dict(steps=20, eval_every=5, eval_batches=2, checkpoint_every=5, log_every=1, **changes)
    config = dataclasses.replace(
        config,
        data=data,
        optimizer=OptimizerConfig(warmup_steps=2, schedule="constant"),
        mesh=mesh or MeshConfig(),
        **values,
    )
    file = root / f"{name}.py"
    file.write_text(
        "from mtp_jax.config import TrainConfig\nfrom mtp_jax.validate import from_dict\n"
        f"CONFIG = from_dict(TrainConfig, {dataclasses.asdict(config)!r})\n"
    )
    return file


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """`count` processes of `mtp-jax train`, with `devices` devices each, killed on the way out."""

    def __init__(self, file: Path, run_dir: Path, *options: str, count: int = 2, devices: int = 1):
        address = f"localhost:{free_port()}"
        self.processes = []
        for i in range(count):
            flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
            env = {**os.environ, "XLA_FLAGS": flags}
            env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            if count > 1:
                names = {"COORDINATOR": address, "NUM_PROCESSES": count, "PROCESS_ID": i}
                env |= {f"MTP_JAX_{name}": str(value) for name, value in names.items()}
            command = [sys.executable, "-m", "mtp_jax", "train", str(file), "--run-dir", str(run_dir), *options]
            with Path(f"{run_dir}.{i}.log").open("w") as log:
                self.processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log))
        self.run_dir, self.logs = run_dir, [Path(f"{run_dir}.{i}.log") for i in range(count)]

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit statuses."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.wait(timeout=max(1, end - time.monotonic()))
        return [process.returncode for process in self.processes]

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        """Wait until this step is logged, while all processes live."""
        end = time.monotonic() + seconds
        while not any(r["step"] >= step for r in metrics(self.run_dir)):
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.05)

    def said(self, i: int | None = None) -> str:
        """What process i printed, or all of them."""
        return "\n".join(log.read_text() for log in self.logs) if i is None else self.logs[i].read_text()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of this kind, none before the first is written."""
    path = run_dir / "metrics.jsonl"
    return [r for r in read_metrics(run_dir) if r["kind"] == kind] if path.exists() else []


def losses(run_dir: Path) -> list[list[float]]:
    """Every loss of training, and every one of the evaluations."""
    return [[r["loss"] for r in metrics(run_dir, kind)] for kind in ("train", "eval")]
