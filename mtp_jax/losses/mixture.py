"""Log-likelihood of a mixture, in tiles of positions, with the gradient formed in the forward pass.

Offset s has log-likelihood logsumexp_r(log alpha_sr + log p_rs(x_s)), with weights alpha_s that the circuit carries
along the window. The components of a position hang together and positions do not, so a tile of positions has its
logits, its loss and its gradient while it is in hand, and leaves only sums: beside the tables and their gradient,
memory is that of a tile, and each logit costs three products, the least there is (logits, gradient of the rows,
gradient of the table).

The tiles are local to a device (`losses.tiles`), and what devices exchange is written there. Losses against the
target's law (`losses.target_law`) are of the same tiles and logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.losses.target_law import Against, Measure, TargetLaw
from mtp_jax.losses.tiles import Device, Form
from mtp_jax.sharding import gather_local, like, reduce_local, vary

if TYPE_CHECKING:
    from mtp_jax.heads.circuits import Circuit


@dataclass(frozen=True)
class Terms:
    """What is static in the loss: the circuit's law; offset s counts `gamma**(s-1)`, where the first of them is offset
    1 + `before` of the window; `z_weight` is on the mean square of log-normalisers; ids from `known` on are ruled out
    (None: all are known). The log-likelihood counts `nll_weight`; `against`: the terms against the target's law."""

    law: type[Circuit]
    gamma: float = 1.0
    z_weight: float = 0.0
    known: int | None = None
    before: int = 0
    nll_weight: float = 1.0
    against: Against | None = None

    def gamma_W(self, window: int, dtype: Any) -> Array:
        """The weights of so many offsets."""
        return self.gamma ** (self.before + jnp.arange(window, dtype=dtype))


def mixture_loss(
    form: Form, terms: Terms, params: Any, x_BTD: Array, latent: Any, targets_BTW: Array, weights_BTW: Array
) -> tuple[Array, Array]:
    """sum_s gamma^(s-1) nll_s + z_weight z, where nll_s = -sum_bt weights_bts log q(x_s | x_<s).

    z is the sum over all targets of weights_bts times the mean over r of the square of log sum_v exp(logits_rsv).

    Args:
      form: how logits come from `params`.
      terms: the circuit's law and weights of the parts.
      params: any tree of arrays, as they are stored (split over `fsdp` and `tensor`); differentiated.
      x_BTD: hidden states, differentiated. Products are in their dtype, with float32 sums.
      latent: the circuit's, `[B, T, R]` in float32; differentiated. What it unfolds to is formed in the tile, from the
        circuit's own tables among `params`.
      targets_BTW: the column of each target in its logits (a token id, but for a shortlist). A masked target masks (by
        its weight) itself only, so mask all offsets after it too.
      weights_BTW: weight of every target, 0 where masked.

    Returns:
      the loss, and nll `[W]`, which is reported and carries no gradient.
    """
    found: Any = _mixture_loss(form, terms, params, x_BTD, latent, targets_BTW, weights_BTW, None)
    return found[0], found[1]["loss_offset"]


def mixture_loss_against(
    form: Form,
    terms: Terms,
    params: dict[str, Any],
    x_BTD: Array,
    latent: Any,
    targets_BTW: Array,
    weights_BTW: Array,
    law: TargetLaw,
) -> tuple[Array, dict[str, Array]]:
    """`mixture_loss` and the terms of `terms.against`; `law` is what the target's law is formed from, undifferentiated.

    Returns:
      the loss, and sums `[W]` that carry no gradient: nll as `loss_offset`, `kl_offset`, `overlap_offset`, and
      `acceptance_offset` and `lk_offset` where they have a weight; each weighted by `weights_BTW` or `law.weights_BTW`.
    """
    return _mixture_loss(form, terms, params, x_BTD, latent, targets_BTW, weights_BTW, law)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixture_loss(
    form: Form, terms: Terms, params: Any, x: Array, latent: Any, targets: Array, weights: Array, law: TargetLaw | None
) -> Any:
    """(loss, sums by name) where no gradient is asked for: forward only."""
    if law is not None or terms.law.TABLES:
        return _in_tiles(form, terms, False, params, x, latent, targets, weights, law)[0]
    logp, lse = factor_scores(form, params, x, targets, terms.known)
    return _objective(terms, logp, lse, latent, weights)


