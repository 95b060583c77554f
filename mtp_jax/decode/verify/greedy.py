"""Greedy prefix match, for temperature 0: the output is the argmax chain of the target."""

from __future__ import annotations

from jax import Array

from mtp_jax.decode.law import Sampling, argmax
from mtp_jax.decode.verify.base import Verifier


class Greedy(Verifier):
    """Draft and target both take the argmax of their log-probabilities; temperature and filters do not matter."""

    def noise(self, sampling: Sampling, start_B: Array, width: int, vocab_size: int) -> Array | None:
        """None."""
        return None

    def law(self, logp_BTV: Array, sampling: Sampling, *, filtered: bool) -> Array:
        """The log-probabilities as they are."""
        return logp_BTV

    def choose(self, logits_BTV: Array, noise_BTV: Array | None) -> Array:
        """The argmax, `[B, T]`."""
        return argmax(logits_BTV)
