"""Circuit of products: one component for the whole window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.heads.circuits.base import Circuit
from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.parameters import init_full
from mtp_jax.sharding import gather


class CPD(Circuit):
    """The canonical probability decomposition (Basharin, Chertkov and Oseledets, arXiv 2410.17765).

    One component writes the whole window: q(x_1..x_W) = sum_r w_r prod_s p_rs(x_s), so alpha_s is the posterior.
    """

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        # Components start as near copies, so nothing is known about which to choose: the gate starts uniform.
        self.gate_DR = init_full("gate_DR", (model.d_model, head.rank))

    def latent(self, x_BTD: Array) -> Array:
        """log w_r, `[B, T, R]`: the softmax of a linear layer."""
        z_BTR = jnp.einsum("btd,dr->btr", x_BTD.astype(jnp.float32), gather(self.gate_DR[...]))
        return jax.nn.log_softmax(z_BTR, axis=-1)

    @staticmethod
    def advance(carry: Array, score_R: Array, offset: int) -> tuple[Array, Array]:
        """Bayes: alpha_r is multiplied by p_r(x) and normalised."""
        if score_R.shape[-1] == 1:
            return carry, carry
        log_alpha_R = jax.nn.log_softmax(carry + score_R, axis=-1)
        return log_alpha_R, log_alpha_R

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """The gate's product."""
        return 2 * model.d_model * head.rank
