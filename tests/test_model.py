"""The trunk: who sees whom, the rotary angles, the cache, and the ways of computing one model that must agree."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.config import RopeScaling
from mtp_jax.model import attention, rotary, transformer
from mtp_jax.model import cache as cache_module
from mtp_jax.model.cache import init_cache, write
from mtp_jax.model.transformer import LanguageModel, unstack
from mtp_jax.sharding import BATCH, RULES
from mtp_jax.train.step import build_model, split

TIME = 12
SEGMENTS = np.array([0] * 5 + [1] * 4 + [2] * 3)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with tiny.mesh() as mesh:
        yield mesh


def place(array, spec):
    return jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), spec))


def random_params(config, seed=0):
    """The structure of a config's model, and parameters that are noise: biases, gates and norms matter too."""
    graph, shapes = split(jax.eval_shape(lambda: build_model(config, jax.random.key(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        value = 1 + 0.2 * noise if path[-1].key == "scale" else 0.3 * noise
        return place(value, leaf.sharding.spec)

    return graph, jax.tree_util.tree_map_with_path(draw, shapes)


def make_model(seed=0, **changes):
    """A model of noise. Tied embeddings and the other changes are of the model's config."""
    head = tiny.head_config(factors="shared" if changes.get("tie_embeddings") else "full")
    return nnx.merge(*random_params(tiny.train_config(tiny.model_config(**changes), head), seed))


def make_tokens(batch=1, time=TIME, seed=0):
    tokens = np.random.default_rng(seed).integers(0, tiny.VOCAB, (batch, time))
    return tiny.shard(tokens.astype(np.int32))


forward = jax.jit(lambda model, *args: model(*args))


def hidden(model, *args):
    return np.asarray(forward(model, *args))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def hidden_alone(model):
    """The hidden states of one document."""
    return hidden(model, make_tokens())


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


# Attention


def numpy_attention(q, k, v, mask):
    """Grouped-query attention by loops, in float64: query head n reads key head n // (N / K)."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        seen = np.flatnonzero(mask[b, 0, t])
        score = k[b, seen, head].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        out[b, t, n] = weight @ v[b, seen, head] / weight.sum()
    return out


@pytest.mark.parametrize("heads, groups", [(4, 2), (4, 4), (4, 1)])
def test_attention_is_the_definition(heads, groups):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, t, n, 8)).astype(np.float32) for t, n in ((5, heads), (7, groups), (7, groups)))
    mask = rng.random((2, 1, 5, 7)) < 0.5
    mask[..., 0] = True
    expected = numpy_attention(q, k, v, mask)
    sharded = [*(place(a, RULES.qkv_BTNH) for a in (q, k, v)), place(mask, P(BATCH, None, None, None))]
    np.testing.assert_allclose(jax.jit(attention.attend)(*sharded), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(attention.reference_attend(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)
    cached = [sharded[0], *(place(a.swapaxes(1, 2), RULES.cache_BKSH) for a in (k, v)), sharded[3]]
    np.testing.assert_allclose(jax.jit(attention.attend_cached)(*cached), expected, rtol=1e-4, atol=1e-5)


# Rotary embeddings


def turned(x, positions, angles):
    """The pairs (i, i + H/2) as complex numbers, turned by position times angle, in float64."""
    a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
    z = (a + 1j * b) * np.exp(1j * positions[:, :, None, None] * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def rotate(config, x, positions):
    return np.asarray(rotary.rotate(jnp.asarray(x), rotary.rotary(config, jnp.asarray(positions))))


def llama3_angles(angles, scaling):
    """`_compute_llama3_parameters` of transformers, by wavelengths and case by case."""
    low_wavelength = scaling.original_context_length / scaling.low_freq_factor
    high_wavelength = scaling.original_context_length / scaling.high_freq_factor
    out = []
    for angle in angles:
        wavelength = 2 * np.pi / angle
        if wavelength < high_wavelength:
            out.append(angle)
        elif wavelength > low_wavelength:
            out.append(angle / scaling.factor)
        else:
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (scaling.original_context_length / wavelength - scaling.low_freq_factor) / span
            out.append((1 - smooth) * angle / scaling.factor + smooth * angle)
    return np.array(out)


@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=8.0), RopeScaling(32.0, 1.5, 5.0, 64)])
def test_rotary_embeddings_turn_complex_numbers(scaling):
    changes = {} if scaling is None else {"rope_scaling": scaling}
    config = tiny.model_config(head_dim=128, rope_theta=500_000.0, **changes)
    angles = 500_000.0 ** (-np.arange(64) / 64)
    if scaling is not None:
        plain, angles = angles, llama3_angles(angles, scaling)
        ratio = plain / angles
        kept, stretched = np.isclose(ratio, 1), np.isclose(ratio, scaling.factor)
        assert kept.any() and stretched.any() and not (kept | stretched).all()
    np.testing.assert_allclose(rotary.frequencies(config), angles, rtol=1e-6)
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 128)).astype(np.float32), rng.integers(0, 1000, (2, 5))
    np.testing.assert_allclose(rotate(config, x, positions), turned(x, positions, angles), atol=2e-3)
    np.testing.assert_allclose(rotate(config, x, positions % 16), turned(x, positions % 16, angles), atol=2e-5)


def test_products_of_turned_vectors_know_distances_only():
    config, rng = tiny.model_config(head_dim=16), np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 6, 4, 16)).astype(np.float32)
    m, n = rng.integers(0, 50, (2, 1, 6))

    def products(shift):
        return np.sum(rotate(config, q, m + shift) * rotate(config, k, n + shift), axis=-1)

    np.testing.assert_allclose(products(0), products(70), atol=1e-4)
    np.testing.assert_allclose(rotate(config, q, 0 * m), q, atol=1e-6)
    assert np.abs(products(0) - np.sum(q * k, axis=-1)).max() > 0.5


# The whole trunk


class Trunk:
    """The trunk by its definition, in float64. A fault replaces some of the methods."""

    def __init__(self, config, params):
        self.config, self.params = config, jax.tree.map(lambda w: np.asarray(w, np.float64), params)

    def __call__(self, tokens_BT, segments_BT):
        return self.norm(self.stream(tokens_BT, segments_BT), self.params["norm"]["scale"])

    def stream(self, tokens_BT, segments_BT):
        table_VD = self.params["head"]["unembed_VD"] if self.config.tie_embeddings else self.params["embed_VD"]
        x_BTD, mask_B1TS = table_VD[tokens_BT], self.mask(segments_BT)
        for i in range(self.config.num_layers):
            x_BTD = self.layer(jax.tree.map(lambda w, i=i: w[i], self.params["blocks"]), x_BTD, mask_B1TS)
        return x_BTD

    def mask(self, segments_BT):
        same_BTS = segments_BT[:, :, None] == segments_BT[:, None]
        return (same_BTS & np.tri(segments_BT.shape[1], dtype=bool))[:, None]

    def layer(self, w, x_BTD, mask_B1TS):
        x_BTD = x_BTD + self.attention(w, x_BTD, mask_B1TS)
        return x_BTD + self.feed_forward(w, x_BTD)

    def attention(self, w, x_BTD, mask_B1TS):
        x_BTD, w = self.norm(x_BTD, w["attention_norm"]["scale"]), w["attention"]
        q, k, v = (self.project(w, x_BTD, name, heads) for name, heads in ("qN", "kK", "vK"))
        q, k = (self.place(x, w.get(name, {}).get("scale")) for name, x in (("q_norm", q), ("k_norm", k)))
        return np.tensordot(self.attend(q, k, v, mask_B1TS), w["wo_NHD"], 2)

    def project(self, w, x_BTD, name, heads):
        bias = w[f"b{name}_{heads}H"] if self.config.qkv_bias else 0
        return np.tensordot(x_BTD, w[f"w{name}_D{heads}H"], 1) + bias

    def place(self, x_BTNH, scale):
        return self.turn(self.norm(x_BTNH, scale) if self.config.qk_norm else x_BTNH)

    def turn(self, x_BTNH):
        return turned(x_BTNH, np.arange(x_BTNH.shape[1])[None], self.angles())

    def angles(self):
        half = self.config.head_width // 2
        return llama3_angles(self.config.rope_theta ** (-np.arange(half) / half), self.config.rope_scaling)

    def attend(self, q_BTNH, k_BTKH, v_BTKH, mask_B1TS):
        return numpy_attention(q_BTNH, k_BTKH, v_BTKH, mask_B1TS)

    def feed_forward(self, w, x_BTD):
        x_BTD, w = self.norm(x_BTD, w["feed_forward_norm"]["scale"]), w["feed_forward"]
        return self.gated(x_BTD @ w["w_gate_DF"], x_BTD @ w["w_up_DF"]) @ w["w_down_FD"]

    def gated(self, gate, up):
        return gate / (1 + np.exp(-gate)) * up

    def norm(self, x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config.norm_eps) * scale


# Of the 8 angles with everything on, some are kept, some stretched, and some lie between.
SCALED_ROPE = dict(head_dim=16, rope_theta=100.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
TRUNKS = {
    "everything_off": {},
    "everything_on": dict(qkv_bias=True, qk_norm=True, tie_embeddings=True, norm_eps=0.01, **SCALED_ROPE),
}
PLAIN_ANGLES = 100.0 ** (-np.arange(8) / 8)
NEIGHBOURS = np.arange(16).reshape(8, 2).T.ravel()
WRONG_TRUNKS = {
    "mean_subtracted": dict(norm=lambda self, x, scale: Trunk.norm(self, x - x.mean(-1, keepdims=True), scale)),
    "eps_outside_the_root": dict(
        norm=lambda _, x, scale: x / (np.sqrt(np.mean(x**2, -1, keepdims=True)) + 0.01) * scale
    ),
    "one_added_to_the_scale": dict(norm=lambda self, x, scale: Trunk.norm(self, x, 1 + scale)),
    "silu_on_the_other_branch": dict(gated=lambda self, gate, up: Trunk.gated(self, up, gate)),
    "sigmoid_for_silu": dict(gated=lambda _, gate, up: up / (1 + np.exp(-gate))),
    "no_bias": dict(project=lambda _, w, x, name, heads: np.tensordot(x, w[f"w{name}_D{heads}H"], 1)),
    "no_qk_norm": dict(place=lambda self, x, scale: self.turn(x)),
    "qk_norm_after_rope": dict(place=lambda self, x, scale: self.norm(self.turn(x), scale)),
    "no_rope": dict(turn=lambda _, x: x),
    "rope_on_neighbours": dict(turn=lambda self, x: Trunk.turn(self, x[..., NEIGHBOURS])),
    "rope_not_scaled": dict(angles=lambda _: PLAIN_ANGLES),
    "rope_scaled_everywhere": dict(angles=lambda _: PLAIN_ANGLES / 8),
    "key_heads_dealt_in_turn": dict(
        attend=lambda _, q, k, v, mask: numpy_attention(q, np.tile(k, (1, 1, 2, 1)), np.tile(v, (1, 1, 2, 1)), mask)
    ),
    "scores_not_scaled": dict(attend=lambda _, q, k, v, mask: numpy_attention(4 * q, k, v, mask)),
    "not_causal": dict(mask=lambda _, segments: (segments[:, :, None] == segments[:, None])[:, None]),
    "not_packed": dict(mask=lambda self, segments: Trunk.mask(self, 0 * segments)),
    "branches_in_parallel": dict(
        layer=lambda self, w, x, mask: x + self.attention(w, x, mask) + self.feed_forward(w, x)
    ),
    "norm_on_the_residual": dict(
        layer=lambda self, w, x, mask: Trunk.layer(self, w, self.norm(x, w["attention_norm"]["scale"]), mask)
    ),
    "norms_of_a_layer_swapped": dict(
        layer=lambda self, w, x, mask: Trunk.layer(
            self, {**w, "attention_norm": w["feed_forward_norm"], "feed_forward_norm": w["attention_norm"]}, x, mask
        )
    ),
    "no_final_norm": dict(__call__=Trunk.stream),
}


@pytest.fixture(scope="module")
def trunks():
    """By name: the config, the parameters, the inputs, and the model's hidden states in float32."""
    segments = np.stack([SEGMENTS, SEGMENTS[::-1]]).astype(np.int32)
    inputs = make_tokens(2, seed=5), tiny.shard(segments)
    made = {}
    for name, changes in TRUNKS.items():
        config = tiny.train_config(tiny.model_config(**changes), tiny.head_config(factors="shared"))
        graph, params = random_params(config)
        made[name] = config.model, params, inputs, hidden(nnx.merge(graph, params), *inputs)
    return made


def distance(trunks, name, kind=Trunk):
    """The largest difference of the model from the definition, relative to the scale of the output."""
    config, params, inputs, x_BTD = trunks[name]
    expected_BTD = kind(config, params)(*map(np.asarray, inputs))
    return np.abs(x_BTD - expected_BTD).max() / np.abs(expected_BTD).max()


@pytest.mark.parametrize("name", TRUNKS)
def test_the_trunk_is_the_definition(name, trunks):
    assert distance(trunks, name) < 2e-5


@pytest.mark.parametrize("fault", WRONG_TRUNKS)
def test_a_wrong_trunk_is_noticed(fault, trunks):
    assert distance(trunks, "everything_on", type(fault, (Trunk,), WRONG_TRUNKS[fault])) > 2e-3


@pytest.mark.parametrize("name", TRUNKS)
def test_bfloat16_computes_what_float32_does_within_four_percent(name, trunks):
    config, params, inputs, expected_BTD = trunks[name]
    config = dataclasses.replace(config, dtype="bfloat16")
    graph, _ = random_params(tiny.train_config(config, tiny.head_config(factors="shared")))
    x_BTD = hidden(nnx.merge(graph, params), *inputs)
    assert x_BTD.dtype == jnp.bfloat16
    error = np.abs(x_BTD.astype(np.float32) - expected_BTD).max() / np.abs(expected_BTD).max()
    assert 1e-3 < error < 0.04  # and so it is finite


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
    assert len(scan.outvars) - scan.params["num_carry"] == KEPT[remat]
    if remat == "none":
        # Seven weights and the two products of attention, each with two in the backward pass.
        assert gradient.lower(params).compile().as_text().count(" dot(") == 3 * 9


def test_layers_in_a_list_compute_what_scanned_layers_do(model, hidden_alone):
    unrolled = unstack(model)
    assert len(unrolled.blocks) == model.config.num_layers
    np.testing.assert_allclose(hidden(unrolled, make_tokens()), hidden_alone, rtol=1e-5, atol=1e-6)
    assert isinstance(model.blocks, transformer.Block), "the model that was given is not changed"
    # The layers are in order: reversed, they compute something else.
    unrolled.blocks = nnx.List(list(unrolled.blocks)[::-1])
    assert np.abs(hidden(unrolled, make_tokens()) - hidden_alone).max() > 0.1


# The cache

SLOTS, ROWS = 32, 4
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
    logp_BTV = jax.jit(lambda m, x: m.head.target_log_probs(x))(model, x_BTD)
    return np.asarray(tokens), np.asarray(x_BTD), np.asarray(logp_BTV)


def assert_cache_agrees(model, rows):
    """Feed ragged rows in uneven chunks, rejected tokens among them, into a cache that is full of garbage."""
    tokens, *expected = rows
    model = unstack(model)

    def extend(model, *args, slots):
        x_BTD, cache = model.extend(*args, slots)
        return (x_BTD, model.head.target_log_probs(x_BTD)), cache

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


# Variants


def names(tree):
    return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


VARIANTS = {
    "plain": ({}, set()),
    "qkv_bias": ({"qkv_bias": True}, {f"blocks.attention.{n}" for n in ("bq_NH", "bk_KH", "bv_KH")}),
    "qk_norm": ({"qk_norm": True}, {"blocks.attention.q_norm.scale", "blocks.attention.k_norm.scale"}),
}


def param_names(**changes):
    head = tiny.head_config(factors="shared")
    return names(random_params(tiny.train_config(tiny.model_config(**changes), head))[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_adds_its_parameters_and_no_others(name):
    changes, added = VARIANTS[name]
    params = param_names(**changes)
    assert set(params) - set(param_names()) == added
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    assert all(leaf.shape[0] == 2 for path, leaf in params.items() if path.startswith("blocks."))


def test_tied_embeddings_are_the_heads_table():
    assert set(param_names()) - set(param_names(tie_embeddings=True)) == {"embed_VD"}
    model = make_model(tie_embeddings=True)
    tokens = make_tokens()
    embedded = jax.jit(lambda m, t: m.embed(t))(model, tokens)
    np.testing.assert_array_equal(embedded, np.asarray(model.head.unembed_VD[...])[np.asarray(tokens)])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 1, "num_kv_heads": 1},
        {"num_kv_heads": 1},
        {"num_layers": 1},
        {"d_model": 1, "head_dim": 2},
        {"d_ff": 1},
        {"vocab_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("factors", ["full", "shared", "lowrank", "lora"])
def test_sizes_of_one_can_be_traced_in_training_and_in_decoding(changes, factors):
    head = tiny.head_config(factors=factors, **({"window": 1, "rank": 1} if "d_ff" in changes else {}))
    graph, params = random_params(tiny.train_config(tiny.model_config(**changes), head))

    def decode(params, tokens_BT):
        model = unstack(nnx.merge(graph, params))
        x_BTD, _ = model.extend(tokens_BT, init_cache(model.config, ROWS, 8), tokens_BT[:, 0], 4)
        return model.head.next_log_probs(model.head.draft_state(x_BTD[:, -1]))

    vocab = changes.get("vocab_size", tiny.VOCAB)
    tokens = make_tokens(ROWS)
    x_BTD = jax.eval_shape(lambda params, tokens: nnx.merge(graph, params)(tokens), params, tokens)
    assert x_BTD.shape == (ROWS, TIME, changes.get("d_model", 16))
    assert jax.eval_shape(decode, params, tokens[:, :2]).shape == (ROWS, vocab)


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"num_kv_heads": 1}, (2, 16, 1, 4)),
        ({"num_kv_heads": 4}, (2, 16, 4, 4)),
        ({"num_kv_heads": 2, "head_dim": 6, "num_layers": 3}, (3, 16, 2, 6)),
    ],
)
def test_grouped_heads_share_keys(changes, shape):
    params = param_names(**changes)
    assert params["blocks.attention.wk_DKH"].shape == params["blocks.attention.wv_DKH"].shape == shape
    assert params["blocks.attention.wq_DNH"].shape == (*shape[:2], 4, shape[3])
    assert params["blocks.attention.wo_NHD"].shape == (shape[0], 4, shape[3], 16)


def test_every_parameter_of_a_model_with_everything_is_used():
    """A gradient that is zero is a parameter that nobody reads."""
    head = tiny.head_config(factors="lowrank", target="ntp")
    config = tiny.train_config(tiny.model_config(qkv_bias=True, qk_norm=True), head, batch=2, seq_len=8)
    graph, params = random_params(config)
    batch = tiny.make_batch(config)

    def loss(params, batch):
        model = nnx.merge(graph, params)
        weights_BTW = batch["valid_BTW"] / 16.0
        return model.head.loss(model(batch["tokens_BT"], batch["segments_BT"]), batch["targets_BTW"], weights_BTW)[0]

    for path, grad in names(jax.jit(jax.grad(loss))(params, batch)).items():
        flat = np.asarray(grad).reshape(2, -1) if path.startswith("blocks.") else np.asarray(grad).reshape(1, -1)
        assert np.all(np.abs(flat).max(axis=1) > 1e-5), path


def test_the_compute_dtype_is_the_configs_and_parameters_stay_float32():
    config = tiny.train_config(tiny.model_config(dtype="bfloat16"))
    graph, params = random_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    model = nnx.merge(graph, params)
    x = jax.eval_shape(lambda m, t: m(t), model, make_tokens())
    assert x.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda m, x: m.head.target_log_probs(x), model, x).dtype == jnp.float32


def test_every_weight_starts_at_the_scale_of_its_inputs(monkeypatch):
    """With ones in place of the noise, a weight shows its standard deviation."""
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, out_sharding: jnp.ones(shape, out_sharding=out_sharding)
    )
    head = tiny.head_config(factors="lowrank", target="ntp", init_noise=0.25)
    model = build_model(tiny.train_config(tiny.model_config(num_layers=3, head_dim=6), head), jax.random.key(0))
    # D = 16, F = 32, N x H = 24. Branches that end in the residual stream are divided by sqrt(2 L).
    expected = {
        "embed_VD": 16**-0.5,
        "blocks.attention.wq_DNH": 16**-0.5,
        "blocks.attention.wk_DKH": 16**-0.5,
        "blocks.attention.wv_DKH": 16**-0.5,
        "blocks.attention.wo_NHD": 24**-0.5 * 6**-0.5,
        "blocks.feed_forward.w_gate_DF": 16**-0.5,
        "blocks.feed_forward.w_up_DF": 16**-0.5,
        "blocks.feed_forward.w_down_FD": 32**-0.5 * 6**-0.5,
        "blocks.attention_norm.scale": 1,
        "blocks.feed_forward_norm.scale": 1,
        "norm.scale": 1,
        "head.gate_DR": 0,
        "head.unembed_VD": 16**-0.5,
        "head.factors.map_DWD": 16**-0.5,
        "head.factors.down_DRWE": 0.25 * 16**-0.5,
        "head.factors.up_ED": 8**-0.5,
    }
    params = names(split(model)[1])
    assert set(params) == set(expected)
    for path, std in expected.items():
        np.testing.assert_allclose(params[path], std, rtol=1e-6, err_msg=path)
    lora = build_model(tiny.train_config(head=tiny.head_config(factors="lora", init_noise=0.25)), jax.random.key(0))
    factors = names(split(lora)[1]["head"]["factors"])
    for name, std in {"u_DWV": 16**-0.5, "down_DRWE": 0.25 * 16**-0.5, "up_EV": 8**-0.5}.items():
        np.testing.assert_allclose(factors[name], std, rtol=1e-6, err_msg=name)


def test_no_two_weights_are_drawn_from_one_key(monkeypatch):
    """With one number of its key in place of the noise, every weight of every layer shows another one."""

    def fill(key, shape, out_sharding):
        return jnp.ones(shape, out_sharding=out_sharding) * jax.random.uniform(key)

    head = tiny.head_config(factors="lowrank", target="ntp")
    config = tiny.train_config(tiny.model_config(), head)
    drawn = []
    for draw in (fill, lambda key, shape, out_sharding: jnp.ones(shape, out_sharding=out_sharding)):
        monkeypatch.setattr(jax.random, "normal", draw)
        params = names(split(build_model(config, jax.random.key(0)))[1])
        drawn.append({path: np.asarray(leaf) for path, leaf in params.items() if path[-6:] not in (".scale", "ate_DR")})
    numbers = [number for path, std in drawn[1].items() for number in np.unique(np.round(drawn[0][path] / std, 5))]
    layers = sum(2 if path.startswith("blocks.") else 1 for path in drawn[0])
    assert len(numbers) == len(np.unique(numbers)) == layers
