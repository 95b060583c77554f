"""Where rows end, what their settings are, and what becomes of numbers that are not finite."""

import dataclasses

import jax
import numpy as np
import pytest

from mtp_jax.decode.generate import generate
from support import tiny
from support.decoding import LAWS, NEW, PROMPTS, VOCAB, WINDOW, ask, by_hand, cut, finish, full_log_probs, same

# Where rows end.


def test_a_stop_token_ends_its_row_wherever_it_stands(model, greedy, sampled):
    """Every token that greedy decoding produces is declared the stop token in turn, at every offset of a block."""
    for laws, rows in ((None, greedy), (LAWS, sampled)):
        for stop in np.unique(rows):
            out = finish(ask(model, laws=laws, stop=int(stop)))
            assert same(out.tokens, [cut(row, stop) for row in rows])


@pytest.mark.parametrize("k", [0, WINDOW - 1])
def test_max_new_tokens_is_exact(model, greedy, k):
    for new in range(1, NEW + 1):
        out = finish(ask(model, k=k, max_new_tokens=new))
        np.testing.assert_array_equal(out.tokens, [row[:new] for row in greedy])
        assert all(out.forwards <= new - 1) and all(out.forwards >= (new - 1) / (k + 1))


def test_prompt_and_new_tokens_may_fill_the_context(models):
    """The last tokens of a full context are right: no write near the end of the cache moves back over valid keys."""
    with tiny.mesh():
        rows = by_hand(models, lambda b, position, logp_V: np.argmax(logp_V))
        context = dataclasses.replace(models.ready.config, context_length=32)
        model = jax.tree.map(lambda a: a, models.ready)
        model.config = context
        np.testing.assert_array_equal(finish(ask(model)).tokens, rows)  # row 3: 16 + 16 = 32


def test_finished_rows_are_frozen(model, greedy):
    decoding = ask(model, stop=int(greedy[1][2]))
    ended = {}
    while not decoding.done:
        decoding.advance(1)
        state = decoding.state
        for b in np.flatnonzero(state.done_B):
            length = int(state.length_B[b])
            seen = [state.tokens_BS[b, :length], length, state.forwards_B[b], state.accepted_Bk[b]]
            # The key and value of the last committed token are written by the next forward.
            seen += [a[b, :, : length - 1] for layer in state.cache for a in layer]
            jax.tree.map(np.testing.assert_array_equal, *(ended.setdefault(b, jax.device_get(seen)), seen))
    assert len(ended) == 4 and len(set(np.asarray(state.forwards_B).tolist())) > 1


@pytest.mark.parametrize("k", [0, WINDOW - 1])
def test_nothing_behind_the_committed_tokens_is_read(model, greedy, k):
    """Rubbish in the cache and in the token buffer from there on, before every forward, changes nothing."""
    decoding = ask(model, k=k)
    while not decoding.done:
        state = decoding.state
        behind_BS = np.arange(decoding.plan.slots)[None] >= np.asarray(state.length_B)[:, None]
        tokens_BS = np.where(behind_BS, 31, state.tokens_BS)
        # Position length - 1 is not in the cache yet.
        stale_BKSH = np.roll(behind_BS, -1, axis=1)[:, None, :, None]
        cache = jax.tree.map(lambda a, s=stale_BKSH: jax.device_put(np.where(s, 1e9, a), a.sharding), state.cache)
        tokens_BS = jax.device_put(tokens_BS, state.tokens_BS.sharding)
        decoding.state = dataclasses.replace(state, tokens_BS=tokens_BS, cache=cache)
        decoding.advance(1)
    np.testing.assert_array_equal(decoding.result().tokens, greedy)


# Each row has settings of its own.


