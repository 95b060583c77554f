"""The `Decoding` object: drivers are loops over it, and it can be begun again."""

import dataclasses

import numpy as np
import pytest

from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, for_decoding
from mtp_jax.decode.decoding import Decoding
from mtp_jax.validate import ConfigError
from support.decoding import NEW, PROMPTS, WINDOW

CONFIG = DecodeConfig(NEW)


def test_it_is_done_when_every_row_is(model, greedy):
    decoding = Decoding(model, PROMPTS, dataclasses.replace(CONFIG, max_new_tokens=[1, 2, 3, NEW]))
    assert not decoding.done and [len(row) for row in decoding.result().tokens] == [1] * 4
    calls = 0
    while not decoding.done:
        decoding.advance(2)
        calls += 1
    out = decoding.result()
    assert out.forwards.max() in (2 * calls, 2 * calls - 1) and out.k == WINDOW - 1
    for row, expected, new in zip(out.tokens, greedy, [1, 2, 3, NEW], strict=True):
        np.testing.assert_array_equal(row, expected[:new])
    decoding.advance()
    np.testing.assert_array_equal(decoding.result().forwards, out.forwards)


def test_it_begins_again_with_prefill(model):
    decoding = Decoding(model, PROMPTS, CONFIG)
    decoding.advance()
    whole = decoding.result()
    decoding.prefill()
    assert not decoding.done and decoding.result().forwards.sum() == 0
    decoding.advance()
    np.testing.assert_array_equal(decoding.result().tokens, whole.tokens)


def test_results_outlive_the_state_that_they_came_from(model):
    """Its memory is given to the next forward."""
    decoding = Decoding(model, PROMPTS, CONFIG)
    decoding.advance(2)
    early = decoding.result()
    kept = [row.copy() for row in early.tokens], early.forwards.copy(), early.accepted.copy()
    decoding.advance()
    for now, before in zip((early.tokens, early.forwards, early.accepted), kept, strict=True):
        assert all(map(np.array_equal, now, before))


def test_rows_that_the_host_ends_stay_as_they_are(model, greedy):
    decoding = Decoding(model, PROMPTS, CONFIG)
    decoding.advance(1)
    ended = len(decoding.result().tokens[1])
    decoding.end(np.array([False, True, False, False]))
    assert not decoding.done
    decoding.advance()
    out = decoding.result()
    assert len(out.tokens[1]) == ended < NEW
    for b in (0, 2, 3):
        np.testing.assert_array_equal(out.tokens[b], greedy[b])
    decoding.prefill()
    decoding.end(np.ones(4, bool))
    assert decoding.done


def test_a_model_is_laid_out_once(models, model):
    assert isinstance(model, Decoder) and for_decoding(model) is model
    assert not isinstance(models.stacked, Decoder) and isinstance(for_decoding(models.stacked), Decoder)


def test_auto_is_for_those_who_choose(model):
    with pytest.raises(ConfigError, match="k is 'auto'; give a number, or call `tuned`"):
        Decoding(model, PROMPTS, dataclasses.replace(CONFIG, k="auto"))
