"""What the loop asks of a verifier."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from mtp_jax.decode.law import Sampling


class Verdict(NamedTuple):
    """`tokens_BT`: what to commit from the front. `accepted_B`: how many drafts that includes; one more is due."""

    tokens_BT: Array
    accepted_B: Array


class Verifier(Protocol):
    """A rule that leaves the law of the output equal to the target's, whatever was drafted."""

    def noise(self, sampling: Sampling, positions_BT: Array, vocab_size: int) -> Array | None:
        """The randomness for the tokens at these absolute positions, shared by draft and target; None if none."""
        ...

    def law(self, logp_BTV: Array, sampling: Sampling, *, filtered: bool) -> Array:
        """Log-probabilities to the logits that are chosen from."""
        ...

    def choose(self, logits_BTV: Array, noise_BTV: Array | None) -> Array:
        """A token at each position, `[B, T]`."""
        ...

    def verify(self, logits_BTV: Array, draft_Bk: Array, noise_BTV: Array | None) -> Verdict:
        """Compare k drafts with the target's logits at k + 1 positions."""
        ...


def match_prefix(chosen_BT: Array, draft_Bk: Array) -> Verdict:
    """Accept drafts while they equal the target's choices, and commit the choices.

    Given that drafts 1..i-1 equal what the target chose, its choice at i follows its own law, whatever the draft.
    """
    agree_Bk = (chosen_BT[:, : draft_Bk.shape[1]] == draft_Bk).astype(jnp.int32)
    return Verdict(chosen_BT, jnp.sum(jnp.cumprod(agree_Bk, axis=1), axis=1, dtype=jnp.int32))
