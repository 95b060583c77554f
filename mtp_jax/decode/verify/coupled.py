"""Noise-coupled sampling (Daliri, Musco and Suresh, arXiv 2408.07978).

Target and draft are sampled by the Gumbel-max trick with the same noise, keyed by (row seed, absolute position). The
target's token at a position is a function of its law and that noise alone, so the output equals plain sampling with
the same seed token for token, whatever was drafted; a draft that is close to the target picks the same token.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from mtp_jax.decode.law import Sampling, gumbel, process_logits
from mtp_jax.decode.verify.base import Verdict, match_prefix


class Coupled:
    """argmax(logits + noise) for both; rows of temperature 0 are greedy."""

    def noise(self, sampling: Sampling, positions_BT: Array, vocab_size: int) -> Array | None:
        """Gumbel noise `[B, T, V]`."""
        return gumbel(sampling.key_B, positions_BT, vocab_size)

    def law(self, logp_BTV: Array, sampling: Sampling, *, filtered: bool) -> Array:
        """See `process_logits`."""
        return process_logits(logp_BTV, sampling, filtered=filtered)

    def choose(self, logits_BTV: Array, noise_BTV: Array | None) -> Array:
        """A sample of softmax(logits), `[B, T]`."""
        assert noise_BTV is not None
        return jnp.argmax(logits_BTV + noise_BTV, axis=-1).astype(jnp.int32)

    def verify(self, logits_BTV: Array, draft_Bk: Array, noise_BTV: Array | None) -> Verdict:
        """See `match_prefix`."""
        return match_prefix(self.choose(logits_BTV, noise_BTV), draft_Bk)
