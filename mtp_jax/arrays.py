"""Rows of arrays: picking one entry of each, in forms that a sharded batch and vocabulary allow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

NEVER = -1e30
"""The logit of a token that is ruled out; finite, so that differences stay numbers."""


def random_key(seed: Any) -> Array:
    """The key of a seed: of threefry whatever JAX's default is, so that a seed means the same in every process."""
    return jax.random.key(seed, impl="threefry2x32")


def row_keys(seed_B: Any, row_B: Any) -> Array:
    """Keys `[B]` of rows of a batch, from uint32 seeds and numbers. No two pairs share one, and row 0 of a seed has
    `random_key(seed)`: the pair is the key's two words."""
    return jax.random.wrap_key_data(jnp.stack([row_B, seed_B], axis=-1), impl="threefry2x32")


def random_bits(keys: Array, count: int) -> Array:
    """`jax.random.bits(key, count)` of every key, `[.., count]` in uint32.

    Threefry-2x32 with its 20 rounds written out (Salmon et al., doi 10.1145/2063384.2063405): one loop over the
    numbers. On a CPU JAX makes a loop over rounds of it, with the numbers in memory in between.
    """
    words = jax.random.key_data(keys)
    k0, k1 = words[..., :1], words[..., 1:]
    ks = k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)
    x0 = k0
    x1 = k1 + lax.broadcasted_iota(jnp.uint32, (1,) * keys.ndim + (count,), keys.ndim)
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << turn | x1 >> 32 - turn) ^ x0
        x0, x1 = x0 + ks[(i + 1) % 3], x1 + ks[(i + 2) % 3] + np.uint32(i + 1)
    return x0 ^ x1


def rule_out(logits: Array, count: int, first: int | Array = 0) -> Array:
    """`logits`, the vocabulary last, with `NEVER` at the ids from `count` on. `first` is that of column 0."""
    if isinstance(first, int) and first + logits.shape[-1] <= count:
        return logits
    ids_V = first + lax.broadcasted_iota(jnp.int32, (1,) * (logits.ndim - 1) + logits.shape[-1:], logits.ndim - 1)
    return jnp.where(ids_V < count, logits, NEVER)


def at(array: Array, index_B: Array) -> Array:
    """`array[b, index_B[b]]` for every row b."""
    return jax.vmap(lambda row, i: lax.dynamic_index_in_dim(row, i, keepdims=False))(array, index_B)


def log_prob(logp_BTV: Array, tokens_BT: Array) -> Array:
    """`logp_BTV[b, t, tokens_BT[b, t]]`, `[B, T]`."""
    hit_BTV = lax.broadcasted_iota(jnp.int32, (1, 1, logp_BTV.shape[-1]), 2) == tokens_BT[:, :, None]
    return jnp.sum(jnp.where(hit_BTV, logp_BTV, 0.0), axis=-1)
