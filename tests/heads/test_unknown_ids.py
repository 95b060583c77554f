"""Ids that no tokenizer has: rows of a vocabulary that are there for the mesh have no probability anywhere.

Those rows are given weights that would win everything, so that a law that forgets to rule them out is seen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.decoding import Decoding
from mtp_jax.decode.verify import VERIFIERS
from mtp_jax.heads.factors import FACTORS
from mtp_jax.state import split
from mtp_jax.validate import ConfigError
from support import tiny

KNOWN, ROWS = 15, 20
HEADS = {
    **{factors: dict(factors=factors) for factors in FACTORS},
    "independent": dict(circuit="independent", rank=1, factors="full"),
    "next-token target": dict(factors="lowrank", target="ntp"),
    "shortlist": dict(factors="shared", shortlist=8),
}


def rows_of(params, change):
    """`change(leaf, axis)` of every parameter that has an axis over the vocabulary."""

    def one(path, leaf):
        axis = next((axis for axis, size in enumerate(leaf.shape) if size == ROWS and "V" in path[-1].key[-5:]), None)
        return leaf if axis is None else change(leaf, axis)

    return jax.tree.map_with_path(one, params)


def loud(leaf, axis):
    """Rows beyond the known ones, forty times as large."""
    weight_V = np.where(np.arange(ROWS) < KNOWN, 1, 40).astype(leaf.dtype)
    return leaf * weight_V.reshape([ROWS if i == axis else 1 for i in range(leaf.ndim)])


def cut(leaf, axis):
    """The known rows alone."""
    return np.take(leaf, range(KNOWN), axis=axis)


@functools.cache
def made(name):
    """Config and parameters of a model with rows that mean nothing, and of the same model without them."""
    head = tiny.head_config(z_weight=0.1, gamma=0.8, **HEADS[name])
    padded, plain = (
        tiny.train_config(tiny.model_config(vocab_size=size, num_tokens=known, num_layers=1), head)
        for size, known in ((ROWS, KNOWN), (KNOWN, None))
    )
    with tiny.mesh():
        params = rows_of(jax.device_get(split(tiny.make_model(padded, seed=1))[1]), loud)
    return (padded, params), (plain, rows_of(params, cut))


def place(config, params):
    """The model with these parameters, on the mesh in scope."""
    graph, like = split(tiny.make_model(config))
    return nnx.merge(graph, jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), params, like))


def trained(config, params):
    """The loss of a batch of known tokens, and its gradient by name, on the host."""
    graph, weights, rest = nnx.split(place(config, params), lambda _, p: jnp.issubdtype(p.dtype, jnp.floating), ...)
    batch = tiny.make_batch(made("full")[1][0])
    weights_BTW = batch["valid_BTW"] / jnp.sum(batch["valid_BTW"], axis=(0, 1), keepdims=True)
    loss = lambda weights: nnx.merge(graph, weights, rest).loss(batch, weights_BTW)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    return float(value), jax.device_get(nnx.to_pure_dict(gradient))


WHERE = {"one device": (1, 1, 1), "a split vocabulary": (2, 2, 2)}
# Those whose logits come in another way; the slow ones are the others.
CASES = [
    pytest.param(name, WHERE[where], id=f"{name}-{where}", marks=pytest.mark.slow if alike else ())
    for name in HEADS
    for where in WHERE
    for alike in [name not in ("full", "shortlist") or (name == "full") == (where == "a split vocabulary")]
]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_loss_and_its_gradient_are_those_of_a_model_without_them(name, shape):
    padded, plain = made(name)
    with tiny.mesh():
        want, want_gradient = trained(*plain)
    with tiny.mesh(*shape):
        got, gradient = trained(*padded)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), rows_of(gradient, cut), want_gradient
    )
    beyond = rows_of(gradient, lambda leaf, axis: np.take(leaf, range(KNOWN, ROWS), axis=axis))
    parts = [
        part for part, whole in zip(*map(jax.tree.leaves, (beyond, gradient)), strict=True) if part.shape != whole.shape
    ]
    assert parts and not any(part.any() for part in parts)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("full", "shortlist") else pytest.mark.slow) for n in HEADS]
)
def test_no_law_gives_them_anything(name):
    (config, params), (plain_config, plain) = made(name)

    @jax.jit
    def laws(model, tokens_BT):
        seen = model.see(tokens_BT)
        found = [model.target(seen)[0][:, -1]]
        draft = model.head.begin(seen.at(jnp.full(8, 4)), tokens_BT[:, 0], window=tiny.WINDOW)
        for offset in range(1, tiny.WINDOW):
            found.append(model.head.next_log_probs(draft))
            draft = model.head.condition(draft, tokens_BT[:, offset])
        return jnp.stack(found), model.head.log_likelihood(seen, jnp.zeros((8, 5, tiny.WINDOW), jnp.int32))

    with tiny.mesh():
        tokens_BT = tiny.shard(np.random.default_rng(0).choice([0, 1, 3, 7], (8, 5)).astype(np.int32))
        got, likelihood = jax.device_get(laws(place(config, params), tokens_BT))
        want, want_likelihood = jax.device_get(laws(place(plain_config, plain), tokens_BT))
    assert (np.exp(got[..., KNOWN:]) == 0).all() and not np.isnan(got).any()
    np.testing.assert_allclose(np.exp(got[..., :KNOWN]), np.exp(want), atol=1e-6)
    np.testing.assert_allclose(likelihood, want_likelihood, atol=1e-5)


@pytest.mark.parametrize(
    "verifier", [pytest.param(v, marks=() if v == "coupled" else pytest.mark.slow) for v in VERIFIERS]
)
def test_they_are_never_sampled(verifier):
    """At a temperature at which every id that has a probability comes."""
    temperature = 0.0 if verifier == "greedy" else 20.0
    (config, params), _ = made("shared")
    with tiny.mesh():
        decoder = for_decoding(place(config, params))
        for k, top_p in ((0, 1.0), (3, 1.0), (3, 0.99)):
            asked = DecodeConfig(60, temperature=temperature, k=k, top_p=top_p, verifier=verifier)
            decoding = Decoding(decoder, [[1, 2, 3]] * 8, asked)
            decoding.advance()
            out = decoding.result()
            assert set(np.concatenate(out.tokens)) <= set(range(KNOWN)) and out.finite.all()
            assert verifier == "greedy" or len(set(np.concatenate(out.tokens))) == KNOWN


def test_a_prompt_has_none_of_them():
    (config, params), _ = made("shared")
    with tiny.mesh(), pytest.raises(ConfigError, match=r"has token ids 1\.\.15; the vocabulary is 0\.\.14"):
        Decoding(for_decoding(place(config, params)), [[1, KNOWN]], DecodeConfig(4))


def test_a_shortlist_has_none_of_them():
    head = tiny.head_config(factors="shared", shortlist=KNOWN + 1)
    config = tiny.train_config(tiny.model_config(vocab_size=ROWS, num_tokens=KNOWN), head)
    with tiny.mesh(), pytest.raises(ConfigError, match="shortlist is 16 and the vocabulary has 15 tokens"):
        tiny.make_model(config)


def test_how_many_there_are_is_the_tokenizers():
    config = tiny.train_config(tiny.model_config(vocab_size=ROWS))
    found = config.with_tokenizer(KNOWN)
    assert found.model.num_tokens == KNOWN and found.with_tokenizer(KNOWN) == found
    assert dataclasses.replace(found, model=config.model) == config
