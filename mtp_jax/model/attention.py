"""Grouped-query attention (arXiv 2305.13245) with optional QKV bias (Qwen2) and QK-norm (Qwen3)."""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.model.cache import LayerCache, read, write
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import RMSNorm, linear, linears
from mtp_jax.model.rotary import Rotary, rotate
from mtp_jax.parameters import init_full, init_weight
from mtp_jax.sharding import RULES, platform


def causal_mask(segments_BT: Array) -> Array:
    """`[B, 1, T, T]`: a position sees itself and what came before it in its own document."""
    time = segments_BT.shape[1]
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return same & jnp.tril(jnp.ones((time, time), bool))[None, None]


def cache_mask(positions_BT: Array, slots: int) -> Array:
    """`[B, 1, T, S]`: a query at position p sees the cache's positions 0..p."""
    return jnp.arange(slots, dtype=jnp.int32)[None, None, None, :] <= positions_BT[:, None, :, None]


def attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_B1TS: Array, implementation: Literal["xla", "cudnn"] = "xla"
) -> Array:
    """Scaled dot-product attention, `[B, T, N, H]`. Each device attends for its own rows and heads.

    `mask_B1TS` is causal. Where there is no NVIDIA GPU, XLA attends whatever `implementation` says: a run that was
    trained with cuDNN is loaded anywhere.
    """
    chosen = implementation if platform() == "gpu" else "xla"
    heads = RULES.qkv_BTNH

    @functools.partial(jax.shard_map, in_specs=(heads, heads, heads, RULES.mask_B1TS), out_specs=heads)
    def local(q: Array, k: Array, v: Array, mask: Array) -> Array:
        # cuDNN skips the blocks that it knows to be empty.
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=chosen == "cudnn", implementation=chosen)

    return local(q_BTNH, k_BSKH, v_BSKH, mask_B1TS)


def attend_cached(q_BTNH: Array, cache: LayerCache, mask_B1TS: Array) -> Array:
    """Attention of a few queries over keys and values `[B, K, S, H]`, of which `mask_B1TS` says what is seen:
    `[B, T, N, H]` in float32.

    The keys are the left operand as they lie in the cache: a product that wanted them transposed would copy the whole
    cache at every step.
    """
    heads, cached = RULES.qkv_BTNH, RULES.cache_BKSH

    @functools.partial(jax.shard_map, in_specs=(heads, (cached, cached), RULES.mask_B1TS), out_specs=heads)
    def local(q: Array, cache: LayerCache, mask: Array) -> Array:
        k_BKSH, v_BKSH = cache
        batch, time, _, width = q.shape
        kv_heads, slots, dtype = k_BKSH.shape[1], k_BKSH.shape[2], k_BKSH.dtype
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        q_BTKGH = (q * width**-0.5).astype(dtype).reshape(batch, time, kv_heads, -1, width)
        # G: query heads of a key head. Slices that are joined lie in memory as they are wanted; a CPU would move the
        # numbers of a transposed array one by one.
        q_BKMH = jnp.concatenate([q_BTKGH[:, :, i].reshape(batch, 1, -1, width) for i in range(kv_heads)], axis=1)
        scores_BKSM = product("bksh,bkmh->bksm", k_BKSH, q_BKMH)
        scores_BKTGS = jnp.moveaxis(scores_BKSM.reshape(batch, kv_heads, slots, time, -1), 2, -1)
        weights_BKTGS = jax.nn.softmax(jnp.where(mask[:, :, :, None], scores_BKTGS, -jnp.inf), axis=-1).astype(dtype)
        y_BKMH = product("bkms,bksh->bkmh", weights_BKTGS.reshape(batch, kv_heads, -1, slots), v_BKSH)
        return jnp.concatenate([y_BKMH[:, i].reshape(batch, time, -1, width) for i in range(kv_heads)], axis=2)

    return local(q_BTNH, cache, mask_B1TS)


