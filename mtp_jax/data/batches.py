"""Batches of token sequences, numbered by step.

The documents of an epoch are permuted by (seed, epoch) and laid end to end, and epochs follow one another: one endless
string of tokens. Sequence i takes its inputs from [i*T, (i+1)*T) and its targets from up to W tokens further. Sequences
are shuffled within each epoch's worth of them, so that a batch is not one document; batch n is the shuffled sequences
[n*B, (n+1)*B). Nothing is packed or remembered: batch n is a pure function of (seed, n), on any number of hosts, and is
found by binary search. A mixture takes its sequences from several such strings, by turns. Below, S = T + W is what one
sequence reads.

Conversations, and all that a head on a base is trained on, come in rows (`mtp_jax.data.rows`) instead, which are
permuted by (seed, epoch) as they are. With the hidden states of a base in the store, a batch has them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mtp_jax.data.mixture import MixedDocuments, Turns, shares
from mtp_jax.data.permutation import permutation
from mtp_jax.data.rows import pack
from mtp_jax.data.store import Documents
from mtp_jax.validate import require

Batch = dict[str, np.ndarray]

# Grain asks how many batches there are; no run comes near the end of these.
ENDLESS = 2**48


class Sequences:
    """Random access to the sequences of the endless string. Safe to read from several threads."""

    def __init__(self, documents: Documents, *, seq_len: int, window: int, seed: int, store: int = 0):
        """Sequences of `seq_len` tokens (T) with targets up to `window` (W) ahead, in the order that `seed` decides.

        `store` is the number of the store in a mixture, where each has an order of its own.
        """
        documents.require_some()
        self.documents = documents
        self.seq_len = seq_len
        self.window = window
        self._order = functools.partial(permutation, seed=seed, store=store)
        self.per_epoch = max(1, len(documents.tokens) // seq_len)
        # A sequence may cross from one epoch to the next.
        self._epoch = functools.lru_cache(maxsize=2)(self._permute)
        self._block = functools.lru_cache(maxsize=2)(lambda block: self._order(self.per_epoch, stream=2 * block + 1))

    def at(self, places: np.ndarray) -> Batch:
        """The sequences that training reads in `places` (B,)."""
        return self.read(self.shuffle(places))

    def shuffle(self, numbers: np.ndarray) -> np.ndarray:
        """Which sequences come in the places `numbers`: a permutation of each `per_epoch` of them in turn."""
        found = (divmod(number, self.per_epoch) for number in numbers.tolist())
        return np.array([block * self.per_epoch + self._block(block)[place] for block, place in found])

    def read(self, numbers: np.ndarray) -> Batch:
        """The sequences whose numbers are `numbers` (B,): the arrays that `batches` describes."""
        store, count, total = self.documents, len(self.documents), len(self.documents.tokens)
        positions_BS = _positions(numbers, self.seq_len, self.window)
        epochs_BS, places_BS = np.divmod(positions_BS, total)
        tokens_BS, ranks_BS = np.empty_like(positions_BS), np.empty_like(positions_BS)
        for epoch in range(epochs_BS.min(), epochs_BS.max() + 1):
            here_BS = epochs_BS == epoch
            places = places_BS[here_BS]
            order, ends = self._epoch(epoch)
            rank = np.searchsorted(ends, places, side="right")
            # A place lies as far before the end of its document here as it does in the store.
            tokens_BS[here_BS] = store.tokens[store.offsets[order[rank] + 1] - (ends[rank] - places)]
            ranks_BS[here_BS] = epoch * count + rank
        return _batch(tokens_BS, ranks_BS, self.window)

    def _permute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of `epoch` in their order, and where each ends."""
        order = self._order(len(self.documents), stream=2 * epoch)
        return order, np.cumsum(self.documents.lengths[order])


