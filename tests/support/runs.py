"""What is on disk of a run."""

from __future__ import annotations

from pathlib import Path

from mtp_jax.train.loggers import read_metrics


def contents(path: Path) -> dict[Path, tuple[bytes, int]]:
    """The bytes of every file below a path, and when it was written."""
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}


def on_disk(run_dir: Path) -> list[int]:
    """The steps that are saved."""
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def logged(run_dir: Path, kind: str) -> list[int]:
    """The steps of the records of one kind."""
    return [record["step"] for record in read_metrics(run_dir) if record["kind"] == kind]