def attend_chain(q_BTNH: Array, past: LayerCache, mask_B1TS: Array, chain: tuple[tuple[Array, Array], ...]) -> Array:
    """Attention over the cache and over a chain of entries that each position has of its own, `[B, T, N, H]`.

    `past`: keys and values `[B, K, S, H]`, of which `mask_B1TS` says what is seen. `chain`: keys and values
    `[B, T, K, H]` of each further entry, all of which are seen.
    """
    heads, cached = RULES.qkv_BTNH, RULES.cache_BKSH
    specs = heads, (cached, cached), RULES.mask_B1TS, ((heads, heads),) * len(chain)

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=heads)
    def local(q: Array, past: LayerCache, mask: Array, chain: tuple[tuple[Array, Array], ...]) -> Array:
        k_BKSH, v_BKSH = past
        batch, time, num_heads, width = q.shape
        kv_heads, slots, dtype = k_BKSH.shape[1], k_BKSH.shape[2], k_BKSH.dtype
        q_BTKGH = (q.astype(dtype) * width**-0.5).reshape(batch, time, kv_heads, num_heads // kv_heads, width)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = [jnp.where(mask[:, :, None], product("btkgh,bksh->bkgts", q_BTKGH, k_BKSH), -jnp.inf)]
        scores += [product("btkgh,btkh->bkgt", q_BTKGH, k.astype(dtype))[..., None] for k, _ in chain]
        weights_BKGTS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(dtype)
        y_BTKGH = jnp.einsum("bkgts,bksh->btkgh", weights_BKGTS[..., :slots], v_BKSH)
        for i, (_, v) in enumerate(chain):
            y_BTKGH += jnp.einsum("bkgt,btkh->btkgh", weights_BKGTS[..., slots + i], v.astype(dtype))
        return y_BTKGH.reshape(batch, time, num_heads, width).astype(q.dtype)

    return local(q_BTNH, past, mask_B1TS, chain)


class Attention(nnx.Module):
    """Projections to heads, rotary embedding, attention, and back to the model width."""

    TOGETHER: ClassVar = ("wq_DNH", "wk_DKH", "wv_DKH")

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, n, k, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_width
        self.wq_DNH = init_weight(rngs, "wq_DNH", (d, n, h))
        self.wk_DKH = init_weight(rngs, "wk_DKH", (d, k, h))
        self.wv_DKH = init_weight(rngs, "wv_DKH", (d, k, h))
        # Residual branches start small, so that depth does not change the scale of the stream (GPT-2).
        self.wo_NHD = init_weight(rngs, "wo_NHD", (n, h, d), (2 * config.num_layers) ** -0.5)
        if config.qkv_bias:
            self.bq_NH = init_full("bq_NH", (n, h))
            self.bk_KH = init_full("bk_KH", (k, h))
            self.bv_KH = init_full("bv_KH", (k, h))
        if config.qk_norm:
            self.q_norm = RMSNorm(h, config.norm_eps)
            self.k_norm = RMSNorm(h, config.norm_eps)
        self.config = config

    def project(self, x_BTD: Array, rope: Rotary) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H]`, and keys and values `[B, T, K, H]`, turned to their positions."""
        q_BTNH, k_BTKH, v_BTKH = linears(x_BTD, self)
        if self.config.qkv_bias:
            biased = (q_BTNH, self.bq_NH), (k_BTKH, self.bk_KH), (v_BTKH, self.bv_KH)
            q_BTNH, k_BTKH, v_BTKH = (y + b[...].astype(x_BTD.dtype)[None, None] for y, b in biased)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return rotate(q_BTNH, rope), rotate(k_BTKH, rope), v_BTKH

    def __call__(
        self,
        x_BTD: Array,
        rope: Rotary,
        mask_B1TS: Array,
        cache: LayerCache | None = None,
        start_B: Array | None = None,
    ) -> tuple[Array, LayerCache | None]:
        """Attend within `x_BTD`, or, given a cache, over that: written at `start_B` first, if that is given.

        Returns the output `[B, T, D]` and the cache as written.
        """
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, rope)
        if cache is not None:
            if start_B is not None:
                cache = write(cache[0], k_BTKH, start_B), write(cache[1], v_BTKH, start_B)
            y_BTNH = attend_cached(q_BTNH, read(cache, mask_B1TS.shape[-1]), mask_B1TS)
        else:
            y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, mask_B1TS, self.config.attention)
        return linear(y_BTNH.astype(x_BTD.dtype), self.wo_NHD[...]), cache
