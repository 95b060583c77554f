"""Documents of known tokens, and batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtp_jax.data.batches import batches, held_out_batches
from mtp_jax.data.store import Documents

Batch = dict[str, np.ndarray]
SIZES: dict[str, Any] = {"seq_len": 8, "window": 3, "batch_size": 4}


def make_documents(lengths: Sequence[int]) -> Documents:
    """Documents whose every token is another one: token i of the store is i."""
    offsets = np.cumsum([0, *lengths])
    return Documents("train", np.arange(offsets[-1], dtype=np.uint32), offsets, [f"{i}" for i in lengths])


def make_batches(documents: Documents, count: int, **changes: Any) -> list[Batch]:
    """The first `count` batches for training, of `SIZES` but for the changes."""
    return list(itertools.islice(batches(documents, **{**SIZES, "seed": 0, **changes}), count))


def make_held_out_batches(documents: Documents, **changes: Any) -> Iterable[Batch]:
    """The batches for evaluation, of `SIZES` but for the changes."""
    return held_out_batches(documents, **{**SIZES, **changes})


def join(shards: Iterable[Iterable[Batch]]) -> list[Batch]:
    """The global batches, from the batches of each host."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]


def assert_same(batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    """As many batches, and the same names and numbers in each."""
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
