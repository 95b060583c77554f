"""Noise-coupled sampling (Daliri, Musco and Suresh, arXiv 2408.07978).

Target and draft are sampled by the Gumbel-max trick with the same noise, keyed by (row seed, absolute position). The
target's token at a position is a function of its law and that noise alone, so the output equals plain sampling with
the same seed token for token, whatever was drafted; a draft that is close to the target picks the same token.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from mtp_jax.decode.law import Sampling, gumbel
from mtp_jax.decode.verify.base import Sampled


class Coupled(Sampled):
    """argmax(logits + noise) for both."""

    def noise(self, sampling: Sampling, start_B: Array, width: int, vocab_size: int) -> Array | None:
        """Gumbel noise `[B, width, V]`, a position's own."""
        return gumbel(sampling.key_B, start_B[:, None] + jnp.arange(width, dtype=jnp.int32)[None], vocab_size)
