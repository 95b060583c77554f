"""Rows: documents packed once, whole, at most cut at a turn; batches of them, with loss masks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_jax.data.batches import batches, held_out_batches
from mtp_jax.data.mixture import MixedDocuments
from mtp_jax.data.rows import pack
from mtp_jax.data.store import Documents
from mtp_jax.validate import ConfigError

T, W = 16, 3


def documents(lengths, masks=None):
    """Documents of these lengths: token n of document i is 100 i + n + 1."""
    tokens = [100 * i + np.arange(n) + 1 for i, n in enumerate(lengths)]
    offsets = np.cumsum([0, *lengths])
    mask = None if masks is None else np.concatenate([np.array(list(m), np.uint8) for m in masks])
    return Documents("train", np.concatenate(tokens), offsets, [str(i) for i in range(len(lengths))], mask)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_every_token_of_a_text_is_in_one_row_and_no_piece_in_two(lengths):
    found = pack(documents(lengths), T)
    tokens_BT, pieces_BT, supervised_BT = found.read(np.arange(len(found)))
    there = pieces_BT < len(found.rows)
    assert sorted(tokens_BT[there]) == sorted(documents(lengths).tokens) and (supervised_BT == there).all()
    assert (found.cut, found.left_out) == (0, 0) and there.any(axis=1).all()
    for piece in range(len(found.rows)):
        rows, places = np.nonzero(pieces_BT == piece)
        assert len(set(rows)) == 1 and (np.diff(places) == 1).all()
        assert (np.diff(tokens_BT[rows, places]) == 1).all()  # of one document, in its order
    assert (there.sum(axis=1) <= T / 2).sum() <= 1  # two such rows would be one


def test_documents_that_fit_are_packed_tightly():
    assert len(pack(documents([10, 9, 7, 6]), T)) == 2
    assert len(pack(documents([8] * 100), T)) == 50


@pytest.mark.parametrize(
    "mask, kept",
    [
        ("0001100110011001100", 13),  # what comes behind the last turn that ends within the row is left out
        ("00011001111111111111", 5),
        ("0001111111111111111", 16),  # the first answer is longer than a row
    ],
)
def test_a_long_conversation_is_cut_at_a_turn_and_counted(mask, kept):
    found = pack(documents([len(mask)], [map(int, mask)]), T)
    assert found.lengths.tolist() == [kept] and (found.cut, found.left_out) == (1, len(mask) - kept)


def test_a_conversation_whose_first_answer_begins_behind_a_row_is_left_out_whole_and_named():
    masks = [list(map(int, mask)) for mask in ("0011", "00000000000000001100", "0000000000001100000011")]
    found = pack(documents([4, 20, 22], masks), T)
    assert sorted(found.lengths.tolist()) == [4, 14]
    assert (found.cut, found.unanswered, found.left_out) == (2, 1, 20 + 8)
    assert f"the first: {found.documents.names[1]})" in found.losses() and "1 of them whole" in found.losses()
    with pytest.raises(ConfigError, match=r"an answer that begins in its first 16 tokens .* Raise data\.seq_len"):
        pack(documents([20], [masks[1]]), T)


def test_targets_count_as_far_as_all_before_them_are_supervised():
    """The prompt's last position counts, earlier ones do not, and no window crosses a turn of the user's."""
    found = documents([12], [map(int, "000111001100")])
    batch = next(batches(found, seq_len=T, window=W, batch_size=1, seed=0, rows=True))
    counts = batch["valid_BTW"][0].sum(-1)
    assert counts.tolist() == [0, 0, 3, 2, 1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    assert batch["valid_BTW"][0, 2].tolist() == [True] * 3 and batch["targets_BTW"][0, 2].tolist() == [4, 5, 6]


def test_an_epoch_is_a_permutation_of_the_rows_and_batches_are_functions_of_their_number():
    found = documents([9 + i % 8 for i in range(20)])
    count, sizes = len(pack(found, T)), dict(seq_len=T, window=W, batch_size=2, seed=3, rows=True)
    stream = batches(found, **sizes)
    first = [next(stream) for _ in range(count)]
    rows = [tuple(row) for batch in first for row in batch["tokens_BT"]]
    assert len(set(rows[:count])) == count == len(set(rows[count:])) and rows[:count] != rows[count:]
    again = next(batches(found, start=5, **sizes))
    halves = [next(batches(found, start=5, shard=(i, 2), **sizes)) for i in range(2)]
    for name, array in first[5].items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


def test_documents_do_not_see_each_other_in_a_row():
    batch = next(batches(documents([6, 5, 4]), seq_len=T, window=W, batch_size=1, seed=0, rows=True))
    segments, tokens = batch["segments_BT"][0], batch["tokens_BT"][0]
    for i in range(3):
        assert len(set(segments[(tokens - 1) // 100 == i])) == 1 or i == 0
    assert len(set(segments)) == 4  # and the padding
    last = [5, 10, 14, 15]
    assert not batch["valid_BTW"][0, last].any() and batch["valid_BTW"][0, :3].all()


def test_held_out_rows_are_all_there_once_and_the_rest_is_padding():
    found = documents([9] * 5)
    batches_ = held_out_batches(found, seq_len=T, window=W, batch_size=2, rows=True)
    assert len(batches_) == 3
    tokens = np.concatenate([batch["tokens_BT"] for batch in batches_])
    assert sorted(tokens[tokens > 0]) == sorted(found.tokens) and not batches_[-1]["valid_BTW"][1].any()
    few = held_out_batches(found, seq_len=T, window=W, batch_size=1, limit=2, rows=True)
    assert [int(batch["tokens_BT"][0, 0]) // 100 for batch in few] == [0, 2]


def test_hidden_states_come_with_the_rows_that_they_are_of():
    found = documents([10, 9, 7, 6, 3])
    rows = pack(found, T)
    hidden = np.repeat(np.arange(len(rows), dtype=np.float32)[:, None, None] + 1, T, axis=1)
    with_states = dataclasses.replace(found, hidden=hidden)
    order = {tuple(row): i for i, row in enumerate(rows.read(np.arange(len(rows)))[0])}
    stream = batches(with_states, seq_len=T, window=W, batch_size=3, seed=0, rows=True)
    for _, batch in zip(range(4), stream, strict=False):
        wanted = [order[tuple(row)] + 1 for row in batch["tokens_BT"]]
        assert batch["x_BTD"][:, 0, 0].tolist() == wanted and batch["x_BTD"].shape == (3, T, 1)
    last = held_out_batches(with_states, seq_len=T, window=W, batch_size=4, rows=True)[-1]
    assert not last["x_BTD"][len(rows) % 4 :].any()


def test_a_mixture_of_rows_keeps_its_proportions():
    parts = tuple(documents([10] * n) for n in (8, 4))
    mixed = MixedDocuments(parts, (0.75, 0.25))
    batch = next(batches(mixed, seq_len=T, window=W, batch_size=4096, seed=0, rows=True))
    assert batch["tokens_BT"].shape == (4096, T) and (batch["valid_BTW"][:, :7].all())
