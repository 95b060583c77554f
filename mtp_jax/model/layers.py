"""What every block is made of: weights, RMSNorm, the SwiGLU feed-forward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from mtp_jax.config import ModelConfig
from mtp_jax.sharding import RULES, gather


def init_weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], *, inputs: int, spec: P, scale: float = 1.0
) -> nnx.Param[Array]:
    """A float32 weight of variance `scale**2 / fan_in`; the first `inputs` axes are the fan-in."""
    std = scale / math.sqrt(math.prod(shape[:inputs]))
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, out_sharding=spec))


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis (arXiv 1910.07467), in float32, with a learned scale."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, out_sharding=RULES.scale))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalise `[..., width]`; the dtype is kept."""
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (normal * scale).astype(x.dtype)


class SwiGLU(nnx.Module):
    """The gated feed-forward layer of Llama (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        self.w_gate_DF = init_weight(rngs, (d, f), inputs=1, spec=RULES.w_DF)
        self.w_up_DF = init_weight(rngs, (d, f), inputs=1, spec=RULES.w_DF)
        self.w_down_FD = init_weight(rngs, (f, d), inputs=1, spec=RULES.w_FD, scale=(2 * config.num_layers) ** -0.5)

    def __call__(self, x_BTD: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        dtype = x_BTD.dtype
        gate_BTF = jnp.einsum("btd,df->btf", x_BTD, gather(self.w_gate_DF[...]).astype(dtype))
        up_BTF = jnp.einsum("btd,df->btf", x_BTD, gather(self.w_up_DF[...]).astype(dtype))
        h_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return jnp.einsum("btf,fd->btd", h_BTF, gather(self.w_down_FD[...]).astype(dtype), out_sharding=RULES.x_BTD)
