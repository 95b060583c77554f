"""Circuit of one component."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from mtp_jax.heads.circuits.base import Circuit


class Independent(Circuit):
    """One component: offsets know nothing of each other (Gloeckle et al., arXiv 2404.19737)."""

    @staticmethod
    def latent(x_BTD: Array) -> Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Zeros `[B, T, 1]`."""
        return jnp.zeros_like(x_BTD[..., :1], dtype=jnp.float32)

    @staticmethod
    def advance(carry: Array, score_R: Array, offset: int) -> tuple[Array, Array]:
        """The one weight stays 1: a product that only gives the score is then not computed."""
        return carry, carry