def _in_tiles(
    form: Form,
    terms: Terms,
    gradient: bool,
    params: Any,
    x: Array,
    latent: Any,
    targets: Array,
    weights: Array,
    law: TargetLaw | None,
) -> Any:
    """(loss, sums by name), and the gradients of (params, x, latent), or None in their place."""
    arrays = (x, latent, targets, weights)
    specs = _specs((params, *arrays, law))
    window, law_specs = targets.shape[-1], specs[-1]  # the latter None, or as `law` is

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=((P(), P()), specs[:3] if gradient else None))
    def local(params: Any, x: Array, latent: Any, targets: Array, weights: Array, law: TargetLaw | None) -> Any:
        against = terms.against if law else None
        beside = against.beside({**params, **law.tables}, law.normalised) if against and law else 0
        own = {name: params[name] for name in terms.law.TABLES if name in params}
        factors, split = ({n: a for n, a in of.items() if n not in own} if own else of for of in (params, specs[0]))
        more = latent.dtype.itemsize * terms.law.unfolds(own)
        device, measure = Device(form, factors, split, x, terms.known, beside, more), None
        # Alike on the devices that share the vocabulary, as the scores are.
        tables = {name: gather_local(w, specs[0][name], x.dtype, device.split) for name, w in own.items()}
        tiles = device.tiles((x, latent, targets, weights / device.copies))
        if against and law:
            gamma_W = terms.gamma_W(window, weights.dtype)
            measure = Measure(against, device, law, law_specs.tables, gamma_W, terms.before)
            tiles = *tiles, *measure.tiles(law.weights_BTW / device.copies)

        def tile(carry: Any, arrays: tuple[Any, ...]) -> Any:
            x, latent, targets, weights, *at = arrays
            logits, pull = device.logits(x)
            logp, lse = device.scores(logits, targets)
            unfolded, fold = jax.vjp(terms.law.unfold, tables, latent, vary(x, but=device.split))
            objective = jax.value_and_grad(functools.partial(_objective, terms), argnums=(0, 1, 2), has_aux=True)
            value, (d_logp, d_lse, d_unfolded) = objective(logp, lse, unfolded, weights)
            u = None
            if measure:
                weigh = functools.partial(prefix_weights, terms.law)
                log_alpha, pull_alpha = jax.vjp(weigh, unfolded, logp)
                law_weights, number = at
                (loss, sums), d_log_alpha, u = measure(law_weights, number, logits, lse, log_alpha)
                value = value[0] + loss, value[1] | sums
                more = pull_alpha(d_log_alpha)
                d_unfolded, d_logp = jax.tree.map(jnp.add, (d_unfolded, d_logp), more)
                d_lse = d_lse - d_log_alpha
            if not gradient:
                return jax.tree.map(jnp.add, carry, (None, value)), None
            d_logits = device.d_logits(logits, lse, targets, d_logp, d_lse)
            d_form, d_x = pull(d_logits if u is None else jax.tree.map(jnp.add, d_logits, u))
            d_own, d_latent, d_x_own = fold(d_unfolded)
            d_x = like(d_x, x) + like(d_x_own, x) if own else like(d_x, x)
            return jax.tree.map(jnp.add, carry, ((d_form, d_own), value)), (d_x, like(d_latent, latent))

        zeros_W = jnp.zeros(window, weights.dtype)
        value = zeros_W[0], dict.fromkeys(("loss_offset", *(against.reported if against else ())), zeros_W)
        value = jax.tree.map(lambda a: vary(a, but=device.split), value)
        zeros: Any = (device.zeros(), jax.tree.map(jnp.zeros_like, tables)) if gradient else None
        (d_tables, value), d = lax.scan(tile, (zeros, value), tiles)
        value = jax.tree.map(lambda a: like(a, jnp.zeros((), jnp.float32)), value)
        if not gradient:
            return value, None
        d_x, d_latent = (device.untile(a, like_BT=x) for a in d)
        d_own = {name: reduce_local(a, own[name], specs[0][name]) for name, a in d_tables[1].items()}
        d_params = device.d_params(d_tables[0])
        return value, ({**d_params, **d_own} if own else d_params, d_x, d_latent)

    return local(params, *arrays, law)


