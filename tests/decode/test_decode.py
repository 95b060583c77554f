"""Decoding: the output is the target's whatever was drafted, at every width, in every batch; and what is counted."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Decoding
from mtp_jax.decode.generate import generate, stream
from mtp_jax.sharding import BATCH
from support import tiny
from support.decoding import (
    LAWS,
    NEW,
    PROMPTS,
    VOCAB,
    WINDOW,
    ask,
    by_hand,
    chooser,
    cut,
    drive,
    finish,
    full_log_probs,
    same,
)
from support.laws import FALSE_ALARM, POWER, goodness_of_fit, reference_law

# Losslessness.


@pytest.mark.parametrize("k", range(WINDOW))
def test_greedy_equals_full_forwards(model, greedy, k):
    out = finish(ask(model, k=k))
    np.testing.assert_array_equal(out.tokens, greedy)
    assert out.accepted.shape == (4, k)


@pytest.mark.parametrize("k", range(WINDOW))
def test_coupled_sampling_equals_full_forwards_with_the_same_noise(model, sampled, k):
    out = finish(ask(model, k=k, laws=LAWS))
    np.testing.assert_array_equal(out.tokens, sampled)


def test_coupled_sampling_without_filters_equals_full_forwards(model, models):
    """Compiled without the sort."""
    expected = by_hand(models, chooser([(1.1, 0, 1.0)] * 4, seed=3))
    np.testing.assert_array_equal(finish(ask(model, k=1, temperature=1.1, seed=3)).tokens, expected)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.5, 4, 1.0), (1.0, 0, 0.8), (2.0, 12, 0.9)])
def test_one_law_for_all_rows_gives_the_same_tokens_at_every_width(model, temperature, top_k, top_p):
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
    outs = [finish(ask(model, k=k, **options)) for k in range(WINDOW)]
    for out in outs[1:]:
        np.testing.assert_array_equal(out.tokens, outs[0].tokens)
    assert len({tuple(row) for row in outs[0].tokens}) == 4
    assert not same(finish(ask(model, k=0, **{**options, "seed": 8})).tokens, outs[0].tokens)


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}], ids=["greedy", "coupled"])
def test_the_models_of_these_tests_accept_some_drafts_and_reject_some(model, options):
    out = finish(ask(model, **options))
    assert all(0.05 < share < 0.95 for share in out.acceptance[:2])
    assert len({int(n) for n in out.forwards}) > 1, "every row took as many forwards: the batch is not ragged"


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}], ids=["greedy", "coupled"])
def test_whatever_is_drafted_the_output_is_the_same(model, options):
    decoding, rng = ask(model, **options), np.random.default_rng(0)
    expected = finish(decoding)
    out = drive(decoding, lambda count: rng.integers(0, VOCAB, (4, WINDOW - 1)))
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_sampling_follows_the_targets_law(model, models):
    """First tokens of 4,096 seeds in one batch. Power: against a temperature that is off by 20%."""
    rows, temperature = 4096, 1.4
    prompts = [PROMPTS[0]] * rows
    config = DecodeConfig(max_new_tokens=1, k=0, temperature=temperature, seed=100)
    counts = np.bincount(np.concatenate(Decoding(model, prompts, config).result().tokens), minlength=VOCAB)
    tokens_BT = np.zeros((4, 32), np.int32)
    tokens_BT[0, :3] = PROMPTS[0]
    logp_V = np.asarray(full_log_probs(models.stacked, tiny.shard(tokens_BT)))[0, 2]
    expected, warmer = (reference_law(logp_V, t, 0, 1.0) for t in (temperature, 1.2 * temperature))
    value, power = goodness_of_fit(counts, expected, warmer)
    assert power > POWER
    assert value > FALSE_ALARM


# A row is a function of its prompt, seed and law alone.


@pytest.mark.parametrize("laws", [None, LAWS], ids=["greedy", "coupled"])
def test_a_row_does_not_depend_on_its_neighbours(model, laws):
    decoding = ask(model, laws=laws)
    expected = finish(decoding)
    for b in range(4):
        prompts = [p if i == b else [29 - b, 17] * (1 + 2 * i) for i, p in enumerate(PROMPTS)]
        out = finish(ask(model, prompts, laws=laws))
        np.testing.assert_array_equal(out.tokens[b], expected.tokens[b])
        assert out.forwards[b] == expected.forwards[b]
        np.testing.assert_array_equal(out.accepted[b], expected.accepted[b])

    order = np.array([2, 0, 3, 1])
    names = "prompt_BP", "length_B", "limits", "sampling"
    arrays = [getattr(decoding, name) for name in names]
    shuffled = jax.jit(lambda arrays: jax.tree.map(lambda a: a.at[order].get(out_sharding=P(BATCH)), arrays))(arrays)
    vars(decoding).update(zip(names, shuffled, strict=True))
    out = finish(decoding)
    np.testing.assert_array_equal(out.tokens, [expected.tokens[b] for b in order])
    np.testing.assert_array_equal(out.accepted, expected.accepted[order])


@pytest.mark.parametrize("laws", [None, LAWS], ids=["greedy", "coupled"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_change_a_thing(model, laws, chunk):
    decoding = ask(model, laws=laws)
    expected, out = finish(decoding), finish(decoding, chunk=chunk)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.forwards, expected.forwards)
    np.testing.assert_array_equal(out.accepted, expected.accepted)


@pytest.mark.parametrize("moment", [0.0, 1e9], ids=["one by one", "several in one go"])
def test_stream_yields_what_generate_gives(model, greedy, monkeypatch, moment):
    """A forward at a time, whether the loop is entered for each or not."""
    monkeypatch.setattr("mtp_jax.decode.generate.MOMENT", moment)
    stop = int(np.setdiff1d(greedy[1:3], greedy[0])[0])  # one that comes, but not in row 0
    whole = dict(max_new_tokens=NEW, stop_tokens=[stop])
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        expected = cut(expected, stop)
        steps = list(stream(model, prompt, DecodeConfig(**whole)))
        np.testing.assert_array_equal(np.concatenate([new for new, _ in steps]), expected)
        decoding = ask(model, [prompt], stop=stop)
        for new, accepted in steps[1:]:
            before = decoding.result()
            decoding.advance(1)
            after = decoding.result()
            np.testing.assert_array_equal(new, after.tokens[0][len(before.tokens[0]) :])
            assert accepted == after.accepted.sum() - before.accepted.sum()
        own = [len(new) - accepted for new, accepted in steps]  # tokens that are the target's own
        assert len(steps[0][0]) == 1 and set(own[:-1]) <= {1} and own[-1] in (0, 1)
        out = generate(model, [prompt], **whole)
        np.testing.assert_array_equal(out.tokens[0], expected)
        assert out.forwards.tolist() == [len(steps) - 1]
        assert out.accepted.sum() == sum(accepted for _, accepted in steps)


# What is counted.


def test_counts_are_those_of_a_trace_made_by_hand(model, greedy):
    """Drafts that are right up to a chosen offset, and then wrong; row 3 is right again behind the wrong one."""
    plain = np.array(greedy)

    def drafts(count_B: np.ndarray) -> np.ndarray:
        right_Bk = np.stack([np.append(row, [0] * 3)[c : c + 3] for row, c in zip(plain, count_B, strict=True)])
        agrees_Bk = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]], bool)
        return np.where(agrees_Bk, right_Bk, (right_Bk + 1) % VOCAB)

    out = drive(ask(model, max_new_tokens=12), drafts)
    np.testing.assert_array_equal(out.tokens, plain[:, :12])
    # Of 12 tokens prefill gives the first. Row 0: 4 + 4 + 3, the last of two drafts. Row 1: 11 times 1. Rows 2 and 3:
    # 5 times 2, then 1. With n tokens to go a row uses n - 1 drafts at most.
    assert out.forwards.tolist() == [3, 11, 6, 6]
    assert out.accepted.tolist() == [[3, 3, 2], [0, 0, 0], [5, 0, 0], [5, 0, 0]]
    assert out.drafted.tolist() == [[3, 3, 2], [10, 9, 8], [5, 5, 4], [5, 5, 4]]
    assert out.block_efficiency == 4 * 11 / 26
    np.testing.assert_allclose(out.acceptance, [13 / 23, 3 / 22, 2 / 18])


def test_drafts_behind_the_end_of_a_row_are_not_counted(model, greedy):
    """All drafts are right, and the rows end behind the first of a block: by the limit, and by a stop token."""
    plain = np.array(greedy)

    def drafts(count_B: np.ndarray) -> np.ndarray:
        return np.stack([np.append(row, [0] * 3)[c : c + 3] for row, c in zip(plain, count_B, strict=True)])

    out = drive(ask(model, max_new_tokens=6), drafts)
    assert out.forwards.tolist() == [2] * 4
    assert out.block_efficiency == 5 / 2
    assert out.accepted.tolist() == [[1, 1, 1]] * 4 and out.drafted.tolist() == [[1, 1, 1]] * 4

    row = next(b for b in range(4) if plain[b, 0] != plain[b, 1])
    out = drive(ask(model, stop=int(plain[row, 1])), drafts)
    np.testing.assert_array_equal(out.tokens[row], plain[row, :2])
    assert out.accepted[row].tolist() == [1, 0, 0] and out.forwards[row] == 1


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}], ids=["greedy", "coupled"])
def test_a_perfect_draft_gives_k_plus_1_tokens_per_forward(model, options):
    """With its last norm at 0 the model has one law everywhere, uniform, and all factors of its head are that law."""
    model = jax.tree.map(lambda a: a, model)
    model.trunk.norm.scale = jax.tree.map(jax.numpy.zeros_like, model.trunk.norm.scale)
    out = finish(ask(model, max_new_tokens=1 + 3 * WINDOW, **options))
    assert out.block_efficiency == WINDOW and out.acceptance == [1.0] * (WINDOW - 1)
    assert out.forwards.tolist() == [3] * 4
    assert len(np.unique(out.tokens)) == 1 if not options else len(np.unique(out.tokens)) > 10
    cut_short = finish(ask(model, max_new_tokens=2 + 3 * WINDOW, **options))
    assert cut_short.forwards.tolist() == [4] * 4 and cut_short.block_efficiency == (1 + 3 * WINDOW) / 4


def test_a_useless_draft_gives_one_token_per_forward(model, greedy):
    never = np.setdiff1d(np.arange(VOCAB), np.array(greedy))[0]
    out = drive(ask(model), lambda count_B: np.full((4, WINDOW - 1), never))
    np.testing.assert_array_equal(out.tokens, greedy)
    assert out.block_efficiency == 1 and out.acceptance == [0.0] * (WINDOW - 1)
    assert out.forwards.tolist() == [NEW - 1] * 4
