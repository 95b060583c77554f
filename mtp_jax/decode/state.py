"""State of decoding: what one iteration hands to the next."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mtp_jax.model.cache import Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of a ragged batch. Position i of a row is its i-th token, prompt included.

    `tokens_BS`: tokens; those at `length_B` and after are not committed. `logp_BS`: the target's log-probability of
    each token that was decoded. `accepted_BS`: whether it is an accepted draft; None where nothing is drafted.
    `finite_B`: whether all log-probabilities are numbers.
    `limit_B`: the length at which a row ends. `done_B`: rows that have ended; they are frozen.
    `draft_Bk`: drafts for the positions from `length_B`. `draft_len_B`: how many of them the row uses; the others are
    not looked at. `most_B`: the most that it may ever use.
    `noise_BTV`: the verifier's noise for the k + 1 positions from `length_B`, or None.
    `logq_BkV`: the laws that the drafts were drawn from, for verifiers that ask for them, or None.
    `cache`: the trunk's. `head_cache`: the head's own, an empty tree if it has none or nothing is drafted.
    `forwards_B`: target forwards of each row while it was live, prefill excluded. `drafted_Bk`, `accepted_Bk`: how
    often a draft at each offset was used, and accepted.
    """

    tokens_BS: Array
    logp_BS: Array
    accepted_BS: Array | None
    finite_B: Array
    length_B: Array
    limit_B: Array
    done_B: Array
    draft_Bk: Array
    draft_len_B: Array
    most_B: Array
    noise_BTV: Array | None
    logq_BkV: Array | None
    cache: Cache
    head_cache: Any
    forwards_B: Array
    drafted_Bk: Array
    accepted_Bk: Array

    def narrowed(self, k: int) -> DecodeState:
        """A copy for a loop with k drafts, of those that there are: the prompts need not be read again for it."""
        cut = {name: getattr(self, name)[:, :k] for name in ("draft_Bk", "drafted_Bk", "accepted_Bk")}
        cut |= {name: jnp.minimum(getattr(self, name), k) for name in ("draft_len_B", "most_B")}
        cut["noise_BTV"] = None if self.noise_BTV is None else self.noise_BTV[:, : k + 1]
        cut["logq_BkV"] = self.logq_BkV[:, :k] if k and self.logq_BkV is not None else None
        if not k:
            cut |= {"accepted_BS": None, "head_cache": ()}
        return jax.tree.map(jnp.copy, dataclasses.replace(self, **cut))
