"""Law of the target: temperature, top-k and top-p, by one function for plain and for speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from mtp_jax.arrays import NEVER
from mtp_jax.sharding import RULES

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
      filtered: static; whether any row sets top-k or top-p. Sorting is skipped if not.
    """
    temperature = sampling.temperature_B[:, None, None]
    logits_BTV = logp_BTV / jnp.where(temperature > 0, temperature, 1.0)
    if filtered:
        logits_BTV = _filter(logits_BTV, sampling.top_k_B[:, None, None], sampling.top_p_B[:, None, None])
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logp_BTV.shape[-1]), 2)
    greedy_BTV = jnp.where(vocabulary == jnp.argmax(logp_BTV, axis=-1)[..., None], 0.0, NEVER)
    return jnp.where(temperature > 0, logits_BTV, greedy_BTV)


def _filter(logits_BTV: Array, top_k: Array, top_p: Array) -> Array:
    size, own = logits_BTV.shape[-1], jax.typeof(logits_BTV).sharding
    logits_BTV = jax.reshard(logits_BTV, RULES.x_BTD)  # a sort needs the whole vocabulary
    sorted_BTV = jnp.sort(logits_BTV, axis=-1, descending=True)
    rank = jax.lax.broadcasted_iota(jnp.int32, (1, 1, size), 2)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    kth = jnp.sum(jnp.where(rank == last, sorted_BTV, 0.0), axis=-1, keepdims=True)
    kept_BTV = jnp.where(sorted_BTV >= kth, sorted_BTV, NEVER)
    probs_BTV = jax.nn.softmax(kept_BTV, axis=-1)
    # Mass before a token: it is kept while the ones before it have not reached p. The first is always kept.
    before_BTV = jnp.cumsum(probs_BTV, axis=-1) - probs_BTV
    least = jnp.min(
        jnp.where((before_BTV < top_p) | (rank == 0) | (top_p >= 1), kept_BTV, jnp.inf), axis=-1, keepdims=True
    )
    # A law is split as it was without filters, so that a loop with them takes over from one without.
    return jax.reshard(jnp.where(logits_BTV >= jnp.maximum(least, kth), logits_BTV, NEVER), own)


def gumbel(key_B: Array, positions_BT: Array, vocab_size: int) -> Array:
    """Noise `[B, T, V]` that is a function of each row's key and the absolute position of the token it chooses."""

    def one(key: Array, position: Array) -> Array:
        return gumbel_of(jax.random.bits(jax.random.fold_in(key, position), (vocab_size,), jnp.uint32))

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(key_B, positions_BT)


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
