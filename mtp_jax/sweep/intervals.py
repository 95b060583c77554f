"""Confidence intervals of what was measured."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

RESAMPLES = 2_000


@functools.lru_cache(maxsize=8)
def resample(count: int) -> np.ndarray:
    """Numbers of `count` units, drawn with replacement, `[RESAMPLES, count]`: always the same, so that what is compared
    is drawn together."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def ratio_interval(numerator_N: np.ndarray, denominator_N: np.ndarray) -> dict[str, float]:
    """sum(numerator) / sum(denominator) as `mean`, and its 95% interval as `low` and `high`.

    The percentile bootstrap over the N units (documents), which are drawn whole: what one of them holds is not
    independent. 0 / 0 is NaN.
    """
    drawn_BN = resample(len(numerator_N))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios_B = numerator_N[drawn_BN].sum(1) / denominator_N[drawn_BN].sum(1)
        mean = float(numerator_N.sum() / np.float64(denominator_N.sum()))
    low, high = np.nanpercentile(ratios_B, (2.5, 97.5)) if not np.isnan(mean) else (np.nan, np.nan)
    return {"mean": mean, "low": float(low), "high": float(high)}


def of_drafting(
    temperature: float,
    verifier: str,
    k: int,
    emitted_D: np.ndarray,
    forwards_D: np.ndarray,
    accepted_Dk: np.ndarray,
    drafted_Dk: np.ndarray,
) -> dict[str, Any]:
    """An entry of `decoding` in a results file, from what drafting k tokens counted, or is expected to, by document."""
    columns = zip(accepted_Dk.T, drafted_Dk.T, strict=True)
    return {
        "temperature": temperature,
        "verifier": verifier,
        "draft": "joint",  # older files know of another kind
        "k": k,
        "verification_steps": forwards_D.sum().item(),
        "tokens_per_forward": ratio_interval(emitted_D, forwards_D),
        "acceptance": [ratio_interval(accepted_D, drafted_D) for accepted_D, drafted_D in columns],
        "documents": {"emitted": emitted_D.tolist(), "forwards": forwards_D.tolist()},
    }
