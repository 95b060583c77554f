"""Clock of a training run: speed between logged steps, goodput, and the time lost to all that is not a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.train.costs import Costs, peak_flops


class Clock:
    """The seconds since it was made, and in `lost` those of each thing that is not training.

    Waiting for data counts as lost though the devices may have been busy meanwhile: it is an upper bound.
    """

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.lost: dict[str, float] = {}
        self.stopped = 0.0
        """The seconds in which no step was made."""

    @contextlib.contextmanager
    def losing(self, what: str, *, stops: bool = True) -> Iterator[None]:
        """A context whose time is lost to `what`. If training `stops` in it, it does not count in the speed."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begun
            self.lost[what] = self.lost.get(what, 0.0) + seconds
            self.stopped += seconds if stops else 0.0

    @property
    def goodput(self) -> float:
        """The share of the time so far in which steps were made."""
        elapsed = time.perf_counter() - self.begun
        return max(0.0, 1 - sum(self.lost.values()) / elapsed) if elapsed else 0.0

    def summary(self) -> str:
        """Where the time went, the largest first."""
        parts = sorted(self.lost.items(), key=lambda item: -item[1])
        lost = ", ".join(f"{what} {seconds:.1f}" for what, seconds in parts if seconds >= 0.05)
        total = f"goodput {self.goodput:.1%} of {time.perf_counter() - self.begun:.1f} s"
        return f"{total}; lost: {lost} s" if lost else total


class Speedometer:
    """Tokens per second and MFU between logged steps, from `step` and from now on."""

    def __init__(self, clock: Clock, step: int, config: TrainConfig, cost: Costs, mesh: Mesh):
        self.device = mesh.local_devices[0]
        self._clock = clock
        self._tokens = config.data.batch_size * config.data.seq_len
        self._flops = cost.trunk_flops + cost.head_flops
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = None if peak is None else peak * mesh.devices.size
        self._step, self._mark, self._first = step, self._training_seconds(), True

    def read(self, step: int) -> dict[str, float | None]:
        """Rates since the last call (metrics of `step` are on the host, so that step is done); `goodput`; the most
        memory that a device of this process had in use, in GiB, where it says so; and, in the first record of a
        process, the seconds that it compiled."""
        now = self._training_seconds()
        result: dict[str, float | None] = {"tokens": float(step * self._tokens)}
        if step > self._step:
            rate = (step - self._step) * self._tokens / (now - self._mark)
            result["tokens_per_second"] = rate
            result["mfu"] = None if self._peak is None else rate * self._flops / self._peak
            self._step, self._mark = step, now
        result["goodput"] = self._clock.goodput
        stats = self.device.memory_stats() or {}
        result["memory_gib"] = stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None
        result["compile_seconds"] = self._clock.lost.get("compiling") if self._first else None
        self._first = False
        return result

    def _training_seconds(self) -> float:
        return time.perf_counter() - self._clock.stopped
