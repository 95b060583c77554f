"""Runs against the run that they are compared with: paired differences, and intervals that hold all that is random."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_jax.results.load import Results, Run
from mtp_jax.sweep.intervals import resample

Units = tuple[np.ndarray, np.ndarray]  # what a mean is a ratio of sums of, by document: numerators and denominators
Metric = Callable[[Run, str], "Units | None"]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard errors, by what they come from.

    `seed_error` is that of training, from the spread of `seeds` runs, and not known of one; `error` is that of all that
    the runs have in common: the held-out documents (`documents` of them) and the timing.
    """

    mean: float
    seeds: int
    documents: int
    seed_error: float = 0.0
    error: float = 0.0

    def interval(self, tests: int = 1) -> tuple[float, float]:
        """The interval of 95% for each of so many tests together (Bonferroni): Student's for the seeds and the normal
        one for the rest, added as variances. Of one seed it says nothing of other seeds."""
        tail = 1 - 0.025 / tests
        seeds = student(tail, self.seeds - 1) * self.seed_error if self.seeds > 1 else 0.0
        half = math.hypot(seeds, student(tail, math.inf) * self.error)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{', '.join(f'{bound:.3f}' for bound in self.interval())}]"

    @property
    def signed(self) -> str:
        """As a difference."""
        return f"{self.mean:+.3f} [{', '.join(f'{bound:+.3f}' for bound in self.interval())}]"

    @property
    def how(self) -> str:
        """What the interval is of."""
        return f"{self.seeds} seed{'s' * (self.seeds > 1)}, {self.documents} documents"


@functools.cache
def student(probability: float, freedom: float) -> float:
    """A quantile of Student's t; of infinitely many degrees of freedom, of the normal distribution."""
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))


