"""A head with a cache of its own, small enough to see through: a tally of the tokens that were committed.

Entry p is a vector of logits, of the token behind position p and of what the trunk saw there. The law of the token at
offset 2 behind p is the softmax of the sum of the entries up to p, older ones weighing less; each token that is known
beyond adds a vector of its own. Offset 1 is the model's own law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.heads.base import Aux, Head, Seen
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.registry import HEADS
from mtp_jax.model.config import ModelConfig
from mtp_jax.parameters import PARAMETERS, Parameter, init_weight
from mtp_jax.sharding import RULES
from support import tiny

MEMORY = 0.8  # what an entry weighs one position later


@dataclass(frozen=True)
class TallyDraft:
    """Logits of the next token, and the positions' tables."""

    logits_BV: Array


class TallyHead(Head):
    """The head of this file. `shift` is for faults: how far off entries are written."""

    shift = 0

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        size = model.vocab_size
        self.behind_VV = init_weight(rngs, "behind_VV", (size, size), 3.0)
        self.beyond_VV = init_weight(rngs, "beyond_VV", (size, size), 3.0)

    @property
    def has_cache(self) -> bool:
        """It has."""
        return True

    @property
    def taps(self) -> tuple[int, ...]:
        """The first layer."""
        return (1,)

    def entries(self, seen: Seen, next_BT: Array) -> Array:
        """`[B, T, V]`."""
        (tap_BTD,) = seen.taps
        strength_BT1 = 1 + jnp.tanh((seen.x_BTD + tap_BTD)[..., :1].astype(jnp.float32))
        return strength_BT1 * _rows(self.behind_VV[...], next_BT)

    def init_cache(self, batch: int, slots: int) -> Array:
        """No entries, `[B, S, V]`. What is not written is not zero, as nothing may depend on it."""
        return jnp.full((batch, slots, self.behind_VV.shape[0]), 7.0, out_sharding=RULES.x_BTD)

    def extend(self, cache: Array, seen: Seen, next_BT: Array, start_B: Array, memo: Any) -> tuple[Array, Any]:
        """Entries in their places."""
        put = jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at, 0)))
        return put(cache, self.entries(seen, next_BT), start_B + self.shift), memo

    def begin(
        self,
        seen: Seen,
        token_B: Array,
        *,
        window: int,
        cache: Any = (),
        position_B: Array | None = None,
        memo: Any = None,
    ) -> TallyDraft:
        """The tally up to the position. What `token_B` says is in its entry already."""
        age_BS = position_B[:, None] - jnp.arange(cache.shape[1], dtype=jnp.int32)[None]
        weight_BS = jnp.where(age_BS >= 0, MEMORY ** age_BS.astype(jnp.float32), 0.0)
        return TallyDraft(jnp.sum(weight_BS[..., None] * cache, axis=1))

    def next_log_probs(self, draft: TallyDraft) -> Array:
        """`[B, V]`."""
        return jax.nn.log_softmax(draft.logits_BV, axis=-1)

    def condition(self, draft: TallyDraft, token_B: Array) -> TallyDraft:
        """One more token."""
        return TallyDraft(MEMORY * draft.logits_BV + _rows(self.beyond_VV[...], token_B[:, None])[:, 0])

    def log_likelihood(self, seen: Seen, targets_BTW: Array) -> Array:
        """By a scan over the whole text: no cache."""
        own_BTV = jax.reshard(jnp.einsum("btd,vd->btv", seen.x_BTD, seen.unembed_VD), RULES.x_BTD)
        logits = [own_BTV]
        entries_TBV = jnp.swapaxes(self.entries(seen, targets_BTW[..., 0]), 0, 1)
        step = lambda sum_BV, new_BV: (MEMORY * sum_BV + new_BV,) * 2  # noqa: E731
        tally_BTV = jnp.swapaxes(lax.scan(step, jnp.zeros_like(entries_TBV[0]), entries_TBV)[1], 0, 1)
        for s in range(1, targets_BTW.shape[-1]):
            logits.append(tally_BTV)
            tally_BTV = MEMORY * tally_BTV + _rows(self.beyond_VV[...], targets_BTW[..., s])
        hit_BTWV = jax.nn.one_hot(targets_BTW, own_BTV.shape[-1])
        return jnp.sum(hit_BTWV * jax.nn.log_softmax(jnp.stack(logits, axis=2), axis=-1), axis=-1)

    def loss(
        self,
        seen: Seen,
        targets_BTW: Array,
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
    ) -> tuple[Array, Aux]:
        """The negative log-likelihood behind the first offset, which is the model's own."""
        nll_W = -jnp.sum(weights_BTW * self.log_likelihood(seen, targets_BTW), axis=(0, 1))
        return jnp.sum(nll_W[1:]), {"loss_offset": nll_W}

    @classmethod
    def flops(cls, config: HeadConfig, model: ModelConfig, frozen: bool) -> tuple[float, float]:
        """None that count."""
        return 0.0, 0.0


def _rows(table_VV: Array, tokens_BT: Array) -> Array:
    return table_VV.at[tokens_BT].get(out_sharding=RULES.x_BTD)


def register(patch: pytest.MonkeyPatch, head: type[Head] = TallyHead) -> None:
    """Make `HeadConfig(kind="tally")` a head: a line for it, and one for each parameter."""
    patch.setitem(HEADS, "tally", head)
    for name in ("behind_VV", "beyond_VV"):
        patch.setitem(PARAMETERS, name, Parameter(P(None, None), (0,), (1,), matrix=False, exact=True))


def laws(model: Any, tokens_BT: np.ndarray, position_B: np.ndarray, offset: int) -> np.ndarray:
    """log q(. | the tokens before) at `offset` of the window behind each row's position, teacher-forced, `[B, V]`."""
    return np.asarray(_laws(model, tiny.shard(tokens_BT), tiny.shard(position_B), offset))


@jax.jit(static_argnames="offset")
def _laws(model: Any, tokens_BT: Array, position_B: Array, offset: int) -> Array:
    """For each token in the vocabulary in turn: the head's likelihood of it."""
    window, size = model.head.config.window, model.config.vocab_size
    seen = model.see(tokens_BT)
    ahead = [jnp.pad(tokens_BT[:, s:], ((0, 0), (0, s))) for s in range(1, window + 1)]
    targets_BTW = jnp.stack(ahead, axis=-1)

    def likelihood(token: Array) -> Array:
        wanted_BTW = jnp.where(jnp.arange(window)[None, None] == offset, token, targets_BTW)
        found_BTW = model.head.log_likelihood(seen, wanted_BTW)
        return jax.vmap(lambda row, at: row[at, offset])(found_BTW, position_B)

    return jnp.moveaxis(lax.map(likelihood, jnp.arange(size, dtype=jnp.int32)), 0, -1)