def test_settings_may_differ_by_row(model, sampled):
    """What a row gets among rows of other settings is what it gets where all have its own."""
    temperature, top_k, top_p = zip(*LAWS, strict=True)
    settings = dict(temperature=temperature, top_k=top_k, top_p=np.array(top_p), stop_tokens=[31])
    both = generate(model, PROMPTS, max_new_tokens=NEW, **settings)
    assert same(both.tokens, [cut(row, 31) for row in sampled])

    settings |= dict(max_new_tokens=[3, 16, 1, 9], seed=[7, 7, 2**32 - 1, 0], k=[0, 3, 2, 1], top_p=[0.9] * 4)
    both = generate(model, PROMPTS, **settings)
    assert both.drafted.shape == (4, 3) and both.drafted[0].sum() == both.drafted[2].sum() == 0
    assert both.drafted[3, 0] > 0 and both.drafted[3, 1:].sum() == 0
    for b in range(4):
        own = {name: values[b] for name, values in settings.items() if name != "stop_tokens"}
        own |= dict(seed=[own["seed"]] * 4, verifier="coupled", stop_tokens=[31])
        alone = generate(model, PROMPTS, **own)
        np.testing.assert_array_equal(both.tokens[b], alone.tokens[b])
        np.testing.assert_allclose(both.logprobs[b], alone.logprobs[b], atol=1e-5)


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_rows_of_the_verifiers_that_compare_probabilities_do_not_depend_on_their_neighbours(model, verifier):
    decoding = ask(model, laws=LAWS, verifier=verifier)
    expected = finish(decoding)
    assert all(len(row) == NEW for row in expected.tokens) and 0.05 < expected.acceptance[0] < 0.95
    chunked = finish(decoding, chunk=2)
    np.testing.assert_array_equal(chunked.tokens, expected.tokens)
    np.testing.assert_array_equal(chunked.accepted, expected.accepted)
    prompts = [PROMPTS[0], [1] * 16, [9, 9], PROMPTS[3]]
    out = finish(ask(model, prompts, laws=LAWS, verifier=verifier))
    for b in (0, 3):
        np.testing.assert_array_equal(out.tokens[b], expected.tokens[b])
    for stop in np.unique(expected.tokens):  # every token in turn, at every offset of a block
        out = finish(ask(model, laws=LAWS, verifier=verifier, stop=int(stop)))
        assert same(out.tokens, [cut(row, stop) for row in expected.tokens])


@pytest.mark.parametrize("verifier", ["token", pytest.param("block", marks=pytest.mark.slow)])
def test_a_row_alone_is_what_it_is_in_a_batch(model, verifier):
    options = dict(max_new_tokens=NEW, temperature=0.8, verifier=verifier)
    batch = generate(model, PROMPTS, seed=5, **options)
    for b in (0, 2):
        alone = generate(model, PROMPTS[b : b + 1], seed=5, row=b, **options)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[b])


def test_rows_of_neighbouring_seeds_share_no_text(model):
    batches = (generate(model, [PROMPTS[0]] * 8, max_new_tokens=NEW, temperature=1.5, seed=seed) for seed in range(3))
    assert len({tuple(row) for batch in batches for row in batch.tokens}) == 24


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_verifiers_that_compare_probabilities_are_greedy_at_temperature_0(model, greedy, verifier):
    out = finish(ask(model, verifier=verifier))
    np.testing.assert_array_equal(out.tokens, greedy)
    np.testing.assert_array_equal(out.accepted, finish(ask(model)).accepted)


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}, {"laws": LAWS, "k": 0}], ids=["greedy", "coupled", "plain"])
def test_logprobs_are_those_of_full_forwards(model, models, options):
    out = finish(ask(model, **options))
    rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, out.tokens, strict=True)]
    tokens_BT = tiny.shard(np.array([row + [0] * (32 - len(row)) for row in rows], np.int32))
    logp_BTV = np.asarray(full_log_probs(models.stacked, tokens_BT))
    for prompt, row, logp_TV, got in zip(PROMPTS, rows, logp_BTV, out.logprobs, strict=True):
        positions = np.arange(len(prompt), len(row))
        np.testing.assert_allclose(got, logp_TV[positions - 1, row[len(prompt) :]], atol=1e-4)
    assert out.finite.all()


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}, {"laws": LAWS, "verifier": "block"}, {"k": 0}], ids=str)
def test_a_row_that_is_not_finite_ends_with_a_flag_and_leaves_the_others_alone(model, options):
    """The keys of row 1 are not numbers any more after prefill."""
    decoding = ask(model, **options)
    expected = finish(decoding)
    decoding.prefill()
    row_B = np.arange(4)[:, None, None, None] == 1
    cache = jax.tree.map(lambda a: jax.device_put(np.where(row_B, np.nan, a), a.sharding), decoding.state.cache)
    decoding.state = dataclasses.replace(decoding.state, cache=cache)
    decoding.advance()
    out = decoding.result()
    assert out.finite.tolist() == [True, False, True, True] and expected.finite.all()
    assert out.tokens[1][0] == expected.tokens[1][0] and 0 <= out.tokens[1][1] < VOCAB
    assert len(out.tokens[1]) == 2 and np.isnan(out.logprobs[1]).tolist() == [False, True]
    for b in (0, 2, 3):
        np.testing.assert_array_equal(out.tokens[b], expected.tokens[b])
        np.testing.assert_array_equal(out.logprobs[b], expected.logprobs[b])


def test_a_prompt_that_is_not_finite_gives_one_token_and_a_flag(model):
    broken = jax.tree.map(lambda a: a, model)
    values = np.array(model.embed_VD[...])
    values[29] = np.nan
    broken.embed_VD[...] = jax.device_put(values, model.embed_VD[...].sharding)
    out = finish(ask(broken, [PROMPTS[0], [4, 29, 6], *PROMPTS[2:]]))
    assert len(out.tokens[1]) == 1 and not out.finite[1] and np.isnan(out.logprobs[1][0])
    assert all(0 <= token < VOCAB for row in out.tokens for token in row)
