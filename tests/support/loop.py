"""A trainer that takes no time, for tests which see the loop and nothing else."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from mtp_jax.config import TrainConfig
from mtp_jax.state import TrainState

WINDOW, RANK = 3, 2


class FakeTrainer:
    """Steps that take no time. The loss of step n is n, or what `metrics` says; `during[n]` is called in step n."""

    def __init__(
        self,
        metrics: dict[int, dict[str, Any]] | None = None,
        during: dict[int, Callable[[], Any]] | None = None,
    ):
        self.metrics, self.during, self.events = metrics or {}, during or {}, []

    def init(self, base: bool = True) -> TrainState:
        """The state before the first step."""
        return self.state(0)

    def state(self, step: int) -> TrainState:
        """The state behind a step, which tells its number."""
        params = {name: jnp.full(2, step, jnp.float32) for name in ("trunk", "head", "embed_VD")}
        return TrainState(jnp.asarray(step, jnp.int32), params, {"moment": jnp.full(2, -step, jnp.float32)})

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, np.ndarray]]:
        """The next state, and what is said of the step."""
        n = int(state.step) + 1
        self.events.append(f"step {n}")
        self.during.get(n, lambda: None)()
        metrics = {"loss": n, "loss_offset": [n / 3] * WINDOW, "loss_first_token": n / 3}
        metrics |= {"gate_share": [0.5, 0.5], "gate_entropy": 0.7, "grad_norm": 1.0, "learning_rate": 0.1}
        metrics = {name: np.asarray(value, np.float32) for name, value in (metrics | self.metrics.get(n, {})).items()}
        return self.state(n), metrics

    def compile(self, state: TrainState, batch: Any) -> FakeTrainer:
        """Nothing: there is nothing to compile."""
        return self

    def evaluate(self, params: Any, batch: Any, counts_2W: Any) -> tuple[np.float32, dict[str, np.ndarray]]:
        """The number of the step as the loss."""
        self.events.append("eval")
        loss = np.float32(params["head"][0])
        return loss, {"loss_offset": np.full(WINDOW, loss / 3), "gate_share": np.array([1.0, 0.0])}


def interrupt() -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def change(config: TrainConfig, part: str, **changes: Any) -> TrainConfig:
    """A config of which one part is changed."""
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})