class RowSequences:
    """Random access to the rows of a split. Safe to read from several threads."""

    def __init__(
        self, documents: Documents, *, seq_len: int, window: int, seed: int, store: int = 0, normalised: bool = False
    ):
        """As `Sequences`; `normalised`: with the normaliser of the base's law."""
        documents.require_some()
        self.rows, self.window = pack(documents, seq_len), window
        hidden, self.normaliser = documents.hidden, documents.normaliser if normalised else None
        require(
            hidden is None or hidden.shape[:2] == (len(self.rows), seq_len),
            f"The hidden states of the {documents.split} split are {[] if hidden is None else list(hidden.shape)} and "
            f"its rows of {seq_len} tokens are {len(self.rows)}. Cache them again.",
        )
        order = functools.partial(permutation, len(self.rows), seed, store=store)
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: order(2 * epoch + 1))

    def at(self, places: np.ndarray) -> Batch:
        """The rows that training reads in `places` (B,)."""
        found = (divmod(place, len(self.rows)) for place in places.tolist())
        return self.read(np.array([self._epoch(epoch)[place] for epoch, place in found]))

    def read(self, numbers: np.ndarray) -> Batch:
        """The rows whose numbers are `numbers` (B,), which have no targets beyond them: arrays as in `batches`."""
        tokens_BT, pieces_BT, supervised_BT = self.rows.read(numbers)
        ahead = ((0, 0), (0, self.window))
        tokens_BS, pieces_BS = np.pad(tokens_BT, ahead), np.pad(pieces_BT, ahead, constant_values=-1)
        batch = _batch(tokens_BS, pieces_BS, self.window, np.pad(supervised_BT, ahead))
        hidden = self.rows.documents.hidden
        inside = np.minimum(numbers, len(self.rows) - 1)
        if hidden is not None:
            batch["x_BTD"] = np.where((numbers == inside)[:, None, None], hidden[inside], np.zeros((), hidden.dtype))
        if self.normaliser is not None:
            batch["normaliser_BT"] = np.where((numbers == inside)[:, None], self.normaliser[inside], np.float32(0))
        return batch


