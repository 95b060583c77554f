"""Encoders: what a mixture reads in place of the last hidden state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import RMSNorm, linear
from mtp_jax.parameters import init_full, init_weight


class TokenEncoder(nnx.Module):
    """h + SwiGLU([norm h; norm e(y)]), where y is the token that the target chose behind h, and e embeds it.

    It begins as h alone: the last matrix is zero.
    """

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d, f = model.d_model, model.d_ff
        self.hidden_norm, self.token_norm = RMSNorm(d, model.norm_eps), RMSNorm(d, model.norm_eps)
        self.join_gate_CF = init_weight(rngs, "join_gate_CF", (2 * d, f))
        self.join_up_CF = init_weight(rngs, "join_up_CF", (2 * d, f))
        self.join_down_FD = init_full("join_down_FD", (f, d))

    def __call__(self, x_BTD: Array, token_BTD: Array) -> Array:
        """`[B, T, D]`, from hidden states and the embeddings of the tokens behind them."""
        joined_BTC = jnp.concatenate([self.hidden_norm(x_BTD), self.token_norm(token_BTD)], axis=-1)
        gate_BTF, up_BTF = linear(joined_BTC, self.join_gate_CF[...]), linear(joined_BTC, self.join_up_CF[...])
        return x_BTD + linear(jax.nn.silu(gate_BTF) * up_BTF, self.join_down_FD[...])

    @staticmethod
    def flops(model: ModelConfig) -> int:
        """Forward FLOPs of one position."""
        return 2 * (2 * 2 * model.d_model + model.d_model) * model.d_ff


ENCODERS: dict[str, type[TokenEncoder]] = {"token": TokenEncoder}
