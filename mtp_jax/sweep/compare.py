"""Comparisons of runs: paired differences to a reference, with intervals that hold all that is random."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_jax.sweep.intervals import resample
from mtp_jax.sweep.results import Results, Run

Units = tuple[np.ndarray, np.ndarray]  # what a mean is a ratio of sums of, by document: numerators and denominators
Metric = Callable[[Run, str], "Units | None"]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard errors, by what they come from.

    `seed_error` is that of training, from the spread of `seeds` runs, and not known of one; `error` is that of all that
    the runs have in common: the held-out documents (`documents` of them) and the timing. `looks`: how often the data
    were looked at, with more runs made while they decided nothing; each look has its part of the level.
    """

    mean: float
    seeds: int
    documents: int
    seed_error: float = 0.0
    error: float = 0.0
    looks: int = 1

    def interval(self, tests: int = 1) -> tuple[float, float]:
        """The interval of 95% for all of so many tests and looks together (Bonferroni): Student's for the seeds and the
        normal one for the rest, added as variances. Of one seed it says nothing of other seeds."""
        tail = 1 - 0.025 / (tests * self.looks)
        seeds = student(tail, self.seeds - 1) * self.seed_error if self.seeds > 1 else 0.0
        half = math.hypot(seeds, student(tail, math.inf) * self.error)
        return self.mean - half, self.mean + half

    def __format__(self, spec: str) -> str:
        """The number and its interval, each as `spec` says."""
        low, high = self.interval()
        return f"{self.mean:{spec}} [{low:{spec}}, {high:{spec}}]"

    @property
    def how(self) -> str:
        """What the interval is of."""
        looks = f", {self.looks} looks" * (self.looks > 1)
        return f"{self.seeds} seed{'s' * (self.seeds > 1)}, {self.documents} documents{looks}"


@functools.cache
def student(probability: float, freedom: float) -> float:
    """A quantile of Student's t; of infinitely many degrees of freedom, of the normal distribution."""
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))


def estimated(values: Sequence[float], documents: int, error: float, looks: int = 1) -> Estimate:
    """The mean of a value of each seed; `error` is what the seeds share."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(float(np.mean(values)), len(values), documents, spread, error, looks)


def over(pairs: Sequence[tuple[Units, ...]], combine: Callable[..., Any], looks: int = 1) -> Estimate:
    """What `combine` makes of one or two means, for each seed: the documents are the same for all and drawn
    together."""
    values = [float(combine(*(a.sum() / b.sum() for a, b in units))) for units in pairs]
    pooled = [tuple(np.sum([units[i][j] for units in pairs], axis=0) for j in (0, 1)) for i in range(len(pairs[0]))]
    drawn_BD = resample(len(pooled[0][0]))
    with np.errstate(invalid="ignore"):  # where all that are drawn have nothing to divide by
        means = [a[drawn_BD].sum(1) / b[drawn_BD].sum(1) for a, b in pooled]
    return estimated(values, len(pooled[0][0]), float(np.nanstd(combine(*means))), looks)


# Metrics: of a run and a reading the units that its mean is over, or None where it was not measured.


def held_out(name: str) -> Metric:
    """Held-out loss in nats: `joint`, of a whole window, or `first_token`, of the target."""

    def units(run: Run, reading: str) -> Units | None:
        found = run.at(reading)
        if found is None:
            return None
        return np.array(found["documents"][name]), np.array(found["documents"]["windows"], float)

    return units


joint_loss = held_out("joint")


def tokens_per_forward(temperature: float, draft: str = "joint", k: int | None = None) -> Metric:
    """Tokens that a forward with k drafts gives, W-1 if no number is given."""

    def units(run: Run, reading: str) -> Units | None:
        row = decoding(run, reading, temperature, draft, k or None)
        if row is None:
            return None
        forwards = np.array(row["documents"]["forwards"], float)  # one token each if k is 0, in whichever row
        return np.array(row["documents"]["emitted"], float) if k != 0 else forwards, forwards

    return units


def decoding(
    run: Run, reading: str, temperature: float, draft: str = "joint", k: int | None = None
) -> Mapping[str, Any] | None:
    """The row of a temperature and a kind of drafts, and their number, W-1 if none is given."""
    which = temperature, draft, run.head["window"] - 1 if k is None else k
    rows = (run.at(reading) or {}).get("decoding", [])
    return next((row for row in rows if (row["temperature"], row["draft"], row["k"]) == which), None)


def estimate(results: Results, point: tuple[Any, ...], reading: str, metric: Metric) -> Estimate | None:
    """A metric of a point."""
    found = [(units,) for run in results.of(point) if (units := metric(run, reading)) is not None]
    return over(found, lambda own: own, results.looks) if found else None


def compare(results: Results, point: tuple[Any, ...], reading: str, metric: Metric) -> Estimate | None:
    """The difference of a point to its reference at one reading, paired by seed."""
    found = paired(results, point, reading, metric, metric)
    return over(found, lambda own, other: own - other, results.looks) if found else None


def paired(
    results: Results, point: tuple[Any, ...], reading: str, own: Metric, other: Metric
) -> list[tuple[Units, Units]]:
    """A metric of a point's runs and one of those that they are compared with, where both are known, by seed."""
    others = {run.seed: run for run in results.of(results.reference(point))}
    both = [(own(run, reading), other(others[run.seed], reading)) for run in results.of(point) if run.seed in others]
    return [(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]
