"""One pre-norm decoder layer."""

from __future__ import annotations

from flax import nnx
from jax import Array

from mtp_jax.model.attention import Attention
from mtp_jax.model.cache import LayerCache
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import RMSNorm, SwiGLU
from mtp_jax.model.rotary import Rotary


class Block(nnx.Module):
    """Attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = SwiGLU(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: Array,
        rope: Rotary,
        mask_B1TS: Array,
        cache: LayerCache | None = None,
        start_B: Array | None = None,
    ) -> tuple[Array, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache as `Attention` has written it."""
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), rope, mask_B1TS, cache, start_B)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)), cache
