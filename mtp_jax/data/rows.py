"""Rows of documents: each holds whole ones, packed once, and lies behind nothing that it cannot see.

For a base that stays as it is, and for conversations, documents are not cut where a sequence ends: they are packed into
rows of T tokens, which depend on the store and T alone. So the hidden states of a row are the same in every epoch, and
can be kept. A conversation that is longer than a row is cut at a turn, and what comes behind is left out; plain text
goes on in another row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_jax.data.store import Documents
from mtp_jax.validate import require


@dataclass(frozen=True)
class Rows:
    """The rows of a split. Piece i is `lengths[i]` tokens from `begins[i]` on, in row `rows[i]` from `places[i]` on;
    pieces are in the order of their rows. `cut` documents lost what came behind a turn, `left_out` tokens in all; the
    first of them has the name `first_cut`. Of these `unanswered` had no answer that begins in the row, and are left out
    whole."""

    documents: Documents
    seq_len: int
    begins: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    cut: int
    left_out: int
    unanswered: int
    first_cut: str

    def losses(self) -> str:
        """What was left out, in a sentence."""
        gone = f", {self.unanswered:,} of them whole, for no answer begins in it" if self.unanswered else ""
        return (
            f"{self.cut:,} conversations of the {self.documents.split} split are longer than a row of {self.seq_len} "
            f"tokens (the first: {self.first_cut}) and were cut at a turn{gone}: {self.left_out:,} tokens less."
        )

    def __len__(self) -> int:
        return int(self.rows[-1]) + 1 if len(self.rows) else 0

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, piece of each token, whether it is supervised), each `[B, T]`, of the rows `numbers` (B,).

        What no piece fills is padding: token 0, each a piece of its own, not supervised. So is a whole row where the
        number is none of a row.
        """
        shape = (len(numbers), self.seq_len)
        tokens_BT, supervised_BT = np.zeros(shape, np.int32), np.zeros(shape, bool)
        pieces_BT = np.broadcast_to(len(self.rows) + np.arange(self.seq_len), shape).copy()
        for b, number in enumerate(numbers):
            first, last = np.searchsorted(self.rows, [number, number + 1])
            for piece in range(first, last):
                begin, count, place = self.begins[piece], self.lengths[piece], self.places[piece]
                own, here = slice(begin, begin + count), slice(place, place + count)
                tokens_BT[b, here] = self.documents.tokens[own]
                pieces_BT[b, here] = piece
                supervised_BT[b, here] = True if self.documents.mask is None else self.documents.mask[own]
        return tokens_BT, pieces_BT, supervised_BT


def pack(documents: Documents, seq_len: int) -> Rows:
    """Documents in rows of `seq_len` tokens (T): the longest first, each where the least room is left behind it."""
    begins, lengths, lost = _pieces(documents, seq_len)
    rows, places = np.empty_like(lengths), np.empty_like(lengths)
    rooms: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by the room that is left in them
    some, count = 0, 0  # bit r of `some`: there is a row with room for r
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        if fitting := some >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rooms[room].pop()
            some &= ~(0 if rooms[room] else 1 << room)
        else:
            row, room, count = count, seq_len, count + 1
        rows[piece], places[piece] = row, seq_len - room
        if left := room - size:
            rooms[left].append(row)
            some |= 1 << left
    order = np.lexsort((places, rows))
    return Rows(documents, seq_len, begins[order], lengths[order], rows[order], places[order], **lost)


def _pieces(documents: Documents, seq_len: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Where each piece begins and how long it is; and what `Rows` says of those that were cut."""
    nothing = {"cut": 0, "left_out": 0, "unanswered": 0, "first_cut": ""}
    begins, lengths = np.asarray(documents.offsets[:-1]), documents.lengths
    long = np.flatnonzero(lengths > seq_len)
    if documents.mask is None:
        more = [np.arange(begins[i], begins[i] + lengths[i], seq_len) for i in long]
        ends = [np.minimum(one + seq_len, begins[i] + lengths[i]) for one, i in zip(more, long, strict=True)]
        kept = np.setdiff1d(np.arange(len(begins)), long)
        return (
            np.concatenate([begins[kept], *more]),
            np.concatenate([lengths[kept], *(end - one for one, end in zip(more, ends, strict=True))]),
            nothing,
        )
    lengths = lengths.copy()
    before = int(lengths.sum())
    for i in long:
        # The mask of what fits and of one token more: an answer may end with the row.
        mask = np.asarray(documents.mask[begins[i] : begins[i] + seq_len + 1], np.int8)
        ends = np.flatnonzero(np.diff(mask) == -1) + 1
        lengths[i] = ends[-1] if len(ends) else seq_len if mask[:seq_len].any() else 0
    some = lengths > 0
    require(
        bool(some.any()) or not len(long),
        f"No conversation of the {documents.split} split has an answer that begins in its first {seq_len} tokens (the "
        f"first is {documents.names[0] if len(long) else ''}). Raise data.seq_len.",
    )
    if not len(long):
        return begins, lengths, nothing
    left_out, unanswered = before - int(lengths.sum()), int(np.sum(~some))
    lost = {
        "cut": len(long),
        "left_out": left_out,
        "unanswered": unanswered,
        "first_cut": documents.names[int(long[0])],
    }
    return begins[some], lengths[some], lost
