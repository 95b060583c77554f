"""The log-likelihood of a mixture of products, in tiles of positions, with the gradient formed in the forward pass.

With M_s = logsumexp_r(log w_r + sum_{j<=s} log p_rj(x_j)) and M_0 = 0, offset s has log-likelihood M_s - M_{s-1}.
The components of a position hang together and positions do not, so a tile of positions has its logits, its loss and its
gradient while it is in hand, and leaves only sums: beside the tables and their gradient, memory is that of a tile, and
each logit costs three products, the least there is (logits, gradient of the rows, gradient of the table).

The tiles are local to a device (`losses.tiles`), and what devices exchange is written there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.losses.draws import draw_components
from mtp_jax.losses.tiles import Device, Form
from mtp_jax.sharding import like, vary


@dataclass(frozen=True)
class Terms:
    """The weights of the loss: offset s counts `gamma**(s-1)`; `z_weight` is on the mean square of log-normalisers.

    With `draws` > 0 the backward pass sees that many components of each position and offset, drawn at random.
    """

    gamma: float = 1.0
    z_weight: float = 0.0
    draws: int = 0


def mixture_loss(
    form: Form,
    terms: Terms,
    params: Any,
    x_BTD: Array,
    log_w_BTR: Array,
    targets_BTW: Array,
    weights_BTW: Array,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """sum_s gamma^(s-1) nll_s + z_weight z, where nll_s = -sum_bt weights_bts log q(x_s | x_<s).

    z is the sum over all targets of weights_bts times the mean over r of the square of log sum_v exp(logits_rsv).

    Args:
      form: how logits come from `params`.
      terms: weights of the parts.
      params: any tree of arrays, as they are stored (split over `fsdp` and `tensor`); differentiated.
      x_BTD: hidden states, differentiated. Products are in their dtype, with float32 sums.
      log_w_BTR: log weights of the components, normalised, float32, differentiated.
      targets_BTW: the column of each target in its logits (a token id, but for a shortlist). A masked target masks (by
        its weight) itself only, so mask all offsets after it too.
      weights_BTW: weight of every target, 0 where masked.
      key: for `terms.draws`, which also needs a form with `rows` under one unembedding, `unembed_VD`.

    Returns:
      the loss, and nll `[W]`, which is reported and carries no gradient.

    Raises:
      ValueError: `terms.draws` without a key, with z-loss, or with a form that has no `rows`.
    """
    if terms.draws and (key is None or terms.z_weight or not hasattr(form, "rows")):
        raise ValueError(
            f"draws is {terms.draws}, key {key}, z_weight {terms.z_weight}, form {form}: drawing needs a key, "
            "no z-loss, and a form with rows under one unembedding."
        )
    key = jax.random.key(0) if key is None else key
    return _mixture_loss(form, terms, params, x_BTD, log_w_BTR, targets_BTW, weights_BTW, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixture_loss(
    form: Form, terms: Terms, params: Any, x: Array, log_w: Array, targets: Array, weights: Array, _: Array
) -> Any:
    """`mixture_loss` where no gradient is asked for: forward only."""
    logp, lse = factor_scores(form, params, x, targets)
    return _objective(terms, logp, lse, log_w, weights)


def _loss_forward(
    form: Form, terms: Terms, params: Any, x: Array, log_w: Array, targets: Array, weights: Array, key: Array
) -> Any:
    arrays = (x, log_w, targets, weights, key)
    specs = _specs((params, *arrays))

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=((P(), P()), specs[:3]))
    def local(params: Any, *arrays: Array) -> Any:
        x, log_w, targets, weights, key = arrays
        device = Device(form, params, specs[0], x)
        weights = weights / device.copies

        def tile(carry: Any, numbered: tuple[Array, tuple[Array, ...]]) -> Any:
            number, (x, log_w, targets, weights) = numbered
            logits, pull = device.logits(x)
            logp, lse = device.scores(logits, targets)
            objective = jax.value_and_grad(functools.partial(_objective, terms), argnums=(0, 1, 2), has_aux=True)
            value, (d_logp, d_lse, d_log_w) = objective(logp, lse, log_w, weights)
            if terms.draws:
                draw = draw_components(jax.random.fold_in(device.key(key), number), d_logp, terms.draws)
                d_tables, d_x = device.pull_drawn(draw, logits, lse, targets, x)
            else:
                d_tables, d_x = pull(device.d_logits(logits, lse, targets, d_logp, d_lse))
            return jax.tree.map(jnp.add, carry, (d_tables, value)), (like(d_x, x), like(d_log_w, log_w))

        value = jnp.zeros((), log_w.dtype), jnp.zeros(targets.shape[-1], log_w.dtype)
        zeros = device.zeros(), jax.tree.map(lambda a: vary(a, but=device.split), value)
        tiles = device.tiles((x, log_w, targets, weights))
        (d_tables, value), (d_x, d_log_w) = lax.scan(tile, zeros, (jnp.arange(tiles[0].shape[0]), tiles))
        gradients = device.d_params(d_tables), *(device.untile(a, x) for a in (d_x, d_log_w))
        return jax.tree.map(lambda a: like(a, jnp.zeros(())), value), gradients

    return local(params, *arrays)


def _loss_backward(form: Form, terms: Terms, gradients: Any, cotangents: tuple[Any, Any]) -> Any:
    scaled = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return *scaled, None, None, None


_mixture_loss.defvjp(_loss_forward, _loss_backward)


def mixture_log_likelihood(form: Form, params: Any, x_BTD: Array, log_w_BTR: Array, targets_BTW: Array) -> Array:
    """log q(x_s | x_<s) by offset, `[B, T, W]` in nats, by the same tiles. Arguments as in `mixture_loss`."""
    return conditionals(factor_scores(form, params, x_BTD, targets_BTW)[0], log_w_BTR)


def factor_scores(form: Form, params: Any, x_BTD: Array, targets_BTW: Array) -> tuple[Array, Array]:
    """log p_rs(x_s | h) and the log-normaliser of every factor, each `[B, T, R, W]` in float32.

    For losses whose cotangents are not known in advance: the backward pass computes the logits again, tile by tile, so
    each costs four products. Arguments as in `mixture_loss`; differentiated in `params` and `x_BTD`.
    """
    return _factor_scores(form, params, x_BTD, targets_BTW)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _factor_scores(form: Form, params: Any, x: Array, targets: Array) -> Any:
    return _scores_forward(form, params, x, targets)[0]


def _scores_forward(form: Form, params: Any, x: Array, targets: Array) -> Any:
    specs = _specs((params, x, targets))
    rows = P(specs[1][0], None, None, None)

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=(rows, rows))
    def local(params: Any, x: Array, targets: Array) -> Any:
        device = Device(form, params, specs[0], x)

        def tile(_: None, arrays: tuple[Array, ...]) -> Any:
            return None, device.scores(device.logits(arrays[0])[0], arrays[1])

        scores = lax.scan(tile, None, device.tiles((x, targets)))[1]
        # Where devices computed the same, each gives its share of it.
        return jax.tree.map(lambda a: like(device.untile(a, x) / device.copies, x), scores)

    scores = local(params, x, targets)
    return scores, (params, x, targets, scores[1])


def _scores_backward(form: Form, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    specs = _specs((*residuals, *cotangents))

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=specs[:2])
    def local(params: Any, x: Array, targets: Array, *arrays: Array) -> Any:
        device = Device(form, params, specs[0], x)

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


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)
