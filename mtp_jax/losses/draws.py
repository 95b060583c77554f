"""Random components for a backward pass that sees few of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def draw_components(key: Array, d_logp_BTRW: Array, draws: int) -> tuple[Array, Array]:
    """Components and weights, each `[B, T, draws, W]`: sum_r d_logp_r f_r is the mean of sum_i weight_i f_component_i.

    Components are drawn with probabilities |d_logp_r| / sum_r |d_logp_r|, and weigh the sum with the sign of their own:
    where offsets have unequal weights, posteriors enter with signs. Systematic sampling: one uniform number for all
    draws of a position and offset.
    """
    mass_BTRW = jnp.cumsum(jnp.abs(d_logp_BTRW), axis=2)
    total_BT1W = mass_BTRW[:, :, -1:]
    batch, time, rank, window = d_logp_BTRW.shape
    uniform = jax.random.uniform(key, (batch, time, 1, window), d_logp_BTRW.dtype)
    at_BTcW = (uniform + jnp.arange(draws, dtype=uniform.dtype)[None, None, :, None]) / draws * total_BT1W
    component_BTcW = jnp.sum(mass_BTRW[:, :, None] <= at_BTcW[:, :, :, None], axis=3, dtype=jnp.int32)
    component_BTcW = jnp.minimum(component_BTcW, rank - 1)
    sign_BTcW = jnp.sign(jnp.take_along_axis(d_logp_BTRW, component_BTcW, axis=2))
    return component_BTcW, sign_BTcW * total_BT1W / draws
