"""The trunk: a Llama-style decoder, from embedded tokens to the hidden states that heads read."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mtp_jax.model.attention import cache_mask, causal_mask
from mtp_jax.model.block import Block
from mtp_jax.model.cache import Cache
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import RMSNorm
from mtp_jax.model.rotary import rotary

Taps = tuple[Array, ...]


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


class Trunk(nnx.Module):
    """L decoder layers, whose parameters are stacked on a leading L axis and scanned, and the final norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def __call__(self, x_BTD: Array, segments_BT: Array, layers: tuple[int, ...] = ()) -> tuple[Array, Taps]:
        """Run a batch of whole sequences.

        Args:
          x_BTD: embedded tokens.
          segments_BT: the document of each position; positions see only their own.
          layers: those whose outputs are asked for, counted from 1.

        Returns:
          hidden states `[B, T, D]` after the final norm, and the taps: the residual stream `[B, T, D]` behind each of
          `layers`. They travel in the scan's carry, so no more of them exist than are asked for.
        """
        positions_BT = jnp.zeros_like(segments_BT) + jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
        rope, mask_B1TS = rotary(self.config, positions_BT), causal_mask(segments_BT)

        def layer(carry: tuple[Array, Taps], numbered: tuple[Array, Block]) -> tuple[tuple[Array, Taps], None]:
            (x_BTD, taps), (number, block) = carry, numbered
            x_BTD = block(x_BTD, rope, mask_B1TS)[0]
            taps = tuple(jnp.where(number == n, x_BTD, tap) for n, tap in zip(layers, taps, strict=True))
            return (x_BTD, taps), None

        body = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        numbers_L = jnp.arange(1, self.config.num_layers + 1, dtype=jnp.int32)
        taps = tuple(jnp.zeros_like(x_BTD) for _ in layers)
        (x_BTD, taps), _ = lax.scan(body, (x_BTD, taps), (numbers_L, self.blocks))
        return self.norm(x_BTD), taps


class UnrolledTrunk(nnx.Module):
    """The same layers in a list: a scan over stacked weights copies what it takes at every step of decoding."""

    def __init__(self, trunk: Trunk, blocks: list[Block] | None = None):
        """The layers of `trunk`, or `blocks` in their place."""
        self.config = trunk.config
        layers = range(trunk.config.num_layers)
        self.blocks = nnx.List(blocks or [jax.tree.map(lambda w, i=i: w[i], trunk.blocks) for i in layers])
        self.norm = trunk.norm

    def extend(
        self,
        x_BTD: Array,
        cache: Cache,
        start_B: Array,
        attended: int | None = None,
        layers: tuple[int, ...] = (),
    ) -> tuple[Array, Taps, Cache]:
        """Run T more tokens of each row at its positions `start_B ..`, through the cache.

        Args:
          x_BTD: the new tokens, embedded.
          cache: per layer (keys, values), written at the new positions before attention reads.
          start_B: each row's first new position.
          attended: attention reads the cache's first so many positions only (default: all).
          layers: the layers that are tapped, as in `Trunk`.

        Returns:
          hidden states `[B, T, D]` after the final norm, taps, and the cache.
        """
        positions_BT = start_B[:, None] + jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
        rope = rotary(self.config, positions_BT)
        mask_B1TS = cache_mask(positions_BT, attended or cache[0][0].shape[2])
        written, tapped = [], {}
        for number, (block, layer_cache) in enumerate(zip(self.blocks, cache, strict=True), 1):
            x_BTD, layer_cache = block(x_BTD, rope, mask_B1TS, layer_cache, start_B)
            written.append(layer_cache)
            tapped[number] = x_BTD
        return self.norm(x_BTD), tuple(tapped[number] for number in layers), written
