"""Permutations that depend on a seed alone, the same in every version of numpy."""

from __future__ import annotations

import numpy as np

# What an order is of, beside the store it belongs to: of a mixture's turns.
TURNS = 2**15


def permutation(size: int, seed: int, stream: int, store: int = 0) -> np.ndarray:
    """A permutation of 0..size-1 that depends on (seed, store, stream) alone.

    Sorted by the raw output of Philox, which unlike `Generator.permutation` is the same in every version of numpy.
    """
    key = np.array([seed % 2**64, store << 48 | stream], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
