"""The key/value cache: one pair of arrays per layer, absolute positions per row.

Nothing is ever zeroed. A query at position p sees keys at positions <= p, and each of those was committed or written
in this forward before attention reads, so rolling back a rejected draft is one integer per row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax.model.config import ModelConfig
from mtp_jax.sharding import RULES, platform

LayerCache = tuple[Array, Array]
Cache = list[LayerCache]

BITS = jnp.uint16
SELECTED = 32  # tokens of a forward up to which a TPU writes them by selecting; a prompt's are written as slices


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` positions for `batch` rows: per layer (keys, values), each `[B, K, S, H]`.

    Heads come before positions: attention's products are then over plain matrices, and no layout is changed per step.
    A CPU keeps bfloat16 as the integers of its bits: to write some entries XLA would convert the whole cache to float32
    and back.
    """
    shape = (batch, config.num_kv_heads, slots, config.head_width)
    dtype = jnp.dtype(config.dtype)
    if platform() == "cpu" and dtype == jnp.bfloat16:
        dtype = jnp.dtype(BITS)
    zeros = functools.partial(jnp.zeros, shape, dtype, out_sharding=RULES.cache_BKSH)
    # One array each: the caches are donated, and a buffer can be donated once.
    return [(zeros(), zeros()) for _ in range(config.num_layers)]


def write(cache_BKSH: Array, new_BTKH: Array, start_B: Array) -> Array:
    """`cache` with row b's positions `start_B[b] .. start_B[b] + T - 1` replaced.

    Where T is 1, the position behind it may be overwritten too: no query sees it before it is written again. The caller
    keeps `start + max(T, 2) <= S`: a slice that does not fit would be moved back over valid keys.
    """
    new_BTKH = _as_kept(new_BTKH, cache_BKSH.dtype)
    if new_BTKH.shape[1] > SELECTED:
        return _slices(cache_BKSH, new_BTKH, start_B)
    return lax.platform_dependent(cache_BKSH, new_BTKH, start_B, tpu=_selects, default=_slices)


def read(layer: LayerCache, slots: int | None = None) -> LayerCache:
    """The keys and values of the first `slots` positions, as numbers."""
    k_BKSH, v_BKSH = (one[:, :, :slots] for one in layer)
    if k_BKSH.dtype == BITS:
        return lax.bitcast_convert_type(k_BKSH, jnp.bfloat16), lax.bitcast_convert_type(v_BKSH, jnp.bfloat16)
    return k_BKSH, v_BKSH


def _as_kept(new_BTKH: Array, dtype: Any) -> Array:
    """New entries in a cache's dtype."""
    if dtype == BITS:
        return lax.bitcast_convert_type(new_BTKH.astype(jnp.bfloat16), BITS)
    return new_BTKH.astype(dtype)


def _slices(cache_BKSH: Array, new_BTKH: Array, start_B: Array) -> Array:
    """Touches what is written and no more. On a TPU it would be a loop over rows (jax-ml/jax#21367)."""

    def row(cache_KSH: Array, new_KTH: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(cache_KSH, new_KTH, start, axis=1)

    if new_BTKH.shape[1] == 1:
        # XLA would fuse one token's write both into attention and into the state, and copy the cache for that.
        new_BTKH = jnp.pad(new_BTKH, ((0, 0), (0, 1), (0, 0), (0, 0)))
    return jax.vmap(row)(cache_BKSH, jnp.swapaxes(new_BTKH, 1, 2), start_B)


def _selects(cache_BKSH: Array, new_BTKH: Array, start_B: Array) -> Array:
    """One elementwise pass over the cache, in place, for all rows at once."""
    offset_BS = jnp.arange(cache_BKSH.shape[2], dtype=jnp.int32)[None] - start_B[:, None]
    for t in range(new_BTKH.shape[1]):
        cache_BKSH = jnp.where((offset_BS == t)[:, None, :, None], new_BTKH[:, t, :, None], cache_BKSH)
    return cache_BKSH
