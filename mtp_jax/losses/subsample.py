"""Subsampling: a random part of the positions, in place of all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mtp_jax.sharding import RULES


def subsample(
    key: Array, fraction: float, x_BTD: Array, latent: Any, targets_BTW: Array, weights_BTW: Array
) -> tuple[Array, Any, Array, Array]:
    """`fraction` of the T positions of every row, at least one, each row its own, and all equally likely.

    The arrays are those of `mixture_loss`, and come back as `[B, n, ...]` with the weights scaled up, so that a
    weighted sum over what stays is, on average, the sum over all. `key` decides alike on every mesh.
    """
    batch, time, _ = weights_BTW.shape
    count = max(1, round(fraction * time))
    order_BT = jnp.argsort(jax.random.uniform(key, (batch, time), jnp.float32, out_sharding=RULES.tokens_BT), axis=1)
    chosen_Bn = jnp.sort(order_BT[:, :count], axis=1)
    take = jax.vmap(lambda row, chosen: row.at[chosen].get(unique_indices=True, indices_are_sorted=True))
    arrays = x_BTD, latent, targets_BTW, weights_BTW * (time / count)
    return jax.tree.map(lambda array: take(array, chosen_Bn), arrays)
