"""The log-likelihood of a mixture of products, in tiles of positions, with the gradient formed in the forward pass.

With M_s = logsumexp_r(log w_r + sum_{j<=s} log p_rj(x_j)) and M_0 = 0, offset s has log-likelihood M_s - M_{s-1}.
The components of a position hang together and positions do not, so a tile of positions has its logits, its loss and its
gradient while it is in hand, and leaves only sums: memory is O(tile), and each logit costs three products, the least
there is (logits, gradient of the rows, gradient of the table).

Devices: the tiles are local to a device (`shard_map`). The batch lies over the mesh's batch axes and the vocabulary
over `tensor`; a tile exchanges a maximum and two sums per row over `tensor`, and the gradient of its hidden states.
Tables are gathered over `fsdp` once before the loop, and their gradient is reduced once after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.sharding import gather_local, like, reduce_local, shares, varies, vary

# Most bytes of float32 logits that are alive together on one device: as few as keep the products at full speed.
TILE_BYTES = {"cpu": 20 * 2**20, "gpu": 2**30, "tpu": 2**28}


class Form(Protocol):
    """How the logits of every factor come from parameters and hidden states."""

    @staticmethod
    def tables(params: Any) -> Any:
        """What every tile reads, made from the parameters once."""
        ...

    @staticmethod
    def logits(tables: Any, x_BTD: Array) -> Array:
        """`[B, T, R, W, V]` in float32."""
        ...


@dataclass(frozen=True)
class Terms:
    """The weights of the loss: offset s counts `gamma**(s-1)`; `z_weight` is on the mean square of log-normalisers."""

    gamma: float = 1.0
    z_weight: float = 0.0


def mixture_loss(
    form: type[Form],
    terms: Terms,
    params: Any,
    x_BTD: Array,
    log_w_BTR: Array,
    targets_BTW: Array,
    weights_BTW: Array,
) -> tuple[Array, Array]:
    """sum_s gamma^(s-1) nll_s + z_weight z, where nll_s = -sum_bt weights_bts log q(x_s | x_<s).

    z is the sum over all targets of weights_bts times the mean over r of the square of log sum_v exp(logits_rsv).

    Args:
      form: how logits come from `params`.
      terms: weights of the parts.
      params: any tree of arrays, as they are stored (split over `fsdp` and `tensor`); differentiated.
      x_BTD: hidden states, differentiated. Products are in their dtype, with float32 sums.
      log_w_BTR: log weights of the components, normalised, float32, differentiated.
      targets_BTW: token ids. A masked target masks (by its weight) itself only, so mask all offsets after it too.
      weights_BTW: weight of every target, 0 where masked.

    Returns:
      the loss, and nll `[W]`, which is reported and carries no gradient.
    """
    return _mixture_loss(form, terms, params, x_BTD, log_w_BTR, targets_BTW, weights_BTW)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixture_loss(
    form: type[Form], terms: Terms, params: Any, x: Array, log_w: Array, targets: Array, weights: Array
) -> Any:
    """`mixture_loss` where no gradient is asked for: forward only."""
    logp, lse = factor_scores(form, params, x, targets)
    return _objective(terms, logp, lse, log_w, weights)


def _loss_forward(
    form: type[Form], terms: Terms, params: Any, x: Array, log_w: Array, targets: Array, weights: Array
) -> Any:
    arrays = (x, log_w, targets, weights)
    specs = _specs((params, *arrays))

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=((P(), P()), specs[:3]))
    def local(params: Any, *arrays: Array) -> Any:
        x, log_w, targets, weights = arrays
        device = Device(form, params, specs[0], x, targets)
        weights = weights / device.copies

        def tile(carry: Any, arrays: tuple[Array, ...]) -> Any:
            x, log_w, targets, weights = arrays
            logits, pull = device.logits(x)
            logp, lse = device.scores(logits, targets)
            objective = jax.value_and_grad(functools.partial(_objective, terms), argnums=(0, 1, 2), has_aux=True)
            value, (d_logp, d_lse, d_log_w) = objective(logp, lse, log_w, weights)
            d_tables, d_x = pull(device.d_logits(logits, lse, targets, d_logp, d_lse))
            return jax.tree.map(jnp.add, carry, (d_tables, value)), (like(d_x, x), like(d_log_w, log_w))

        value = jnp.zeros((), log_w.dtype), jnp.zeros(targets.shape[-1], log_w.dtype)
        zeros = device.zeros(), jax.tree.map(lambda a: vary(a, but=device.split), value)
        (d_tables, value), (d_x, d_log_w) = lax.scan(tile, zeros, device.tiles((x, log_w, targets, weights)))
        gradients = device.d_params(d_tables), *(device.untile(a, x) for a in (d_x, d_log_w))
        return jax.tree.map(lambda a: like(a, jnp.zeros(())), value), gradients

    return local(params, *arrays)


def _loss_backward(form: type[Form], terms: Terms, gradients: Any, cotangents: tuple[Any, Any]) -> Any:
    scaled = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return *scaled, None, None


_mixture_loss.defvjp(_loss_forward, _loss_backward)


def mixture_log_likelihood(form: type[Form], params: Any, x_BTD: Array, log_w_BTR: Array, targets_BTW: Array) -> Array:
    """log q(x_s | x_<s) by offset, `[B, T, W]` in nats, by the same tiles. Arguments as in `mixture_loss`."""
    return conditionals(factor_scores(form, params, x_BTD, targets_BTW)[0], log_w_BTR)


def factor_scores(form: type[Form], params: Any, x_BTD: Array, targets_BTW: Array) -> tuple[Array, Array]:
    """log p_rs(x_s | h) and the log-normaliser of every factor, each `[B, T, R, W]` in float32.

    For losses whose cotangents are not known in advance: the backward pass computes the logits again, tile by tile, so
    each costs four products. Arguments as in `mixture_loss`; differentiated in `params` and `x_BTD`.
    """
    return _factor_scores(form, params, x_BTD, targets_BTW)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _factor_scores(form: type[Form], params: Any, x: Array, targets: Array) -> Any:
    return _scores_forward(form, params, x, targets)[0]


def _scores_forward(form: type[Form], params: Any, x: Array, targets: Array) -> Any:
    specs = _specs((params, x, targets))
    rows = P(specs[1][0], None, None, None)

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=(rows, rows))
    def local(params: Any, x: Array, targets: Array) -> Any:
        device = Device(form, params, specs[0], x, targets)

        def tile(_: None, arrays: tuple[Array, ...]) -> Any:
            return None, device.scores(device.logits(arrays[0])[0], arrays[1])

        scores = lax.scan(tile, None, device.tiles((x, targets)))[1]
        # Where devices computed the same, each gives its share of it.
        return jax.tree.map(lambda a: like(device.untile(a, x) / device.copies, x), scores)

    scores = local(params, x, targets)
    return scores, (params, x, targets, scores[1])


def _scores_backward(form: type[Form], residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    specs = _specs((*residuals, *cotangents))

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=specs[:2])
    def local(params: Any, x: Array, targets: Array, *arrays: Array) -> Any:
        device = Device(form, params, specs[0], x, targets)

        def tile(d_tables: Any, arrays: tuple[Array, ...]) -> Any:
            x, targets, lse, d_logp, d_lse = arrays
            logits, pull = device.logits(x)
            new, d_x = pull(device.d_logits(logits, lse, targets, d_logp / device.copies, d_lse / device.copies))
            return jax.tree.map(jnp.add, d_tables, new), like(d_x, x)

        d_tables, d_x = lax.scan(tile, device.zeros(), device.tiles((x, targets, *arrays)))
        return device.d_params(d_tables), device.untile(d_x, x)

    return *local(*residuals, *cotangents), None


_factor_scores.defvjp(_scores_forward, _scores_backward)


def conditionals(logp_BTRW: Array, log_w_BTR: Array) -> Array:
    """log q(x_s | x_<s), `[B, T, W]`, from log p_rs(x_s)."""
    joint_BTW = jax.nn.logsumexp(log_w_BTR[..., None] + jnp.cumsum(logp_BTRW, axis=-1), axis=2)
    return joint_BTW - jnp.pad(joint_BTW[..., :-1], ((0, 0), (0, 0), (1, 0)))  # M_0 = 0


def _objective(terms: Terms, logp_BTRW: Array, lse_BTRW: Array, log_w_BTR: Array, weights_BTW: Array) -> Any:
    """(loss, nll by offset) of positions, from the scores of their factors."""
    nll_W = -jnp.sum(weights_BTW * conditionals(logp_BTRW, log_w_BTR), axis=(0, 1))
    loss = jnp.sum(nll_W * terms.gamma ** jnp.arange(nll_W.shape[0]))
    if terms.z_weight:
        loss = loss + terms.z_weight * jnp.sum(weights_BTW * jnp.mean(jnp.square(lse_BTRW), axis=2))
    return loss, nll_W


def tile_positions(positions: int, logits_bytes: int) -> int:
    """Positions in a tile, of `positions` on a device whose logits are `logits_bytes` each."""
    most = max(1, TILE_BYTES[jax.default_backend()] // logits_bytes)
    return -(-positions // -(-positions // most))


class Device:
    """What one device does with its part of a batch: inside `shard_map`."""

    def __init__(self, form: type[Form], params: Any, specs: Any, x_BTD: Array, targets_BTW: Array):
        self.form, self.params, self.specs = form, params, specs
        whole = jax.tree.map(lambda w, spec: gather_local(w, spec, x_BTD.dtype), params, specs)
        self.tables, self._pull = jax.vjp(form.tables, whole)
        # The axes that split the vocabulary: the rules split nothing else of the head over this one.
        self.split = {"tensor"} & shares(axis for spec in jax.tree.leaves(specs) for axis in spec)
        working = varies(x_BTD) | self.split
        mesh = jax.sharding.get_abstract_mesh()
        self.copies = math.prod(size for name, size in mesh.shape.items() if name not in working)
        one = jax.eval_shape(lambda tables, x: form.logits(tables, vary(x)), self.tables, x_BTD[:1, :1])
        self.width = tile_positions(x_BTD.shape[0] * x_BTD.shape[1], one.size * one.dtype.itemsize)

    def tiles(self, arrays: Any) -> Any:
        """Each `[B, T, ...]` as `[tiles, 1, positions, ...]`, padded at the end with zeros (of weight zero)."""

        def split(array: Array) -> Array:
            flat = array.reshape(-1, *array.shape[2:])
            padding = -flat.shape[0] % self.width
            flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
            return flat.reshape(-1, 1, self.width, *flat.shape[1:])

        return jax.tree.map(split, arrays)

    def untile(self, tiled: Array, like_BT: Array) -> Array:
        """The inverse of `tiles`, with B and T of `like_BT`."""
        batch, time = like_BT.shape[:2]
        flat = tiled.reshape(-1, *tiled.shape[3:])
        return flat[: batch * time].reshape(batch, time, *flat.shape[1:])

    def zeros(self) -> Any:
        """A gradient of the tables to add to."""
        return jax.tree.map(lambda table: vary(jnp.zeros_like(table)), self.tables)

    def logits(self, x_BTD: Array) -> tuple[Array, Callable[[Array], tuple[Any, Array]]]:
        """The logits of a tile, and the function that takes their gradient back to (tables, x).

        As a plain matrix: M rows, one for each position, component and offset. XLA then works on it in place.
        """

        def logits_MV(tables: Any, x_BTD: Array) -> Array:
            logits_BTRWV = self.form.logits(tables, x_BTD)
            return logits_BTRWV.reshape(-1, logits_BTRWV.shape[-1])

        return jax.vjp(logits_MV, self.tables, vary(x_BTD))

    def scores(self, logits_MV: Array, targets_BTW: Array) -> tuple[Array, Array]:
        """log p_rs(x_s) and the log-normalisers, `[B, T, R, W]`."""
        rank = logits_MV.shape[0] // targets_BTW.size
        index_M1, here_M1 = self._locate(targets_BTW, logits_MV)
        found_M1 = jnp.where(here_M1, jnp.take_along_axis(logits_MV, index_M1, axis=1), 0.0)
        most_M1 = jnp.max(logits_MV, axis=1, keepdims=True)
        if self.split:
            most_M1 = lax.pmax(most_M1, "tensor")
        sum_M1 = jnp.sum(jnp.exp(logits_MV - most_M1), axis=1, keepdims=True)
        if self.split:
            sum_M1, found_M1 = lax.psum((sum_M1, found_M1), "tensor")
        lse_M1 = most_M1 + jnp.log(sum_M1)
        batch, time, window = targets_BTW.shape
        return tuple(a.reshape(batch, time, rank, window) for a in (found_M1 - lse_M1, lse_M1))  # type: ignore[return-value]

    def d_logits(
        self, logits_MV: Array, lse_BTRW: Array, targets_BTW: Array, d_logp_BTRW: Array, d_lse_BTRW: Array
    ) -> Array:
        """The gradient of the logits, from those of the scores."""
        index_M1, here_M1 = self._locate(targets_BTW, logits_MV)
        lse_M1, d_logp_M1, d_lse_M1 = (a.reshape(-1, 1) for a in (lse_BTRW, d_logp_BTRW, d_lse_BTRW))
        d_MV = (d_lse_M1 - d_logp_M1) * jnp.exp(logits_MV - lse_M1)
        rows = jnp.arange(index_M1.shape[0])
        return d_MV.at[rows, index_M1[:, 0]].add(jnp.where(here_M1, d_logp_M1, 0.0)[:, 0], unique_indices=True)

    def d_params(self, d_tables: Any) -> Any:
        """The gradient of the parameters, reduced over devices and split as they are."""
        (d_whole,) = self._pull(d_tables)
        return jax.tree.map(lambda d, w, spec: reduce_local(d, w, spec), d_whole, self.params, self.specs)

    def _locate(self, targets_BTW: Array, logits_MV: Array) -> tuple[Array, Array]:
        """Where the target's logit is in each row, `[M, 1]` (anywhere, if not here), and whether this device has it."""
        rows, size = logits_MV.shape
        batch, time, window = targets_BTW.shape
        shape = (batch, time, rows // targets_BTW.size, window)
        index_M1 = jnp.broadcast_to(targets_BTW[:, :, None], shape).reshape(-1, 1)
        if self.split:
            index_M1 = index_M1 - lax.axis_index("tensor") * size
        return jnp.clip(index_M1, 0, size - 1), (index_M1 >= 0) & (index_M1 < size)


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)
