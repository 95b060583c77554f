"""Laws of tokens by their definition, and whether a sample has the law that it should have."""

from __future__ import annotations

import numpy as np
from scipy import stats

# A false alarm has probability 1e-4; each test states what its sample finds with probability 0.999 or more.
FALSE_ALARM, POWER = 1e-4, 0.999


def reference_law(logp: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The definitions, in float64, for one vector: probabilities `[V]`.

    softmax(logp / T); the k most likely, ties at the last place kept; of those, renormalised, the smallest set whose
    mass is at least p (never empty; a tie at its edge is kept whole).
    """
    logp = np.asarray(logp, np.float64)
    if temperature == 0:
        return np.eye(len(logp))[np.argmax(logp)]
    p = np.exp((logp - logp.max()) / temperature)
    p /= p.sum()
    if top_k > 0:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
        p /= p.sum()
    if top_p < 1:
        largest = np.sort(p)[::-1]
        p = np.where(p >= largest[np.argmax(np.cumsum(largest) >= top_p)], p, 0)
    return p / p.sum()


def goodness_of_fit(
    counts: np.ndarray, p: np.ndarray, alternative: np.ndarray, false_alarm: float = FALSE_ALARM
) -> tuple[float, float]:
    """The chi-square p-value of `counts` under the law `p`, and the power against `alternative` at `false_alarm`."""
    counts, p, alternative = (np.ravel(a).astype(np.float64) for a in (counts, p, alternative))
    assert counts[p == 0].sum() == 0, f"{counts[p == 0].sum()} samples of tokens that are ruled out"
    n, order = counts.sum(), np.argsort(p)
    order = order[p[order] > 0]
    cell = np.floor(np.cumsum(p[order]) * n / 5 - 1e-9).astype(int)  # every cell is expected 5 times or more
    cell = np.unique(np.minimum(cell, cell[-1] - 1), return_inverse=True)[1]
    counts, p, alternative = (np.bincount(cell, a[order]) for a in (counts, p, alternative))
    value = stats.chisquare(counts, p * n).pvalue
    noncentrality = n * np.sum((alternative - p) ** 2 / p)
    return value, stats.ncx2.sf(stats.chi2.isf(false_alarm, len(p) - 1), len(p) - 1, noncentrality)
