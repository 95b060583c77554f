"""The cache: what is decoded with it is what the full forward gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decode.decoder import for_decoding
from mtp_jax.model import attention, rotary, transformer
from mtp_jax.model import cache as cache_module
from mtp_jax.model.cache import init_cache, write
from support import tiny
from support.noise import ROWS, forward, make_tokens

pytestmark = pytest.mark.usefixtures("mesh")


SLOTS = 32
# Every chunk: its width, how many of its tokens each row keeps. What is not kept is fed again.
CHUNKS = [
    (5, [5, 3, 1, 4]),
    (5, [3, 0, 2, 1]),
    (1, [1, 1, 1, 0]),
    (5, [0, 5, 2, 5]),
    (1, [1, 1, 1, 1]),
    (5, [2, 2, 2, 2]),
]


@pytest.fixture(scope="module")
def rows(model):
    """Random rows, and their hidden states and log-probabilities by one full forward."""
    tokens = make_tokens(ROWS, 20, seed=3)
    x_BTD = forward(model, tokens)
    logp_BTV = jax.jit(lambda m, x, tokens: m.target(m.seen(x, tokens))[0])(model, x_BTD, tokens)
    return np.asarray(tokens), np.asarray(x_BTD), np.asarray(logp_BTV)


def assert_cache_agrees(model, rows):
    """Feed ragged rows in uneven chunks, rejected tokens among them, into a cache that is full of garbage."""
    tokens, *expected = rows
    model = for_decoding(model)

    def extend(model, *args, slots):
        seen, cache = model.extend(*args, slots)
        return (seen.x_BTD, model.target(seen)[0]), cache

    extend = jax.jit(extend, static_argnames="slots")
    rng = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda a: jax.device_put(1e30 * rng.normal(size=a.shape).astype(np.float32), a.sharding),
        init_cache(model.config, ROWS, SLOTS),
    )
    start = np.zeros(ROWS, np.int32)
    for width, kept in CHUNKS:
        at = start[:, None] + np.arange(width)
        chunk = np.take_along_axis(tokens, at, axis=1)
        rejected = np.arange(width) >= np.array(kept)[:, None]
        chunk = np.where(rejected, (chunk + 1) % tiny.VOCAB, chunk).astype(np.int32)
        # All that counts lies in the first 20 slots: reading 24 is reading all of them.
        slots = 24 if width == 1 else None
        outputs, cache = extend(model, tiny.shard(chunk), cache, tiny.shard(start), slots=slots)
        for output, full in zip(outputs, expected, strict=True):
            for row, count in enumerate(kept):
                new = slice(start[row], start[row] + count)
                np.testing.assert_allclose(np.asarray(output)[row, :count], full[row, new], rtol=1e-4, atol=1e-5)
        start = start + np.array(kept, np.int32)
    assert list(start) == [12, 12, 9, 13]


def test_the_cache_gives_what_the_full_forward_gives(model, rows):
    assert_cache_agrees(model, rows)


def test_the_cache_of_a_tpu_gives_what_the_full_forward_gives(model, rows, monkeypatch):
    monkeypatch.setattr(attention, "write", cache_module._selects)
    assert_cache_agrees(model, rows)


@pytest.mark.parametrize("width", [1, 4])
def test_a_tpu_writes_without_a_loop_over_rows(width):
    cache, new = np.zeros((ROWS, 2, SLOTS, 4), np.float32), np.ones((ROWS, width, 2, 4), np.float32)
    traced = jax.jit(write).trace(cache, new, np.arange(ROWS))
    found = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cuda", "cpu")}
    assert {p for p, text in found.items() if "stablehlo.select" in text and "scatter" not in text} == {"tpu"}
    assert {p for p, text in found.items() if "scatter" in text or "dynamic_update" in text} == {"cuda", "cpu"}


def slots_up_to(last_BT, slots):
    return np.arange(slots)[None, None, None] <= last_BT[:, None, :, None]


WRONG_CACHES = {
    "sees_one_slot_more": (transformer, "cache_mask", lambda at, slots: slots_up_to(at + 1, slots)),
    "does_not_see_itself": (transformer, "cache_mask", lambda at, slots: slots_up_to(at - 1, slots)),
    "counts_from_the_chunk": (transformer, "rotary", lambda c, at: rotary.rotary(c, at - at[:, :1])),
    "writes_at_the_front": (attention, "write", lambda old, new, start: write(old, new, jnp.zeros_like(start))),
    "writes_one_slot_late": (attention, "write", lambda old, new, start: write(old, new, start + 1)),
}


@pytest.mark.parametrize("name", WRONG_CACHES)
def test_a_wrong_cache_is_noticed(name, monkeypatch, model, rows):
    monkeypatch.setattr(*WRONG_CACHES[name])
    with pytest.raises(AssertionError, match="Not equal"):
        assert_cache_agrees(model, rows)
