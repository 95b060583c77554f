"""Rows of arrays: picking one entry of each, in forms that a sharded batch and vocabulary allow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def at(array: Array, index_B: Array) -> Array:
    """`array[b, index_B[b]]` for every row b."""
    return jax.vmap(lambda row, i: lax.dynamic_index_in_dim(row, i, keepdims=False))(array, index_B)


def log_prob(logp_BTV: Array, tokens_BT: Array) -> Array:
    """`logp_BTV[b, t, tokens_BT[b, t]]`, `[B, T]`."""
    hit_BTV = lax.broadcasted_iota(jnp.int32, (1, 1, logp_BTV.shape[-1]), 2) == tokens_BT[:, :, None]
    return jnp.sum(jnp.where(hit_BTV, logp_BTV, 0.0), axis=-1)