def _loss_forward(
    form: Form, terms: Terms, params: Any, x: Array, latent: Any, targets: Array, weights: Array, law: TargetLaw | None
) -> Any:
    return _in_tiles(form, terms, True, params, x, latent, targets, weights, law)


def _loss_backward(form: Form, terms: Terms, gradients: Any, cotangents: tuple[Any, Any]) -> Any:
    scaled = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return *scaled, None, None, None


_mixture_loss.defvjp(_loss_forward, _loss_backward)


def factor_scores(
    form: Form, params: Any, x_BTD: Array, targets_BTW: Array, known: int | None = None
) -> tuple[Array, Array]:
    """log p_rs(x_s | h) and the log-normaliser of every factor, each `[B, T, R, W]` in float32. Forward only.

    Arguments as in `mixture_loss` and `Terms`.
    """
    specs = _specs((params, x_BTD, targets_BTW))
    rows = P(specs[1][0], None, None, None)

    @functools.partial(jax.shard_map, in_specs=specs, out_specs=(rows, rows))
    def local(params: Any, x: Array, targets: Array) -> Any:
        device = Device(form, params, specs[0], x, known)

        def tile(_: None, arrays: tuple[Array, ...]) -> Any:
            return None, device.scores(device.logits(arrays[0])[0], arrays[1])

        scores = lax.scan(tile, None, device.tiles((x, targets)))[1]
        # Where devices computed the same, each gives its share of it.
        return jax.tree.map(lambda a: like(device.untile(a, x) / device.copies, x), scores)

    return local(params, x_BTD, targets_BTW)


def conditionals(law: type[Circuit], latent: Any, logp_BTRW: Array) -> Array:
    """log q(x_s | x_<s), `[B, T, W]`, from the circuit's `latent` and log p_rs(x_s)."""
    steps = _along(law, latent, logp_BTRW)
    return jnp.stack([jax.nn.logsumexp(log_alpha + score, axis=-1) for log_alpha, score in steps], axis=-1)


def prefix_weights(law: type[Circuit], latent: Any, logp_BTRW: Array) -> Array:
    """log alpha_sr, the components' weights at each offset given the tokens before: `[B, T, R, W]`."""
    return jnp.stack([log_alpha_BTR for log_alpha_BTR, _ in _along(law, latent, logp_BTRW)], axis=-1)


def _along(law: type[Circuit], latent: Any, logp_BTRW: Array) -> Iterator[tuple[Array, Array]]:
    """(log weights of the components, scores of the token there) from offset to offset."""
    carry, log_alpha_BTR = law.start(latent)
    window = logp_BTRW.shape[-1]
    for s in range(window):
        score_BTR = logp_BTRW[..., s]
        yield log_alpha_BTR, score_BTR
        if s + 1 < window:
            carry, log_alpha_BTR = law.advance(carry, score_BTR, s + 1)


def _objective(terms: Terms, logp_BTRW: Array, lse_BTRW: Array, latent: Any, weights_BTW: Array) -> Any:
    """(loss, sums by name) of positions, from the scores of their factors."""
    nll_W = -jnp.sum(weights_BTW * conditionals(terms.law, latent, logp_BTRW), axis=(0, 1))
    loss = jnp.sum(nll_W * terms.gamma_W(nll_W.shape[0], nll_W.dtype))
    if terms.nll_weight != 1:
        loss = terms.nll_weight * loss
    if terms.z_weight:
        loss = loss + terms.z_weight * jnp.sum(weights_BTW * jnp.mean(jnp.square(lse_BTRW), axis=2))
    return loss, {"loss_offset": nll_W}


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)
