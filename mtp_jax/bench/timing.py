"""Times of compiled functions, measured against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Seconds = dict[str, list[float]]


def interleave(functions: Mapping[str, Callable[[], Any]], repetitions: int) -> Seconds:
    """Run the functions in turn, `repetitions` rounds after one that does not count. Seconds of each, by round.

    Each round has an order of its own, always the same ones: none is always measured in the caches that another leaves.
    """
    seconds: Seconds = {name: [] for name in functions}
    rng = np.random.default_rng(0)
    for round_number in range(repetitions + 1):
        for name in rng.permutation(list(functions)):
            begun = time.perf_counter()
            jax.block_until_ready(functions[name]())
            if round_number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(seconds: Seconds, a: str, b: str) -> float:
    """How many times longer `a` takes than `b`: the median of the rounds' ratios."""
    return float(np.median(np.array(seconds[a]) / np.array(seconds[b])))


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, and the quartiles around it."""
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return {"median": float(median), "quartile_1": float(low), "quartile_3": float(high)}
