"""The rank-R canonical probability decomposition (Basharin, Chertkov and Oseledets, arXiv 2410.17765)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.config import HeadConfig, ModelConfig
from mtp_jax.heads.base import Head
from mtp_jax.sharding import RULES, gather


class CPDHead(Head):
    """q(x_1..x_W | h) = sum_r w_r(h) prod_s p_rs(x_s | h); the gate w is a softmax of a linear layer."""

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        # Components start as copies, so nothing is known about which to choose: the gate starts uniform.
        self.gate_DR = nnx.Param(jnp.zeros((model.d_model, config.rank), out_sharding=RULES.gate_DR))

    def log_weights(self, x_BTD: Array) -> Array:
        """See `Head.log_weights`. The gate is computed in float32."""
        z_BTR = jnp.einsum("btd,dr->btr", x_BTD.astype(jnp.float32), gather(self.gate_DR[...]))
        return jax.nn.log_softmax(z_BTR, axis=-1)

    @staticmethod
    def gate_flops(config: HeadConfig, model: ModelConfig) -> int:
        """See `Head.gate_flops`."""
        return 2 * model.d_model * config.rank
