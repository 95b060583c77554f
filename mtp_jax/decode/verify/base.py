"""Verifier protocol: what the loop asks of one, and what verifiers share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from mtp_jax.decode.law import Sampling, argmax, process_logits
from mtp_jax.decode.state import DecodeState


class Verdict(NamedTuple):
    """`tokens_BT`: what to commit from the front. `accepted_B`: how many drafts that includes; one more is due."""

    tokens_BT: Array
    accepted_B: Array


class Verifier(Protocol):
    """A rule that leaves the law of the output equal to the target's, whatever was drafted."""

    keeps_q: bool = False
    """Whether it compares probabilities: the law of every draft is then kept in the state, and else never formed."""

    def noise(self, sampling: Sampling, start_B: Array, width: int, vocab_size: int) -> Array | None:
        """The Gumbel noise `[B, width, V]` of the block of positions `start_B ..`; None if it takes none."""
        ...

    def law(self, logp_BTV: Array, sampling: Sampling, *, filtered: bool) -> Array:
        """Log-probabilities to the logits that are chosen from."""
        ...

    def choose(self, logits_BTV: Array, noise_BTV: Array | None) -> Array:
        """A token at each position, `[B, T]`."""
        ...

    def verify(self, logits_BTV: Array, state: DecodeState, sampling: Sampling) -> Verdict:
        """Judge the drafts of `state` by the target's logits at their positions and the one behind them.

        By default they are accepted while they equal the target's choices, which are committed. Given that drafts
        1..i-1 equal what the target chose, its choice at i follows its own law, whatever the draft.
        """
        chosen_BT, k = self.choose(logits_BTV, state.noise_BTV), state.draft_Bk.shape[1]
        return Verdict(chosen_BT, leading((chosen_BT[:, :k] == state.draft_Bk) & used(state)))


class Sampled(Verifier):
    """What verifiers that sample have in common; rows of temperature 0 are greedy under each of them."""

    def law(self, logp_BTV: Array, sampling: Sampling, *, filtered: bool) -> Array:
        """The law at the temperature of each row, filtered by its top-k and top-p."""
        return process_logits(logp_BTV, sampling, filtered=filtered)

    def choose(self, logits_BTV: Array, noise_BTV: Array | None) -> Array:
        """A sample of softmax(logits), `[B, T]`: the Gumbel-max trick."""
        assert noise_BTV is not None
        return argmax(logits_BTV + noise_BTV)


def used(state: DecodeState) -> Array:
    """Which of the k drafts each row uses, `[B, k]`."""
    return jnp.arange(state.draft_Bk.shape[1], dtype=jnp.int32)[None] < state.draft_len_B[:, None]


def leading(ok_Bk: Array) -> Array:
    """How many from the front are true, `[B]`."""
    return jnp.sum(jnp.cumprod(ok_Bk.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
