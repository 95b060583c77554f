"""Rates of decoding: tokens per iteration over what such an iteration takes, at the k that is best of those measured.

Iterations are timed for all shapes of a sweep in turn, in rounds: a ratio of two is formed within each round.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtp_jax.sweep.compare import Estimate, Units, over, paired, tokens_per_forward
from mtp_jax.sweep.intervals import resample
from mtp_jax.sweep.results import Results, Run


def plain_alike(results: Results, run: Run) -> list[Run]:
    """Runs, one of each point, whose decoding without drafts is the same work as that of `run`: the same model with
    a next-token head (`ntp`)."""
    own = run.raw["config"]["model"]
    firsts = [results.of(point)[0] for point in results.points]
    alike = [other for other in firsts if other.head["target"] == "ntp" and other.raw["config"]["model"] == own]
    return alike if run.head["target"] == "ntp" else [run]


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
    plain = [timed(other, temperature, 0) for other in plain_alike(results, run)]
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
    tokens = over(found, lambda mine, theirs: mine / theirs, results.looks)
    timing, error = float(np.median(other.seconds / own.seconds)), float(np.std(_drawn_ratios(*both)))
    return replace(tokens, mean=tokens.mean * timing, seed_error=tokens.seed_error * timing, error=error)


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
