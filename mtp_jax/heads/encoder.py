"""Encoders: what a mixture reads in place of the last hidden state."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.heads.base import Seen
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.stages import block_flops, silent_block, stacked, stage, unstacked
from mtp_jax.model.attention import cache_mask, causal_mask
from mtp_jax.model.cache import Cache, init_cache
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import RMSNorm, linear, linears
from mtp_jax.model.rotary import rotary
from mtp_jax.parameters import init_full, init_weight


class Encoder(nnx.Module):
    """What the circuit reads of a position, `[B, T, D]`: of what the trunk saw, and the token behind it.

    One with layers that attend has a cache, under the discipline of `Head`'s.
    """

    taps: tuple[int, ...] = ()
    has_cache = False

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        """One without parameters."""

    def encode(self, seen: Seen, next_BT: Array) -> Array:
        """Of whole rows, from their first position on."""
        raise NotImplementedError

    def init_cache(self, batch: int, slots: int) -> Any:
        """As `Head.init_cache`."""
        return ()

    def extend(self, cache: Any, seen: Seen, next_BT: Array, start_B: Array) -> tuple[Any, Array]:
        """Of T positions of each row behind those in the cache, which are written to it, as `Head.extend` has them."""
        raise NotImplementedError

    def again(self, cache: Any, seen: Seen, token_B: Array, position_B: Array) -> Array:
        """Of one position whose entries are in the cache (T = 1), as `Head.begin` has them."""
        raise NotImplementedError

    def unstack(self) -> None:
        """As `Head.unstack`."""

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """Forward FLOPs of one position."""
        raise NotImplementedError


class HiddenEncoder(Encoder):
    """h itself: for offsets that learn nothing of the token at the first one, which is then left to the model."""

    def encode(self, seen: Seen, next_BT: Array) -> Array:
        """As `Encoder`; of any positions."""
        return seen.x_BTD

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """As `Encoder`."""
        return 0


class TokenEncoder(Encoder):
    """h + SwiGLU([norm h; norm e(y)]), where y is the token that the target chose behind h, and e embeds it.

    It begins as h alone: the last matrix is zero.
    """

    TOGETHER: ClassVar = ("join_gate_CF", "join_up_CF")

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d, f = model.d_model, model.d_ff
        self.hidden_norm, self.token_norm = RMSNorm(d, model.norm_eps), RMSNorm(d, model.norm_eps)
        self.join_gate_CF = init_weight(rngs, "join_gate_CF", (2 * d, f))
        self.join_up_CF = init_weight(rngs, "join_up_CF", (2 * d, f))
        self.join_down_FD = init_full("join_down_FD", (f, d))

    def __call__(self, x_BTD: Array, token_BTD: Array) -> Array:
        """`[B, T, D]`, from hidden states and the embeddings of the tokens behind them."""
        joined_BTC = jnp.concatenate([self.hidden_norm(x_BTD), self.token_norm(token_BTD)], axis=-1)
        gate_BTF, up_BTF = linears(joined_BTC, self)
        return x_BTD + linear((jax.nn.silu(gate_BTF) * up_BTF).astype(x_BTD.dtype), self.join_down_FD[...])

    def encode(self, seen: Seen, next_BT: Array) -> Array:
        """As `Encoder`; of any positions."""
        return self(seen.x_BTD, seen.embed(next_BT))

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """As `Encoder`."""
        return 2 * (2 * 2 * model.d_model + model.d_model) * model.d_ff


class BlockEncoder(Encoder):
    """z = h + J [norm h; norm e(y); norm of each tap], then causal transformer blocks over the z of a row's positions
    (EAGLE-3, arXiv 2503.01840, fuses taps of the trunk like that).

    The blocks are of the model's own shape. It begins as h alone.
    """

    has_cache = True

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d = model.d_model
        self.taps, self.count, self.model_config = head.taps, head.encoder_layers, model
        self.hidden_norm, self.token_norm = RMSNorm(d, model.norm_eps), RMSNorm(d, model.norm_eps)
        self.tap_norm = RMSNorm(d, model.norm_eps) if head.taps else None
        self.join_CD = init_full("join_CD", ((2 + len(head.taps)) * d, d))
        self.stages: Any = stacked(lambda rngs: silent_block(model, rngs=rngs), self.count, rngs)

    def _join(self, seen: Seen, next_BT: Array) -> Array:
        """z `[B, T, D]`."""
        parts = [self.hidden_norm(seen.x_BTD), self.token_norm(seen.embed(next_BT))]
        if self.tap_norm is not None:
            parts += [self.tap_norm(tap_BTD) for tap_BTD in seen.taps]
        return seen.x_BTD + linear(jnp.concatenate(parts, axis=-1), self.join_CD[...])

    def encode(self, seen: Seen, next_BT: Array) -> Array:
        """As `Encoder`."""
        tokens_BT = seen.tokens_BT
        position_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        rope = rotary(self.model_config, position_BT)
        mask_B1TS = causal_mask(jnp.zeros_like(tokens_BT) if seen.segments_BT is None else seen.segments_BT)
        z_BTD = self._join(seen, next_BT)
        for i in range(self.count):
            # Of each block its argument is kept, not the scores of its attention.
            run = jax.checkpoint(lambda block, z_BTD: block(z_BTD, rope, mask_B1TS)[0])
            z_BTD = run(stage(self.stages, i), z_BTD)
        return z_BTD

    def init_cache(self, batch: int, slots: int) -> Cache:
        """Keys and values of each block."""
        return init_cache(dataclasses.replace(self.model_config, num_layers=self.count), batch, slots)

    def extend(self, cache: Cache, seen: Seen, next_BT: Array, start_B: Array) -> tuple[Cache, Array]:
        """As `Encoder`."""
        position_BT = start_B[:, None] + jnp.arange(next_BT.shape[1], dtype=jnp.int32)[None]
        return self._over(cache, seen, next_BT, position_BT, start_B)

    def again(self, cache: Cache, seen: Seen, token_B: Array, position_B: Array) -> Array:
        """As `Encoder`. Nothing is written: the last position of a cache has no room behind it."""
        return self._over(cache, seen, token_B[:, None], position_B[:, None], None)[1]

    def _over(
        self, cache: Cache, seen: Seen, next_BT: Array, position_BT: Array, start_B: Array | None
    ) -> tuple[Cache, Array]:
        """Through the cache, which is written at `start_B`, if that is given."""
        rope, mask_B1TS = rotary(self.model_config, position_BT), cache_mask(position_BT, cache[0][0].shape[2])
        z_BTD, written = self._join(seen, next_BT), []
        for i in range(self.count):
            z_BTD, layer = stage(self.stages, i)(z_BTD, rope, mask_B1TS, cache[i], start_B)
            written.append(layer)
        return written, z_BTD

    def unstack(self) -> None:
        """As `Encoder`."""
        self.stages = unstacked(self.stages, self.count)

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """As `Encoder`, without the scores of attention."""
        return 2 * (2 + len(head.taps)) * model.d_model**2 + head.encoder_layers * block_flops(model)


ENCODERS: dict[str, type[Encoder]] = {"hidden": HiddenEncoder, "token": TokenEncoder, "block": BlockEncoder}
