"""Mixtures of token stores: which of them a sequence comes from.

The sequences of a mixture are numbered, in blocks of `BLOCK`. Each block has the same number of sequences of every
store, in proportion to the weights (largest remainders), in an order that depends on the seed and the block's number
alone. So a batch stays a pure function of (seed, n), a store's own sequences are read one after another, and each of
its tokens is used once in every epoch of it, whatever the others are.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_jax.data.permutation import TURNS, permutation
from mtp_jax.data.store import SPLITS, Documents, Store
from mtp_jax.validate import require

BLOCK = 4096  # sequences; a weight counts by its 4096ths


@dataclass(frozen=True)
class MixedDocuments:
    """The documents of a split of several stores, one store after another; `weights` say how often each is read."""

    parts: tuple[Documents, ...]
    weights: tuple[float, ...]

    def require_some(self) -> None:
        """Raise `ConfigError` if a store has none."""
        for part in self.parts:
            part.require_some()

    @property
    def names(self) -> list[str]:
        """The documents' names."""
        return [name for part in self.parts for name in part.names]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end included."""
        return np.concatenate([part.lengths for part in self.parts])

    def frequencies(self, vocab_size: int) -> np.ndarray:
        """The share `[V]` that each token has in what is read."""
        return np.average([part.frequencies(vocab_size) for part in self.parts], axis=0, weights=self.weights)

    def mask_of(self, index: int) -> np.ndarray:
        """Which tokens of a document are supervised: 1 or 0 for each."""
        part, own = self._at(index)
        return part.mask_of(own)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> np.ndarray:
        part, own = self._at(index)
        return part[own]

    def _at(self, index: int) -> tuple[Documents, int]:
        index, ends = range(len(self))[index], np.cumsum([len(part) for part in self.parts])
        store = np.searchsorted(ends, index, side="right")
        return self.parts[store], int(index - ends[store])  # counted from its end


@dataclass(frozen=True)
class Mixture:
    """Several opened stores of one tokenizer, read in proportion to their weights (which add up to 1)."""

    path: str
    stores: tuple[Store, ...]
    weights: tuple[float, ...]
    train: MixedDocuments
    valid: MixedDocuments

    @property
    def sha256(self) -> str:
        """The hash of what is mixed, and how: where it is the same, the batches are."""
        text = "".join(f"{store.sha256}{count}" for store, count in zip(self.stores, shares(self.weights), strict=True))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def masked(self) -> bool:
        """Whether any of them has a loss mask."""
        return any(store.masked for store in self.stores)

    @property
    def sampled(self) -> dict[str, Any] | None:
        """The law that their texts were sampled from, if a model wrote them. Raises `ConfigError` if they differ."""
        first = self.stores[0].sampled
        for store in self.stores[1:]:
            require(
                store.sampled == first,
                f"The stores {self.stores[0].path} and {store.path} are mixed, and their texts were sampled from "
                f"different laws: {first} and {store.sampled}. A head learns one.",
            )
        return first

    @property
    def hidden(self) -> dict[str, Any] | None:
        """What their hidden states are, if they have some; `temperature` is that of the first store. Raises
        `ConfigError` if they differ in anything else."""
        first, *others = (
            store.hidden and {**store.hidden, "base": store.hidden["base"]["sha256"], "temperature": None}
            for store in self.stores
        )
        for store, hidden in zip(self.stores[1:], others, strict=True):
            require(
                hidden == first,
                f"The stores {self.stores[0].path} and {store.path} are mixed, and their hidden states differ in "
                "kind, or one has none. Cache both with one base and one seq_len.",
            )
        return self.stores[0].hidden

    @property
    def law_temperature(self) -> float | None:
        """That of the base's law whose normaliser is beside the hidden states; None where one has none, or another."""
        found = {store.law_temperature for store in self.stores}
        return found.pop() if len(found) == 1 else None

    @classmethod
    def open(cls, files: str) -> Mixture:
        """Open what `WEIGHT:DIRECTORY,...` lists.

        Raises:
          ConfigError: a weight that is no positive number, or too small next to the others; a directory that is no
            store.
        """
        stores, weights = [], []
        for item in re.split(r",\s*(?=[-+]?[\d.]+(?:e[-+]?\d+)?:)", files):  # a path may have commas
            weight, _, path = item.strip().partition(":")
            try:
                value = float(weight)
            except ValueError:
                value = 0.0
            require(
                0 < value < float("inf")
                and bool(path)
                and (os.path.exists(os.path.expanduser(path)) or "," not in path),
                f"DataConfig.files is {files!r} and {item.strip()!r} is not WEIGHT:DIRECTORY with a weight above 0; "
                "write such as 3:data/stories,1:data/code.",
            )
            stores.append(Store.open(path))
            weights.append(value)
        require(
            min(shares(weights)) > 0,
            f"DataConfig.files is {files!r}, where the smallest weight is less than a {BLOCK}th of all; leave that "
            "store out or give it more.",
        )
        parts = tuple(weight / sum(weights) for weight in weights)
        train, valid = (MixedDocuments(tuple(getattr(store, split) for store in stores), parts) for split in SPLITS)
        return cls(files, tuple(stores), parts, train, valid)


class Turns:
    """Whose turn it is: for the sequence in each place, its store, and how many of that store's come before."""

    def __init__(self, weights: Sequence[float], seed: int):
        self._seed = seed
        self._counts = np.array(shares(weights))
        self._block = functools.lru_cache(maxsize=4)(self._order)

    def of(self, places: np.ndarray) -> np.ndarray:
        """(store, place among that store's sequences) of each of `places` (B,)."""
        return np.transpose([self._block(place // BLOCK)[:, place % BLOCK] for place in places.tolist()])

    def _order(self, block: int) -> np.ndarray:
        """The stores of a block's sequences, and how many of the same store come before each, from block 0 on."""
        stores = np.repeat(np.arange(len(self._counts)), self._counts)[permutation(BLOCK, self._seed, block, TURNS)]
        before = np.empty(BLOCK, np.int64)
        for store, count in enumerate(self._counts):
            before[stores == store] = block * count + np.arange(count)
        return np.stack([stores, before])


def shares(weights: Sequence[float], total: int = BLOCK) -> list[int]:
    """`total` in parts: the integers next to each weight's share of it that add up (largest remainders)."""
    exact = np.asarray(weights, float) / np.sum(weights) * total
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts.tolist()
