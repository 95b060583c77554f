"""The log-likelihood of a mixture of products, in tiles of positions, with the gradient formed in the forward pass.

With M_s = logsumexp_r(log w_r + sum_{j<=s} log p_rj(x_j)) and M_0 = 0, offset s has log-likelihood M_s - M_{s-1}.
Positions do not see each other, so a tile's logits live only while its loss and gradient are computed: memory is
O(tile), and no logit is computed twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

LogitsFn = Callable[[Any, Array], Array]

# Most bytes of float32 logits that are alive together on one device.
TILE_BYTES = 16 * 2**20


def mixture_loss(
    logits_fn: LogitsFn,
    gamma: float,
    params: Any,
    x_BTD: Array,
    log_w_BTR: Array,
    targets_BTW: Array,
    weights_BTW: Array,
) -> tuple[Array, Array]:
    """sum_s gamma^(s-1) nll_s, where nll_s = -sum_bt weights_bts log q(x_s | x_<s).

    Args:
      logits_fn: (params, x_BTD) to float32 logits `[B, T, R, W, V]` of every factor.
      gamma: weight of each offset relative to the one before.
      params: any tree of arrays, differentiated.
      x_BTD: hidden states, differentiated.
      log_w_BTR: log weights of the components, normalised, float32, differentiated.
      targets_BTW: token ids. A masked target masks (by its weight) itself only, so mask all offsets after it too.
      weights_BTW: weight of every target, 0 where masked.

    Returns:
      the loss, and nll `[W]`, which is reported and carries no gradient.
    """
    return _mixture_loss(logits_fn, gamma, params, x_BTD, log_w_BTR, targets_BTW, weights_BTW)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixture_loss(logits_fn: LogitsFn, gamma: float, params: Any, *arrays: Array) -> Any:
    """`mixture_loss` where no gradient is asked for: forward only."""
    tiled = _tiles(logits_fn, params, *arrays)

    def tile(nll_W: Array, arrays: tuple[Array, ...]) -> tuple[Array, None]:
        return nll_W + _tile_loss(logits_fn, gamma, params, *arrays)[1], None

    nll_W, _ = lax.scan(tile, jnp.zeros(arrays[-1].shape[-1]), tiled)
    return _weigh(nll_W, gamma), nll_W


def _forward(logits_fn: LogitsFn, gamma: float, params: Any, x_BTD: Array, log_w_BTR: Array, *rest: Array) -> Any:
    arrays = _tiles(logits_fn, params, x_BTD, log_w_BTR, *rest)
    gradient = jax.grad(functools.partial(_tile_loss, logits_fn, gamma), argnums=(0, 1, 2), has_aux=True)

    def tile(carry: Any, arrays: tuple[Array, ...]) -> Any:
        (d_params, d_x, d_log_w), nll_W = gradient(params, *arrays)
        return jax.tree.map(jnp.add, carry, (d_params, nll_W)), (d_x, d_log_w)

    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(rest[0].shape[-1]))
    (d_params, nll_W), (d_x, d_log_w) = lax.scan(tile, zeros, arrays)
    time = x_BTD.shape[1]
    gradients = (d_params, _untile(d_x, time), _untile(d_log_w, time))
    return (_weigh(nll_W, gamma), nll_W), gradients


def _backward(logits_fn: LogitsFn, gamma: float, gradients: Any, cotangents: tuple[Array, Array]) -> Any:
    scaled = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return *scaled, None, None


_mixture_loss.defvjp(_forward, _backward)


def mixture_log_likelihood(
    logits_fn: LogitsFn, params: Any, x_BTD: Array, log_w_BTR: Array, targets_BTW: Array
) -> Array:
    """log q(x_s | x_<s) by offset, `[B, T, W]` in nats, by the same tiles. Arguments as in `mixture_loss`."""
    arrays = _tiles(logits_fn, params, x_BTD, log_w_BTR, targets_BTW)
    _, ll = lax.scan(lambda _, a: (None, _conditionals(logits_fn(params, a[0]), *a[1:])), None, arrays)
    return _untile(ll, x_BTD.shape[1])


def _conditionals(logits_BTRWV: Array, log_w_BTR: Array, targets_BTW: Array) -> Array:
    """log q(x_s | x_<s), `[B, T, W]`."""
    vocabulary = lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, logits_BTRWV.shape[-1]), 4)
    # A masked sum instead of an index: the vocabulary may be sharded.
    hit_BTRWV = vocabulary == targets_BTW[:, :, None, :, None]
    target_BTRW = jnp.sum(jnp.where(hit_BTRWV, logits_BTRWV, 0.0), axis=-1)
    logp_BTRW = target_BTRW - jax.nn.logsumexp(logits_BTRWV, axis=-1)
    joint_BTW = jax.nn.logsumexp(log_w_BTR[..., None] + jnp.cumsum(logp_BTRW, axis=-1), axis=2)
    return joint_BTW - jnp.pad(joint_BTW[..., :-1], ((0, 0), (0, 0), (1, 0)))  # M_0 = 0


def _tile_loss(
    logits_fn: LogitsFn, gamma: float, params: Any, x: Array, log_w: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    nll_W = -jnp.sum(weights * _conditionals(logits_fn(params, x), log_w, targets), axis=(0, 1))
    return _weigh(nll_W, gamma), nll_W


def _weigh(nll_W: Array, gamma: float) -> Array:
    return jnp.sum(nll_W * gamma ** jnp.arange(nll_W.shape[0]))


def _tiles(logits_fn: LogitsFn, params: Any, x_BTD: Array, *rest: Array) -> tuple[Array, ...]:
    """Every array as `[tiles, B, T / tiles, ...]`, padded with zeros (of weight zero) at the end."""
    batch, time, _ = x_BTD.shape
    logits = jax.eval_shape(logits_fn, params, x_BTD[:, :1])
    size = logits.size * 4 // _shards(logits)
    tiles = min(time, -(-time * size // TILE_BYTES))
    width = -(-time // tiles)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, tiles * width - time)] + [(0, 0)] * (array.ndim - 2))
        # The sharding is said: JAX cannot tell it for a batch of one.
        rows, *rest = jax.typeof(array).sharding.spec
        shape = (batch, tiles, width, *array.shape[2:])
        return jnp.moveaxis(padded.reshape(shape, out_sharding=P(rows, None, *rest)), 1, 0)

    return tuple(split(array) for array in (x_BTD, *rest))


def _shards(array: Any) -> int:
    """How many devices share the array."""
    return array.size // max(1, math.prod(array.sharding.shard_shape(array.shape)))


def _untile(tiled: Array, time: int) -> Array:
    n, batch, width = tiled.shape[:3]
    _, rows, *rest = jax.typeof(tiled).sharding.spec
    shape = (batch, n * width, *tiled.shape[3:])
    return jnp.moveaxis(tiled, 0, 1).reshape(shape, out_sharding=P(rows, *rest))[:, :time]
