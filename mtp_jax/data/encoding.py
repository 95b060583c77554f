"""Encoding protocol: how documents become the tokens of a store; and that of plain text."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mtp_jax.data.held_out import divided
from mtp_jax.data.tokenizers import Tokenizer


class Encoded(NamedTuple):
    """A document of a store: its split and name, its ids, and for each 1 if it is supervised (None: all are)."""

    split: str
    name: str
    ids: np.ndarray
    mask: np.ndarray | None = None


class Encoding(Protocol):
    """How documents become tokens. It can be pickled.

    `identity` has JSON values: what a store depends on beside the tokenizer. `masked`: whether it gives a mask.
    `divisible`: whether the split may fall inside of a document. `counted`: what of its counts the manifest has.
    """

    tokenizer: Tokenizer
    identity: dict[str, Any]
    masked: bool
    divisible: bool
    counted: tuple[str, ...]

    def encode(
        self, documents: Sequence[tuple[str, bytes]], valid_fraction: float, inside: bool, counts: collections.Counter
    ) -> Iterator[Encoded]:
        """Named documents in order, split as `mtp_jax.data.held_out.divided` says.

        Adds to `counts` what it finds: `replaced` characters, `unreadable` documents, whose `first_unreadable` says
        why, and what is its own.
        """
        ...

    def told(self, counts: collections.Counter, splits: dict[str, Any]) -> tuple[list[str], list[str]]:
        """What the line about a store says of these counts and entries of the manifest, and what is warned of."""
        ...


class PlainText(Encoding):
    """Every document is text, encoded as it is, and ends with the end-of-document token."""

    masked, divisible, counted = False, True, ()

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.identity = tokenizer, {}

    def encode(
        self, documents: Sequence[tuple[str, bytes]], valid_fraction: float, inside: bool, counts: collections.Counter
    ) -> Iterator[Encoded]:
        """Of many at once: that is fast."""
        counts["replaced"] += sum(self.tokenizer.replaced(text) for _, text in documents)
        pieces = [piece for document in documents for piece in divided(*document, valid_fraction, inside)]
        encoded = self.tokenizer.encode_batch([text for *_, text in pieces])
        for (split, name, _), ids in zip(pieces, encoded, strict=True):
            yield Encoded(split, name, np.append(ids, self.tokenizer.end_of_document))

    def told(self, counts: collections.Counter, splits: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Nothing of its own."""
        return [], []


def unreadable(counts: collections.Counter, why: str) -> None:
    """Count a document that cannot be read."""
    counts["unreadable"] += 1
    counts.setdefault("first_unreadable", why)  # type: ignore[arg-type]