def estimated(values: Sequence[float], documents: int, error: float) -> Estimate:
    """The mean of a value of each seed; `error` is what the seeds share."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(float(np.mean(values)), len(values), documents, spread, error)


def over(pairs: Sequence[tuple[Units, ...]], combine: Callable[..., Any]) -> Estimate:
    """What `combine` makes of one or two means, for each seed: the documents are the same for all and drawn
    together."""
    values = [float(combine(*(a.sum() / b.sum() for a, b in units))) for units in pairs]
    pooled = [tuple(np.sum([units[i][j] for units in pairs], axis=0) for j in (0, 1)) for i in range(len(pairs[0]))]
    drawn_BD = resample(len(pooled[0][0]))
    means = [a[drawn_BD].sum(1) / b[drawn_BD].sum(1) for a, b in pooled]
    return estimated(values, len(pooled[0][0]), float(np.std(combine(*means))))


# Metrics: of a run and a reading the units that its mean is over, or None where it was not measured.


def joint_loss(run: Run, reading: str) -> Units | None:
    """Held-out loss of a whole window in nats."""
    return _losses(run, reading, "joint")


def first_token_loss(run: Run, reading: str) -> Units | None:
    """Held-out loss of the target in nats."""
    return _losses(run, reading, "first_token")


def _losses(run: Run, reading: str, name: str) -> Units | None:
    found = run.at(reading)
    if found is None:
        return None
    return np.array(found["documents"][name]), np.array(found["documents"]["windows"], float)


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
    return over(found, lambda own: own) if found else None


def compare(results: Results, point: tuple[Any, ...], reading: str, metric: Metric) -> Estimate | None:
    """The difference of a point to its reference at one reading, paired by seed."""
    found = paired(results, point, reading, metric, metric)
    return over(found, lambda own, other: own - other) if found else None


def paired(
    results: Results, point: tuple[Any, ...], reading: str, own: Metric, other: Metric
) -> list[tuple[Units, Units]]:
    """A metric of a point's runs and one of those that they are compared with, where both are known, by seed."""
    others = {run.seed: run for run in results.of(results.reference(point))}
    both = [(own(run, reading), other(others[run.seed], reading)) for run in results.of(point) if run.seed in others]
    return [(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]


# Speed: tokens per iteration over what such an iteration takes, at the number of drafts that is best of those measured.
# Iterations are timed for all shapes of a sweep in turn, in rounds: a ratio of two is formed within each round.


def timed(run: Run, temperature: float, k: int) -> dict[str, np.ndarray]:
    """The times of an iteration with k drafts by round, for each dtype in which it was timed. (Acceptance is measured
    in the run's own dtype.)"""
    rows = [row for row in run.raw["cost"]["decoding"] if (row["temperature"], row["k"]) == (temperature, k)]
    return {row["dtype"]: np.array(row["iteration_seconds"]) for row in rows}


def fastest(times: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Those of the dtype that is fastest; None if there is none."""
    return min(times.values(), key=np.median, default=None)


def iteration_seconds(results: Results, point: tuple[Any, ...], temperature: float) -> dict[int, np.ndarray]:
    """The times of an iteration by round, by k, in the dtype that is fastest for it. Where plain decoding of other
    points is the same work, its time is the median over them."""
    run = results.of(point)[0]  # what it costs does not depend on the seed
    plain = [timed(other, temperature, 0) for other in results.plain_alike(run)]
    pooled = {
        dtype: np.median([times[dtype] for times in plain], axis=0)
        for dtype in plain[0]
        if all(dtype in times for times in plain)
    }
    times = {k: timed(run, temperature, k) for k in range(run.head["window"])}
    if pooled:
        times[0] = pooled
    return {k: seconds for k, of in times.items() if (seconds := fastest(of)) is not None}


@dataclass(frozen=True, eq=False)
class Speed:
    """How a point decodes: k, the tokens of an iteration, its times by round, and what the tokens are a mean of, by
    seed."""

    k: int
    tokens: float
    seconds: np.ndarray
    units: Sequence[Units]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / float(np.median(self.seconds))

    def drawn_tokens(self) -> np.ndarray:
        """The tokens of an iteration on documents that are drawn anew, the same for all."""
        emitted_D, forwards_D = np.sum(self.units, axis=0)
        drawn_BD = resample(len(forwards_D))
        return emitted_D[drawn_BD].sum(1) / forwards_D[drawn_BD].sum(1)


RATE = operator.attrgetter("rate")


def speeds(results: Results, point: tuple[Any, ...], reading: str, temperature: float) -> list[Speed]:
    """For each k of which both tokens and times are known."""
    found = []
    for k, seconds in iteration_seconds(results, point, temperature).items():
        metric = tokens_per_forward(temperature, k=k)
        units = [of for run in results.of(point) if (of := metric(run, reading)) is not None]
        if units:
            found.append(Speed(k, float(np.mean([a.sum() / b.sum() for a, b in units])), seconds, units))
    return found


def speed(results: Results, point: tuple[Any, ...], reading: str, temperature: float) -> Speed | None:
    """At the k that is fastest on average over the seeds."""
    return max(speeds(results, point, reading, temperature), key=RATE, default=None)


def speedup(results: Results, point: tuple[Any, ...], reading: str, temperature: float) -> float | None:
    """Tokens per second over plain decoding."""
    found, seconds = speed(results, point, reading, temperature), iteration_seconds(results, point, temperature)
    return found.rate * float(np.median(seconds[0])) if found and 0 in seconds else None


def speed_ratio(results: Results, point: tuple[Any, ...], reading: str, temperature: float) -> Estimate | None:
    """The tokens per second of a point over those of its reference, each at its own best k.

    In its error the documents, the rounds and with them the best k are drawn anew, together for both.
    """
    both = [
        speeds(results, which, reading, temperature) if results.of(which) else []
        for which in (point, results.reference(point))
    ]
    if not all(both):
        return None
    own, other = (max(of, key=RATE) for of in both)
    found = paired(results, point, reading, *(tokens_per_forward(temperature, k=at.k) for at in (own, other)))
    if not found:
        return None
    tokens = over(found, lambda mine, theirs: mine / theirs)
    timing, error = float(np.median(other.seconds / own.seconds)), float(np.std(_drawn_ratios(*both)))
    return Estimate(tokens.mean * timing, tokens.seeds, tokens.documents, tokens.seed_error * timing, error)


def _drawn_ratios(own: Sequence[Speed], other: Sequence[Speed]) -> np.ndarray:
    """Ratios of the best of each on documents and rounds that are drawn anew."""
    drawn_BN = resample(len(own[0].seconds))
    tokens = {at: at.drawn_tokens() for at in (*own, *other)}
    best_2B = [
        np.argmax([tokens[at] / np.median(at.seconds[drawn_BN], axis=1) for at in of], axis=0) for of in (own, other)
    ]
    ratios_kkB = np.array(
        [[tokens[a] / tokens[b] * np.median((b.seconds / a.seconds)[drawn_BN], axis=1) for b in other] for a in own]
    )
    return ratios_kkB[*best_2B, np.arange(len(drawn_BN))]
