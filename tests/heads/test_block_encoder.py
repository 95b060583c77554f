"""The encoder `block`: how it begins, that its cache gives what whole rows give, that documents are apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.state import split
from support import tiny
from support.heads import wake

BLOCK = dict(rank=2, factors="shared", target="ntp", encoder="block", encoder_layers=2, taps=(1,))
BATCH, TIME = 2, 9


def make(fresh=False, **changes):
    model = tiny.make_model(tiny.train_config(head=tiny.head_config(**{**BLOCK, **changes})), seed=1)
    return model if fresh else wake(model)


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, tiny.VOCAB, (2, BATCH, TIME)).astype(np.int32)


@pytest.fixture(scope="module")
def model(mesh):
    return make()


@jax.jit
def encode(model, tokens_BT, next_BT, segments_BT):
    return model.head.encoder.encode(model.see(tokens_BT, segments_BT), next_BT)


def test_it_begins_as_the_last_hidden_state_alone(mesh):
    model, (tokens_BT, next_BT) = make(fresh=True), tokens()
    found = encode(model, tokens_BT, next_BT, np.zeros_like(tokens_BT))
    np.testing.assert_allclose(found, model.see(tokens_BT).x_BTD, atol=1e-6)


def test_a_position_reads_what_stands_before_it_in_its_document_and_nothing_else(model):
    (tokens_BT, next_BT), (others_BT, _) = tokens(), tokens(1)
    segments_BT = np.broadcast_to((np.arange(TIME) >= 4).astype(np.int32), (BATCH, TIME))
    mixed = lambda place: np.where(place, others_BT, next_BT)  # noqa: E731
    own = encode(model, tokens_BT, next_BT, segments_BT)
    for changed, same in ((np.arange(TIME) < 4, slice(4, None)), (np.arange(TIME) > 6, slice(None, 7))):
        other = encode(model, tokens_BT, mixed(changed), segments_BT)
        np.testing.assert_allclose(own[:, same], other[:, same], atol=1e-6)
        assert np.abs(own - other).max() > 1e-2
    before = encode(model, tokens_BT, mixed(np.arange(TIME) == 4), segments_BT)
    assert np.abs(own - before)[:, 6].max() > 1e-3, "it attends"


def through_cache(model, seen, next_BT):
    """What parts of 4, 3 and 2 positions give, and each position again from the cache that they leave."""
    encoder = model.head.encoder
    cache, parts, start = encoder.init_cache(BATCH, TIME), [], 0
    for size in (4, 3, 2):
        part = jax.tree.map(lambda a, s=start, n=size: a[:, s : s + n], (seen.x_BTD, seen.tokens_BT, seen.taps))
        here = model.seen(*part)
        cache, found = encoder.extend(cache, here, next_BT[:, start : start + size], 0 * next_BT[:, 0] + start)
        parts, start = [*parts, found], start + size
    again = []
    for t in range(TIME):
        at_B = 0 * next_BT[:, 0] + t
        again.append(encoder.again(cache, seen.at(at_B), next_BT[:, t], at_B))
    return jnp.concatenate(parts, axis=1), jnp.concatenate(again, axis=1)


def test_its_cache_gives_what_whole_rows_give_up_to_its_last_slot(model):
    tokens_BT, next_BT = tokens()
    want = encode(model, tokens_BT, next_BT, np.zeros_like(tokens_BT))
    seen = jax.jit(lambda model, tokens_BT: (lambda s: (s.x_BTD, s.tokens_BT, s.taps))(model.see(tokens_BT)))
    extended, again = jax.jit(lambda model, parts, next_BT: through_cache(model, model.seen(*parts), next_BT))(
        model, seen(model, tokens_BT), tiny.shard(next_BT)
    )
    np.testing.assert_allclose(extended, want, atol=2e-5)
    np.testing.assert_allclose(again, want, atol=2e-5)


@pytest.mark.slow
def test_eight_devices_have_the_loss_and_the_gradient_of_one():
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with tiny.mesh(*shape):
            model = make(shortlist=16)
            batch = tiny.make_batch(tiny.train_config(head=model.head.config))
            weights_BTW = batch["valid_BTW"].astype(jnp.float32) / 64
            loss = lambda model, *rest: model.loss(*rest)[0]  # noqa: E731
            value, grads = jax.jit(jax.value_and_grad(loss, allow_int=True))(model, batch, weights_BTW)
            kept = jax.tree.map(lambda a: np.asarray(a) if a.dtype == np.float32 else 0, (value, split(grads)[1]))
            found.append(kept)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1e-3, np.abs(b).max())), *found)
