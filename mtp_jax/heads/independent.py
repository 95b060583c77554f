"""Independent offsets (Gloeckle et al., arXiv 2404.19737): the rank-1 baseline, which has no gate."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from mtp_jax.heads.base import Head


class IndependentHead(Head):
    """q(x_1..x_W | h) = prod_s p_s(x_s | h)."""

    def log_weights(self, x_BTD: Array) -> Array:
        """One component of weight 1: zeros `[B, T, 1]`."""
        return jnp.zeros_like(x_BTD[..., :1], dtype=jnp.float32)
