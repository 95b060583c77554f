"""The language model: embedding, stacked decoder layers, final norm, and the head over the next W tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mtp_jax.config import HeadConfig, ModelConfig
from mtp_jax.heads import Head, make_head
from mtp_jax.model.attention import cache_mask, causal_mask
from mtp_jax.model.block import Block
from mtp_jax.model.cache import Cache
from mtp_jax.model.layers import RMSNorm, init_weight
from mtp_jax.model.rotary import rotary
from mtp_jax.sharding import RULES, gather


def keep(*primitives: str) -> Callable[..., bool]:
    """A remat policy that keeps the results of these primitives. What lies between them costs less than keeping it."""
    return lambda primitive, *_, **__: primitive.name in primitives


# `layers.linear` is a custom_vjp call, and so is cuDNN's attention, whose kernel gives statistics beside its result.
# The attention of XLA is two products in plain sight.
REMAT_POLICIES = {
    "none": keep("custom_vjp_call", "dot_general", "dot_product_attention_fwd_wrapper"),
    "dots": keep("custom_vjp_call"),
    "full": keep(),
}


class LanguageModel(nnx.Module):
    """A decoder-only transformer with a multi-token head. Build it under `jax.set_mesh`.

    `blocks` is one `Block` whose parameters have a leading L axis, or, after `unstack`, a list of L blocks.
    """

    def __init__(self, config: ModelConfig, head: HeadConfig, *, rngs: nnx.Rngs):
        self.config = config
        if not config.tie_embeddings:
            # Small next to what the layers add, or their output would drown in it until they have grown.
            shape, scale = (config.vocab_size, config.d_model), (config.vocab_size / config.d_model) ** 0.5
            self.embed_VD = init_weight(rngs, shape, inputs=1, spec=RULES.embed_VD, scale=scale)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks: Block | nnx.List = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head: Head = make_head(head, config, rngs=rngs)

    def embed(self, tokens_BT: Array) -> Array:
        """Token embeddings `[B, T, D]` in the compute dtype."""
        table_VD = self.head.unembed_VD if self.config.tie_embeddings else self.embed_VD
        return gather(table_VD[...]).at[tokens_BT].get(out_sharding=RULES.x_BTD).astype(self.config.dtype)

    def __call__(self, tokens_BT: Array, segments_BT: Array | None = None) -> Array:
        """The hidden states `[B, T, D]` that the head reads, after the final norm.

        Args:
          tokens_BT: token ids.
          segments_BT: the document of each position; positions see only their own. One document if not given.
        """
        chex.assert_rank(tokens_BT, 2)
        # In a notebook the tokens may come from anywhere; under jit this says where they are already.
        tokens_BT = jax.reshard(jnp.asarray(tokens_BT), RULES.tokens_BT)
        if segments_BT is None:
            segments_BT = jnp.zeros_like(tokens_BT)
        chex.assert_equal_shape([tokens_BT, segments_BT])
        rope = rotary(self.config, _positions(tokens_BT))
        mask_B1TS = causal_mask(jax.reshard(jnp.asarray(segments_BT), RULES.tokens_BT))

        def layer(x_BTD: Array, block: Block) -> tuple[Array, None]:
            return block(x_BTD, rope, mask_B1TS)[0], None

        body = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        x_BTD = self.embed(tokens_BT)
        if isinstance(self.blocks, Block):
            x_BTD, _ = lax.scan(body, x_BTD, self.blocks)
        else:
            for block in self.blocks:
                x_BTD, _ = body(x_BTD, block)
        return self.norm(x_BTD)

    def extend(self, tokens_BT: Array, cache: Cache, start_B: Array, slots: int | None = None) -> tuple[Array, Cache]:
        """Run T more tokens of each row at its positions `start_B ..`, through the cache.

        Args:
          tokens_BT: the new tokens.
          cache: per layer (keys, values), written at the new positions before attention reads.
          start_B: each row's first new position.
          slots: attend over the cache's first `slots` positions only (default: all).

        Returns:
          hidden states `[B, T, D]` after the final norm, and the cache.
        """
        assert not isinstance(self.blocks, Block), "decoding unrolls the layers: call unstack(model) once after loading"
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        rope = rotary(self.config, positions_BT)
        mask_B1TS = cache_mask(positions_BT, slots or cache[0][0].shape[2])
        x_BTD, written = self.embed(tokens_BT), []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x_BTD, layer_cache = block(x_BTD, rope, mask_B1TS, layer_cache, start_B)
            written.append(layer_cache)
        return self.norm(x_BTD), written


def in_dtype(model: LanguageModel, dtype: Literal["float32", "bfloat16"]) -> LanguageModel:
    """The same parameters in a model that computes in `dtype`."""
    copy = nnx.merge(*nnx.split(model))
    copy.config = dataclasses.replace(model.config, dtype=dtype, attention="xla")
    return copy


def _positions(tokens_BT: Array) -> Array:
    return jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]


def unstack(model: LanguageModel) -> LanguageModel:
    """The same model with its layers, and its head's offsets, in lists.

    A scan over stacked weights, or a slice of them, copies what it takes at every step of decoding.
    """
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    stacked = model.blocks
    assert isinstance(stacked, Block), "the layers are unstacked already"
    model.blocks = nnx.List([jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(model.config.num_layers)])
    model.head.unstack()
    return model
