"""The key/value cache: one pair of arrays per layer, absolute positions per row.

Nothing is ever zeroed. A query at position p sees keys at positions <= p, and each of those was committed or written
in this forward before attention reads, so rolling back a rejected draft is one integer per row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax.config import ModelConfig
from mtp_jax.sharding import RULES

LayerCache = tuple[Array, Array]
Cache = list[LayerCache]


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` positions for `batch` rows: per layer (keys, values), each `[B, K, S, H]`.

    Heads come before positions: attention's products are then over plain matrices, and no layout is changed per step.
    A CPU keeps bfloat16 keys and values in float32: XLA would convert the whole cache there and back at every step.
    """
    shape = (batch, config.num_kv_heads, slots, config.head_width)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.dtype(config.dtype)
    # One array each: the caches are donated, and a buffer can be donated once.
    return [
        tuple(jnp.zeros(shape, dtype, out_sharding=RULES.cache_BKSH) for _ in range(2))  # type: ignore[misc]
        for _ in range(config.num_layers)
    ]


def write(cache_BKSH: Array, new_BTKH: Array, start_B: Array) -> Array:
    """`cache` with row b's positions `start_B[b] .. start_B[b] + T - 1` replaced.

    Where T is 1, the position behind it is overwritten too: no query sees it before it is written again. The caller
    keeps `start + max(T, 2) <= S`: a slice that does not fit would be moved back over valid keys.
    """

    def row(cache_KSH: Array, new_KTH: Array, start: Array) -> Array:
        return lax.dynamic_update_slice(cache_KSH, new_KTH.astype(cache_KSH.dtype), (0, start, 0))

    if new_BTKH.shape[1] == 1:
        # XLA would fuse one token's write both into attention and into the state, and copy the cache for that.
        new_BTKH = jnp.pad(new_BTKH, ((0, 0), (0, 1), (0, 0), (0, 0)))
    return jax.vmap(row)(cache_BKSH, jnp.swapaxes(new_BTKH, 1, 2), start_B)
