"""States that were not trained, for tests of what saves them and for the processes which these start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.state import TrainState
from support import tiny

CONFIG = tiny.train_config()


def make_state(step: int, size: int = 16) -> TrainState:
    """What a step holds follows from its number."""
    w = jnp.arange(size, dtype=jnp.float32) + step
    return TrainState(jnp.asarray(step, jnp.int32), {"w": w, "b": {"x": -w}}, ({"m": 2 * w},), {"w": w / 2})


def on_disk(run_dir: Path) -> list[str]:
    """The names of what lies among the steps: those that are whole, and whatever else."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def held(tree: Any) -> int:
    """Bytes that the first device holds of real arrays."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for a in jax.tree.leaves(tree) for s in a.addressable_shards if s.device == first)