class MixedSequences:
    """Random access to the sequences of a mixture: those of each store in its own order, by turns."""

    def __init__(self, documents: MixedDocuments, *, make: Callable[..., Any], seed: int):
        """`make`: `Sequences` or `RowSequences` of a part, as its `seed` and the number of its `store` go on."""
        self._turns = Turns(documents.weights, seed)
        self._sequences = [make(part, seed=seed, store=store) for store, part in enumerate(documents.parts)]

    def at(self, places: np.ndarray) -> Batch:
        """The sequences that training reads in `places` (B,)."""
        stores, before = self._turns.of(places)
        used = np.unique(stores)
        parts = [self._sequences[store].at(before[stores == store]) for store in used]
        # The parts one after another, back into the order of `places`.
        order = np.argsort(np.concatenate([np.flatnonzero(stores == store) for store in used]))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def batches(
    documents: Documents | MixedDocuments,
    *,
    seq_len: int,
    window: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    rows: bool = False,
    normalised: bool = False,
    threads: int = 2,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Training batches from number `start` on, without end, read ahead by Grain.

    `batch_size` (B) is global; with `shard = (index, count)` each batch holds rows [index * B / count,
    (index + 1) * B / count) of the global one. `rows`: of documents that are packed in rows, and not of one endless
    string; `normalised`: with the normaliser of a base's law, which the documents have. `prefetch` batches are read
    ahead by `threads` threads.

    A batch is a dict of
      `tokens_BT` int32: the inputs;
      `targets_BTW` int32: `targets_BTW[b, t, s]` is the token s + 1 after position t, so s = 0 is the next token;
      `valid_BTW` bool: whether that target belongs to the same document as its input, and with a loss mask whether it
        and all targets before it are supervised. The end-of-document token is a valid target, and as an input has none;
      `segments_BT` int32: which document of the sequence a token belongs to, counted from 0;
      `x_BTD`: the hidden states of a base, where the store has them;
      `normaliser_BT`: that of the base's law, if it is `normalised`.

    Raises `ConfigError` if the split has no documents or `count` does not divide B.
    """
    import grain

    own = _own(batch_size, shard)
    kind = functools.partial(RowSequences, normalised=normalised) if rows else Sequences
    make = functools.partial(kind, seq_len=seq_len, window=window)
    mixed = isinstance(documents, MixedDocuments)
    sequences: Any = MixedSequences(documents, make=make, seed=seed) if mixed else make(documents, seed=seed)
    dataset = grain.MapDataset.range(start, ENDLESS).map(lambda n: sequences.at(n * batch_size + own))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))


def held_out_batches(
    documents: Documents | MixedDocuments,
    *,
    seq_len: int,
    window: int,
    batch_size: int,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    rows: bool = False,
    normalised: bool = False,
) -> list[Batch]:
    """The batches of an evaluation: the documents in the store's order, each token once, or all `rows`. With a `limit`,
    so many batches of sequences that lie evenly over all of it.

    Of a mixture the batches of each store in turn: all of them, or of `limit` a number in proportion to its weight, and
    at least one. Arrays, `shard` and errors are those of `batches`. There is always a batch, and all have the same
    shape: what the documents do not fill at the end is padding, where `valid_BTW` is False.
    """
    documents.require_some()
    if isinstance(documents, MixedDocuments):
        sizes: dict[str, Any] = {"seq_len": seq_len, "window": window, "batch_size": batch_size}
        sizes |= {"shard": shard, "rows": rows, "normalised": normalised}
        some = [None if limit is None else max(1, part) for part in shares(documents.weights, limit or 0)]
        parts = zip(documents.parts, some, strict=True)
        return [batch for part, few in parts for batch in held_out_batches(part, limit=few, **sizes)]
    own, total = _own(batch_size, shard), len(documents.tokens)
    sizes = {"seq_len": seq_len, "window": window}
    found = RowSequences(documents, **sizes, seed=0, normalised=normalised) if rows else None
    sequences = len(found.rows) if found else -(-total // seq_len)
    count = -(-sequences // batch_size)
    numbers = np.arange(count * batch_size)
    if limit is not None and limit < count:
        count, numbers = limit, np.arange(limit * batch_size) * sequences // (limit * batch_size)

    def read(n: int) -> Batch:
        chosen = numbers[n * batch_size + own]
        if found:
            return found.read(chosen)
        positions_BS = _positions(chosen, seq_len, window)
        tokens_BS = documents.tokens[np.minimum(positions_BS, total - 1)]
        ranks_BS = np.searchsorted(documents.offsets[1:], positions_BS, side="right")
        # Each token of padding is a document of its own, so it has no targets and is nobody's.
        return _batch(tokens_BS, np.where(positions_BS < total, ranks_BS, positions_BS), window)

    return [read(n) for n in range(count)]


def _positions(numbers: np.ndarray, seq_len: int, window: int) -> np.ndarray:
    return numbers[:, None] * seq_len + np.arange(seq_len + window)


def _batch(tokens_BS: np.ndarray, ranks_BS: np.ndarray, window: int, supervised_BS: np.ndarray | None = None) -> Batch:
    """The arrays of sequences, from their tokens, the running number of each token's document, and whether each is
    supervised (None: all are)."""
    tokens_BS = tokens_BS.astype(np.int32)
    inputs_BT, documents_BT = tokens_BS[:, :-window], ranks_BS[:, :-window]
    valid_BTW = sliding_window_view(ranks_BS, window, axis=1)[:, 1:] == documents_BT[:, :, None]
    if supervised_BS is not None:
        ahead_BTW = sliding_window_view(supervised_BS, window, axis=1)[:, 1:]
        valid_BTW &= np.logical_and.accumulate(ahead_BTW, axis=2)
    return {
        "tokens_BT": inputs_BT.copy(),
        "targets_BTW": sliding_window_view(tokens_BS, window, axis=1)[:, 1:].copy(),
        "valid_BTW": valid_BTW,
        "segments_BT": (documents_BT - documents_BT[:, :1]).astype(np.int32),
    }


def _own(batch_size: int, shard: tuple[int, int]) -> np.ndarray:
    """The sequences of a global batch that fall to host `index` of `count`."""
    index, count = shard
    require(
        batch_size % count == 0,
        f"The global batch has {batch_size} sequences and there are {count} hosts, which must divide it. "
        "Change DataConfig.batch_size.",
    )
    require(0 <= index < count, f"The shard is {shard}; the index must be at least 0 and below the count.")
    return np.arange(batch_size).reshape(count, -1)[index]
