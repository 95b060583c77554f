"""Runs against the run that they are compared with: paired differences and their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_jax.results.load import Results, Run

# 97.5% quantiles of Student's t by degrees of freedom.
T975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
RESAMPLES = 2_000
Units = tuple[np.ndarray, np.ndarray]  # what a mean is a ratio of sums of: numerators and denominators


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval. `over` says what was varied: "seeds" (Student's t) or "documents" (bootstrap)."""

    mean: float
    low: float
    high: float
    over: str
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """As a difference."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def how(self) -> str:
        """What the interval is of."""
        return f"{self.count} seeds" if self.over == "seeds" else f"1 seed, {self.count} {self.over}"


def over_seeds(values: list[float]) -> Estimate:
    """The mean of two values or more, and Student's interval around it: their spread holds all that is random."""
    count, mean = len(values), float(np.mean(values))
    half = T975[min(count - 1, len(T975) - 1)] * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, "seeds", count)


def over_units(
    one: Units, other: Units | None, combine: Callable[[Any, Any], Any], over: str = "documents", seed: int = 0
) -> Estimate:
    """A comparison of two means over the same units, which are drawn together: the paired percentile bootstrap."""
    drawn_BN = np.random.default_rng(seed).integers(0, len(one[0]), (RESAMPLES, len(one[0])))

    def mean(units: Units, at: Any) -> Any:
        return units[0][at].sum(-1) / units[1][at].sum(-1)

    whole = np.arange(len(one[0]))
    values_B = combine(mean(one, drawn_BN), mean(other, drawn_BN) if other else None)
    low, high = np.percentile(values_B, (2.5, 97.5))
    value = combine(mean(one, whole), mean(other, whole) if other else None)
    return Estimate(float(value), float(low), float(high), over, len(one[0]))


# Metrics: of a run and a reading the units that its mean is over, or None where it was not measured.


def joint_loss(run: Run, reading: str) -> Units | None:
    """Held-out loss of a whole window in nats, by sequence."""
    return _sequences(run, reading, "joint")


def first_token_loss(run: Run, reading: str) -> Units | None:
    """Held-out loss of the target in nats, by sequence."""
    return _sequences(run, reading, "first_token")


def _sequences(run: Run, reading: str, name: str) -> Units | None:
    found = run.at(reading)
    if found is None:
        return None
    values_N = np.array(found["sequences"][name])
    return values_N, np.ones_like(values_N)


def tokens_per_forward(temperature: float, draft: str = "joint") -> Callable[[Run, str], Units | None]:
    """Tokens that a forward with W-1 drafts gives, by document."""

    def units(run: Run, reading: str) -> Units | None:
        row = decoding(run, reading, temperature, draft)
        return None if row is None else tuple(np.array(row["documents"][n], float) for n in ("emitted", "forwards"))  # type: ignore[return-value]

    return units


def decoding(run: Run, reading: str, temperature: float, draft: str = "joint") -> Mapping[str, Any] | None:
    """The row of a temperature and a kind of drafts."""
    rows = (run.at(reading) or {}).get("decoding", [])
    return next((row for row in rows if (row["temperature"], row["draft"]) == (temperature, draft)), None)


Metric = Callable[[Run, str], "Units | None"]


def estimate(results: Results, point: tuple[Any, ...], reading: str, metric: Metric) -> Estimate | None:
    """A metric of a point, over its seeds, or over documents where there is one seed."""
    units = [found for run in results.of(point) if (found := metric(run, reading)) is not None]
    if not units:
        return None
    if len(units) > 1:
        return over_seeds([float(a.sum() / b.sum()) for a, b in units])
    return over_units(units[0], None, lambda own, _: own)


def compare(
    results: Results,
    point: tuple[Any, ...],
    reading: str,
    metric: Metric,
    combine: Callable[[Any, Any], Any] = lambda own, other: own - other,
) -> Estimate | None:
    """A point against its reference at one reading, paired by seed: their difference, or what `combine` makes of "
    "two."""
    others = {run.seed: run for run in results.of(results.reference(point))}
    pairs = [
        (own, other)
        for run in results.of(point)
        if run.seed in others
        and (own := metric(run, reading)) is not None
        and (other := metric(others[run.seed], reading)) is not None
    ]
    if not pairs:
        return None
    if len(pairs) > 1:
        means = [[float(a.sum() / b.sum()) for a, b in pair] for pair in pairs]
        return over_seeds([float(combine(own, other)) for own, other in means])
    (own, other) = pairs[0]
    return over_units(own, other, combine)


# Speed: tokens per iteration with k drafts, which the acceptance of a run at a reading gives, over what such an
# iteration takes, which is measured once for all shapes of a sweep, in turn.


def iteration_seconds(run: Run, temperature: float) -> dict[int, float]:
    """The time of an iteration by k, in the run's own dtype; of k = 0 in the dtype in which that is fastest."""
    rows = [row for row in run.raw["cost"]["decoding"] if row["temperature"] == temperature]
    own = run.raw["config"]["model"]["dtype"]
    found = {row["k"]: row["iteration_seconds"] for row in rows if row["dtype"] == own}
    if found:
        found[0] = min(row["iteration_seconds"] for row in rows if row["k"] == 0)
    return found


def rate(run: Run, reading: str, temperature: float) -> tuple[float, int] | None:
    """Tokens/s at the best k, and that k."""
    row, seconds = decoding(run, reading, temperature), iteration_seconds(run, temperature)
    if row is None or not seconds:
        return None
    kept = [0.0, *np.cumsum([found["mean"] for found in row["acceptance"]])]
    best = max(seconds, key=lambda k: (1 + kept[k]) / seconds[k])
    return float((1 + kept[best]) / seconds[best]), best


def speedup(run: Run, reading: str, temperature: float) -> tuple[float, int] | None:
    """Tokens/s at the best k over plain decoding, and that k."""
    found = rate(run, reading, temperature)
    return found and (found[0] * iteration_seconds(run, temperature)[0], found[1])


def speed_ratio(results: Results, point: tuple[Any, ...], reading: str, temperature: float) -> Estimate | None:
    """The tokens/s of a point over those of its reference, each at its best k, over seeds."""
    others = {run.seed: run for run in results.of(results.reference(point))}
    ratios = []
    for run in results.of(point):
        own = rate(run, reading, temperature)
        other = rate(others[run.seed], reading, temperature) if run.seed in others else None
        if own and other:
            ratios.append(own[0] / other[0])
    if not ratios:
        return None
    return over_seeds(ratios) if len(ratios) > 1 else Estimate(ratios[0], math.nan, math.nan, "seeds", 1)
