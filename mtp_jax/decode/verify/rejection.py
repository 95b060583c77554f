"""Rejection sampling of `token` and `block`: accept by the ratio p / q, then sample what the drafts left over.

Given the committed tokens, a draft x_i is drawn from q_i, kept with a chance that depends on p and q, and the token
behind the last accepted one is drawn from the normalised rest (rho p - q)^+. Behind the last draft that a row uses
q is 0, so the rest is the target's own law: a bonus token is no special case, and neither is a shorter draft, as long
as its length is decided before its tokens are drawn.

Randomness is keyed by (row seed, position where the block starts, purpose), and a row starts one block at a position.
A token's own position would not do: `block` looks at all drafts before it rejects some, so the noise of the rejected
ones is not fresh any more when their positions are drafted again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mtp_jax import arrays
from mtp_jax.decode.law import ACCEPT, CHOOSE, Sampling, block_keys, gumbel
from mtp_jax.decode.state import DecodeState
from mtp_jax.decode.verify.base import Sampled, Verdict, used


class Rejection(Sampled):
    """Subclasses say with which chance a draft is kept, and which of those kept are accepted."""

    keeps_q = True

    def noise(self, sampling: Sampling, start_B: Array, width: int, vocab_size: int) -> Array | None:
        """Gumbel noise `[B, width, V]`: of each draft, and last that of the token behind the accepted ones."""
        # The last is numbered 0, so that no row depends on how many drafts its neighbours may have.
        number_1T = (jnp.arange(1, width + 1, dtype=jnp.int32) % width)[None]
        return gumbel(block_keys(sampling, start_B, CHOOSE), jnp.zeros_like(start_B)[:, None] + number_1T, vocab_size)

    def chances(self, log_ratio_Bk: Array, p_BTV: Array, q_BTV: Array) -> tuple[Array, Array]:
        """The chance to keep each draft, `[B, k]`, and rho `[B, k + 1]` of the rest behind 0 .. k accepted ones.

        Args:
          log_ratio_Bk: log p - log q of the drafts.
          p_BTV: the target's law at k + 1 positions.
          q_BTV: the law that each draft was drawn from, 0 behind those that the row uses.
        """
        raise TypeError(f"{type(self).__name__} does not define chances.")

    def accepted(self, kept_Bk: Array) -> Array:
        """How many drafts are accepted, `[B]`, given which of them are kept."""
        raise TypeError(f"{type(self).__name__} does not define accepted.")

    def verify(self, logits_BTV: Array, state: DecodeState, sampling: Sampling) -> Verdict:
        """Accept drafts by the ratio of the target's probability to the draft's, and draw the next token."""
        draft_Bk, logq_BkV, noise_BTV = state.draft_Bk, state.logq_BkV, state.noise_BTV
        k, used_Bk = draft_Bk.shape[1], used(state)
        if k == 0:  # plain sampling
            return super().verify(logits_BTV, state, sampling)
        assert logq_BkV is not None and noise_BTV is not None
        logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        q_BTV = jnp.pad(jnp.where(used_Bk[:, :, None], jnp.exp(logq_BkV), 0.0), ((0, 0), (0, 1), (0, 0)))
        p_BTV = jnp.exp(logp_BTV)
        log_ratio_Bk = arrays.log_prob(logp_BTV[:, :k], draft_Bk) - arrays.log_prob(logq_BkV, draft_Bk)
        chance_Bk, rho_BT = self.chances(log_ratio_Bk, p_BTV, q_BTV)
        # Strictly: u may be 0, and what has no chance is never kept.
        accepted_B = self.accepted((uniform(sampling, state.length_B, k) < chance_Bk) & used_Bk)

        p_BV = arrays.at(p_BTV, accepted_B)
        rest_BV = rest(p_BV, arrays.at(q_BTV, accepted_B), arrays.at(rho_BT, accepted_B)[:, None])
        # Rounding may leave nothing where p and q are the same.
        rest_BV = jnp.where(jnp.max(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, p_BV)
        own_B1 = self.choose(jnp.log(rest_BV), noise_BTV[:, -1])[:, None]
        behind_BT = jnp.arange(k + 1, dtype=jnp.int32)[None] >= accepted_B[:, None]
        return Verdict(jnp.where(behind_BT, own_B1, jnp.pad(draft_Bk, ((0, 0), (0, 1)))), accepted_B)


def rest(p: Array, q: Array, rho: Array) -> Array:
    """(rho p - q)^+, of the shape of p."""
    return jnp.maximum(rho * p - q, 0.0)


def uniform(sampling: Sampling, start_B: Array, k: int) -> Array:
    """A uniform number in [0, 1) for each draft of the block that starts at `start_B`, `[B, k]`."""

    def one(key: Array, number: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, number), dtype=jnp.float32)

    # Numbers of each row's own: JAX cannot map a batch of one over what its rows share.
    number_Bk = jnp.zeros_like(start_B)[:, None] + jnp.arange(k, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(block_keys(sampling, start_B, ACCEPT), number_Bk)
