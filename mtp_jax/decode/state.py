"""What one decode iteration hands to the next."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from mtp_jax.model.cache import Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of a ragged batch. Position i of a row is its i-th token, prompt included.

    `tokens_BS`: tokens; those at `length_B` and after are not committed. `limit_B`: the length at which a row ends.
    `done_B`: rows that have ended; they are frozen. `draft_Bk`: drafts for the positions from `length_B`.
    `noise_BTV`: the verifier's noise for the k + 1 positions from `length_B`, or None.
    `forwards_B`: target forwards of each row while it was live, prefill excluded. `accepted_Bk`: how often the draft
    at each offset was accepted.
    """

    tokens_BS: Array
    length_B: Array
    limit_B: Array
    done_B: Array
    draft_Bk: Array
    noise_BTV: Array | None
    cache: Cache
    forwards_B: Array
    accepted_Bk: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stops:
    """Token ids that end a row when they are committed, `[n]`; n may be 0."""

    ids_n: Array

    def hit(self, tokens_BT: Array) -> Array:
        """Which tokens are stops, `[B, T]`."""
        return jnp.any(tokens_BT[:, :, None] == self.ids_n[None, None], axis=-1)
