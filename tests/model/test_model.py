"""The trunk: who sees whom, and the ways of computing one model that must agree."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.decode.decoder import for_decoding
from mtp_jax.language_model import LanguageModel
from mtp_jax.model import transformer
from mtp_jax.model.cache import init_cache
from support import tiny
from support.noise import SEGMENTS, TIME, hidden, make_model, make_tokens, random_params

pytestmark = pytest.mark.usefixtures("mesh")


# Who sees whom


@pytest.fixture(scope="module")
def shallow():
    """One layer: what it sees, it sees directly."""
    return make_model(num_layers=1)


def sees(model, wrong_mask=None):
    """`[T, S]`: whether the hidden state at t depends at all on the embedding at s, by the gradient."""
    rng, width = np.random.default_rng(1), model.config.d_model
    # Row b of the batch is the same sequence, and its output counts at position b only.
    x_BTD = np.broadcast_to(rng.normal(size=(1, TIME, width)), (TIME, TIME, width)).astype(np.float32)
    readout_BTD = (np.eye(TIME)[:, :, None] * rng.normal(size=width)).astype(np.float32)
    segments_BT = np.broadcast_to(SEGMENTS, (TIME, TIME)).astype(np.int32)

    def output(x_BTD, segments_BT):
        mask = wrong_mask or transformer.causal_mask
        embed = mock.patch.object(LanguageModel, "embed", lambda *_: x_BTD)
        with embed, mock.patch.object(transformer, "causal_mask", mask):
            return jnp.sum(model(jnp.zeros_like(segments_BT), segments_BT) * readout_BTD)

    gradient_BTD = jax.jit(jax.grad(output))(tiny.shard(x_BTD), tiny.shard(segments_BT))
    return np.any(np.asarray(gradient_BTD) != 0, axis=-1)


OWN_PAST = (SEGMENTS[:, None] == SEGMENTS[None]) & np.tri(TIME, dtype=bool)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_position_depends_on_the_past_of_its_document_and_on_nothing_else(layers, model, shallow):
    np.testing.assert_array_equal(sees({1: shallow, 2: model}[layers]), OWN_PAST)


WRONG_MASKS = {
    "the_next_token_too": lambda same, t, s: same & (s <= t + 1),
    "other_documents_too": lambda same, t, s: (same | True) & (s <= t),
    "only_three_back": lambda same, t, s: same & (s <= t) & (s > t - 3),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_a_wrong_mask_is_noticed(name, shallow):
    def wrong_mask(segments_BT):
        same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
        return WRONG_MASKS[name](same, *np.ogrid[:1, :1, :TIME, :TIME][2:])

    assert np.any(sees(shallow, wrong_mask) != OWN_PAST)


def test_a_packed_document_has_the_hidden_states_that_it_has_alone(model):
    tokens, segments = make_tokens(), tiny.shard(SEGMENTS[None].astype(np.int32))
    packed = hidden(model, tokens, segments)
    for document in range(3):
        # The document comes first, at another offset; what follows it is not seen. One shape, one compilation.
        at = np.flatnonzero(document == SEGMENTS)
        alone = hidden(model, tiny.shard(np.roll(tokens, -at[0], axis=1)))[:, : len(at)]
        np.testing.assert_allclose(packed[:, at], alone, rtol=1e-4, atol=1e-5)


def test_without_segments_a_row_is_one_document(model, hidden_alone):
    one = tiny.shard(np.full((1, TIME), 7, np.int32))
    np.testing.assert_allclose(hidden(model, make_tokens(), one), hidden_alone, rtol=1e-5, atol=1e-6)
    assert np.ptp(hidden_alone[0], axis=0).min() > 0.1


# Ways of computing that must agree


@pytest.fixture(scope="module")
def remat_results():
    """By policy: loss, gradients, and the matrix products that the gradient asks for."""
    results = {}
    for remat in ("none", "dots", "full"):
        config = tiny.train_config(tiny.model_config(remat=remat), batch=2, seq_len=8)
        graph, params = random_params(config)
        batch = tiny.make_batch(config)

        def loss(params, batch, graph=graph):
            x_BTD = nnx.merge(graph, params)(batch["tokens_BT"], batch["segments_BT"])
            return jnp.mean(jnp.sin(3.0 * x_BTD))

        gradient = jax.jit(jax.value_and_grad(loss))
        products = str(gradient.trace(params, batch).jaxpr).count("dot_general")
        results[remat] = (*gradient(params, batch), products)
    return results


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_neither_loss_nor_gradients(remat, remat_results):
    (loss, grads, _), (expected_loss, expected_grads, _) = remat_results[remat], remat_results["none"]
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for (path, grad), expected in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(grad, expected, atol=1e-6 * scale, err_msg=jax.tree_util.keystr(path))


def test_each_policy_recomputes_more_than_the_one_before(remat_results):
    none, dots, full = (remat_results[name][2] for name in ("none", "dots", "full"))
    assert none < dots < full


def equations(jaxpr):
    """The equations of a jaxpr and of all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# A layer's input; q, k, v, gate, up and what attention adds; the scores and what they select.
KEPT = {"none": 9, "dots": 7, "full": 1}


@pytest.mark.parametrize("remat", KEPT)
def test_a_layer_keeps_its_products_for_the_backward_pass_and_computes_none_of_those_twice(remat):
    config = tiny.train_config(tiny.model_config(remat=remat), batch=2, seq_len=8)
    graph, params = random_params(config)
    tokens = tiny.make_batch(config)["tokens_BT"]
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(tokens))))
    scan = next(e for e in equations(gradient.trace(params).jaxpr.jaxpr) if e.primitive.name == "scan")
    inner = scan.params["jaxpr"].jaxpr.outvars  # what is kept of each layer has an axis more outside
    kept = [out for out, one in zip(scan.outvars, inner, strict=True) if out.aval.ndim > one.aval.ndim]
    assert len(kept) == KEPT[remat]
    if remat == "none":
        # Seven weights and the two products of attention, each with two in the backward pass.
        assert gradient.lower(params).compile().as_text().count(" dot(") == 3 * 9


def test_layers_in_a_list_compute_what_scanned_layers_do(model, hidden_alone):
    decoder = for_decoding(model)
    extend = jax.jit(lambda decoder, *args: decoder.extend(*args)[0].x_BTD)
    args = make_tokens(), init_cache(model.config, 1, TIME), tiny.shard(np.zeros(1, np.int32))
    assert len(decoder.trunk.blocks) == model.config.num_layers
    np.testing.assert_allclose(extend(decoder, *args), hidden_alone, rtol=1e-5, atol=1e-6)
    assert isinstance(model.trunk.blocks, transformer.Block), "the model that was given is not changed"
    # The layers are in order: reversed, they compute something else.
    decoder.trunk.blocks = nnx.List(list(decoder.trunk.blocks)[::-1])
    assert np.abs(extend(decoder, *args) - hidden_alone).max() > 0.1
