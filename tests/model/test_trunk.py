"""Attention, the rotary angles and the whole trunk against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mtp_jax.model import attention, rotary
from mtp_jax.model.config import RopeScaling
from mtp_jax.sharding import BATCH, RULES
from support import tiny
from support.noise import SEGMENTS, hidden, make_tokens, place, random_params

pytestmark = pytest.mark.usefixtures("mesh")


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
    cached = sharded[0], tuple(place(a.swapaxes(1, 2), RULES.cache_BKSH) for a in (k, v)), sharded[3]
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
        return self.norm(self.stream(tokens_BT, segments_BT), self.params["trunk"]["norm"]["scale"])

    def stream(self, tokens_BT, segments_BT):
        table_VD = self.params["unembed_VD"] if self.config.tie_embeddings else self.params["embed_VD"]
        x_BTD, mask_B1TS = table_VD[tokens_BT], self.mask(segments_BT)
        for i in range(self.config.num_layers):
            x_BTD = self.layer(jax.tree.map(lambda w, i=i: w[i], self.params["trunk"]["blocks"]), x_BTD, mask_B1TS)
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
