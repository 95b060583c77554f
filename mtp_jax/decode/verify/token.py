"""Token by token: speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    accept x_i with chance min(1, p_i(x_i) / q_i(x_i)), up to the first that is rejected; there y ~ (p - q)^+

since min(p, q) + (1 - sum min(p, q)) (p - q)^+ / sum (p - q)^+ = p.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from mtp_jax.decode.verify.base import leading
from mtp_jax.decode.verify.rejection import Rejection


class Token(Rejection):
    """The reference rule."""

    def chances(self, log_ratio_Bk: Array, p_BTV: Array, q_BTV: Array) -> tuple[Array, Array]:
        """min(1, p / q), and rho = 1."""
        return jnp.exp(jnp.minimum(log_ratio_Bk, 0.0)), jnp.ones_like(jnp.max(p_BTV, axis=-1))

    def accepted(self, kept_Bk: Array) -> Array:
        """Those before the first that is not kept."""
        return leading(kept_Bk)
