"""Law of the target: temperature, top-k and top-p, by one function for plain and for speculative decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax import arrays
from mtp_jax.arrays import NEVER
from mtp_jax.heads.config import HeadConfig
from mtp_jax.sharding import platform

CHOOSE, ACCEPT = 0, 1  # what randomness is for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How each row samples. `top_k_B` 0 and `top_p_B` 1 leave the law whole; temperature 0 is the argmax."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    key_B: Array


def process_logits(logp_BTV: Array, sampling: Sampling, *, filtered: bool) -> Array:
    """Log-probabilities of the model to unnormalised logits of the law that is sampled, in float32.

    Temperature first, then top-k, then top-p of what is left. Ties at the k-th place are all kept; top-p keeps the
    fewest most likely tokens whose mass reaches p, and ties with the last of them. A row of temperature 0 gets a point
    mass on its argmax.

    Args:
      logp_BTV: log-probabilities at T positions.
      sampling: the rows' settings.
      filtered: static; whether any row sets top-k or top-p. Nothing is searched for if not.
    """
    temperature = sampling.temperature_B[:, None, None]
    logits_BTV = logp_BTV / jnp.where(temperature > 0, temperature, 1.0)
    if filtered:
        logits_BTV = _filter(logits_BTV, sampling.top_k_B[:, None, None], sampling.top_p_B[:, None, None])
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logp_BTV.shape[-1]), 2)
    greedy_BTV = jnp.where(vocabulary == argmax(logp_BTV)[..., None], 0.0, NEVER)
    return jnp.where(temperature > 0, logits_BTV, greedy_BTV)


def of_drafts(sampling: Sampling, head: HeadConfig) -> Sampling:
    """How each row samples what the head says: at the row's temperature over that of the law which the head learnt,
    times the head's `draft_temperature`. Of a head that learnt at the row's temperature, and 1, that is its law itself.
    """
    hot_B = sampling.temperature_B * head.draft_temperature
    # Further out, ids that are ruled out would have a probability, or none a number.
    hot_B = jnp.where(hot_B > 0, jnp.clip(hot_B / head.temperature, 1e-6, 1e6), 0.0)
    return dataclasses.replace(sampling, temperature_B=hot_B)


def argmax(x: Array) -> Array:
    """The index of the largest along the last axis, the first of several, as int32; any where one is not a number."""
    if platform() != "cpu":
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    # XLA compares pairs of a number and its index one by one on a CPU, and either alone many at a time.
    ids = lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)
    found = jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, x.shape[-1]), axis=-1)
    return jnp.where(found < x.shape[-1], found, 0)


def _filter(logits_BTV: Array, top_k: Array, top_p: Array) -> Array:
    """`NEVER` for what top-k, and then top-p, leave out. Both are sums and no sort: a split vocabulary stays split."""
    size, top = logits_BTV.shape[-1], jnp.max(logits_BTV, axis=-1, keepdims=True)
    # Ids that are ruled out stay so, whatever the temperature made of NEVER.
    low = jnp.min(jnp.where(logits_BTV > 1e-6 * NEVER, logits_BTV, jnp.inf), axis=-1, keepdims=True)
    count = jnp.where((top_k > 0) & (top_k < size), top_k, 0).astype(jnp.float32)
    kth = _edge(logits_BTV, jnp.ones_like, count, low, top)

    def mass(logits: Array) -> Array:
        return jnp.where(logits >= kth, jnp.exp(logits - top), 0.0)

    whole = jnp.sum(mass(logits_BTV), axis=-1, keepdims=True)
    least = _edge(logits_BTV, mass, jnp.where(top_p < 1, top_p * whole, 0.0), kth, top)
    return jnp.where(logits_BTV >= least, logits_BTV, NEVER)


def _edge(logits_BTV: Array, weigh: Callable[[Array], Array], need: Array, low: Array, top: Array) -> Array:
    """A bound in `low .. top` that no more logits reach than must for weights that sum to `need`; `low` if that is 0.

    Bisection over the floats in their order: about 17 sums over the vocabulary, where a sort takes as long as 400.
    """
    weight_BTV = weigh(logits_BTV)

    def live(between: tuple[Array, Array, Array, Array]) -> Array:
        below, above, more, less = between
        # Two logits between the bounds weigh at least twice what the lower bound does.
        return (need > 0) & (above - below > 1) & (more - less > 1.5 * weigh(_float(below)))

    def halve(between: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        below, above, more, less = between
        # Their sum may not fit.
        middle = (below >> 1) + (above >> 1) + (below & above & 1)
        sum_BT1 = jnp.sum(jnp.where(logits_BTV >= _float(middle), weight_BTV, 0.0), axis=-1, keepdims=True)
        enough, moves = sum_BT1 >= need, live(between)
        up, down = moves & enough, moves & ~enough
        return (
            jnp.where(up, middle, below),
            jnp.where(down, middle, above),
            jnp.where(up, sum_BT1, more),
            jnp.where(down, sum_BT1, less),
        )

    start = _rank(low), _rank(top) + 1, jnp.full_like(low, jnp.inf), jnp.zeros_like(low)
    return _float(lax.while_loop(lambda between: jnp.any(live(between)), halve, start)[0])


def _rank(a: Array) -> Array:
    """Floats as integers in the same order: neighbours are neighbours."""
    bits = lax.bitcast_convert_type(a, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _float(rank: Array) -> Array:
    """What `_rank` takes."""
    return lax.bitcast_convert_type(jnp.where(rank < 0, rank ^ 0x7FFFFFFF, rank), jnp.float32)


def gumbel(key_B: Array, positions_BT: Array, vocab_size: int) -> Array:
    """Noise `[B, T, V]` that is a function of each row's key and the absolute position of the token it chooses."""

    keys_BT = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(key_B, positions_BT)
    return gumbel_of(arrays.random_bits(keys_BT, vocab_size))


def gumbel_of(bits: Array) -> Array:
    """Gumbel noise in float32, the larger the smaller the uint32 `bits`, that is right for chances down to 2^-32.

    That of `jax.random.gumbel` ends at 2^-23, and a large vocabulary has many tokens behind that.
    """
    u = ((bits >> 1).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))  # in float32 the largest u is 1


def block_keys(sampling: Sampling, start_B: Array, purpose: int) -> Array:
    """Keys `[B]` for what is drawn once for the block of drafts that starts at these absolute positions.

    `purpose` is CHOOSE or ACCEPT.
    """
    return jax.vmap(lambda key, start: jax.random.fold_in(jax.random.fold_in(key, start), purpose))(
        sampling.key_B, start_B
    )
