"""Decoding in bfloat16: products of different widths round differently, so outputs are compared at one width."""

import dataclasses

import jax
import numpy as np
import pytest

from mtp_jax.decode import loop
from mtp_jax.decode.decoder import for_decoding
from support import tiny
from support.decoding import NEW, PROMPTS, VOCAB, WINDOW, ask, drive, faulty_loop, finish, full_log_probs, prefilled


@pytest.mark.parametrize("k", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, WINDOW - 1)), WINDOW - 1])
def test_bfloat16_takes_tokens_that_are_nearly_the_best_in_float32(models, narrow, k):
    with tiny.mesh():
        assert {a.dtype for a in jax.tree.leaves(narrow.trunk.blocks[0].feed_forward)} == {jax.numpy.dtype("bfloat16")}
        out = finish(ask(narrow, k=k))
        assert [len(row) for row in out.tokens] == [NEW] * 4
        assert set(np.ravel(out.tokens)) <= set(range(VOCAB))
        rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, out.tokens, strict=True)]
        tokens_BT = np.array([row + [0] * (32 - len(row)) for row in rows], np.int32)
        logp_BTV = np.asarray(full_log_probs(models.stacked, tiny.shard(tokens_BT)))
    for prompt, row, logp_TV in zip(PROMPTS, rows, logp_BTV, strict=True):
        for position in range(len(prompt), len(row)):
            assert logp_TV[position - 1, row[position]] > logp_TV[position - 1].max() - 0.05


@pytest.mark.parametrize("k", range(1, WINDOW))
def test_whatever_is_drafted_bfloat16_output_is_the_same_at_one_width(narrow, k):
    with tiny.mesh():
        decoding, rng = ask(narrow, k=k), np.random.default_rng(0)
        expected = finish(decoding)

        def right(count_B):
            rows = zip(expected.tokens, count_B, strict=True)
            return np.stack([np.append(row, [0] * k)[count : count + k] for row, count in rows])

        perfect = drive(decoding, right)
        garbage = drive(decoding, lambda count_B: rng.integers(0, VOCAB, (4, k)))
        useless = drive(decoding, lambda count_B: (right(count_B) + 1) % VOCAB)
    for out in perfect, garbage, useless:
        np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert perfect.forwards.tolist() == [-(-(NEW - 1) // (k + 1))] * 4
    assert perfect.forwards.sum() < expected.forwards.sum() < useless.forwards.sum() == 4 * (NEW - 1)


def test_a_bfloat16_loop_that_is_compiled_to_draft_garbage_gives_the_same_output(narrow, monkeypatch):
    def garbage(plan, head, state, drafting, sampling):
        draft_Bk = (5 * state.length_B[:, None] + 7 * jax.numpy.arange(plan.k)[None]) % VOCAB
        return dataclasses.replace(draft(plan, head, state, drafting, sampling), draft_Bk=draft_Bk)

    with tiny.mesh():
        decoding = ask(narrow)
        expected = finish(decoding)
        draft = loop.draft
        monkeypatch.setattr(loop, "draft", garbage)
        out = faulty_loop()(decoding)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert out.forwards.sum() > expected.forwards.sum()


@pytest.mark.parametrize("tied", [False, True])
def test_to_embed_a_token_no_table_is_converted(tied):
    """A copy of the table in float32, made each time the loop is entered, would be what a stream waits for."""
    size = 20_000
    model = tiny.model_config(vocab_size=size, dtype="bfloat16", tie_embeddings=tied)
    with tiny.mesh():
        head = tiny.head_config(factors="lowrank", target="ntp")
        decoder = for_decoding(tiny.make_model(tiny.train_config(model, head)))
        d = ask(decoder, [[1, 2]], k=0)
        compiled = loop.run.lower(d.plan, decoder, prefilled(d), d.sampling, d.stops_n, np.int32(1)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * size * model.d_model
