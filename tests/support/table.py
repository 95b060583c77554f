"""A table of known probabilities in place of the network, for the production loop and cache.

The law of a token is a row of the table, which the three tokens before it choose. They are read from the cache, as
attention would, so what is written or rolled back wrongly gives another law. The head drafts from a table of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Decoding
from mtp_jax.heads.base import Head, Seen
from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.cache import Cache, write
from mtp_jax.model.config import ModelConfig
from mtp_jax.sharding import RULES
from support import tiny
from support.laws import reference_law

VOCAB, WINDOW, PROMPT = 4, 4, [2, 0, 1]
CONTEXTS = VOCAB**3
STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableHead:
    """`logp_CV`: the target's law after each context. `logq_CV`: the draft's."""

    logp_CV: Array
    logq_CV: Array
    config: HeadConfig = dataclasses.field(default=HeadConfig(window=WINDOW), metadata=STATIC)

    has_cache = False

    def extend(self, cache: tuple[()], seen: Seen, next_BT: Array, start_B: Array, memo: None) -> tuple[Any, None]:
        return cache, memo

    def begin(self, seen: Seen, token_B: Array, **_: Any) -> Array:
        return self.condition(seen.x_BTD[:, 0], token_B)

    def next_log_probs(self, x_BD: Array) -> Array:
        return self.logq_CV.at[x_BD[:, 0].astype(jnp.int32)].get(out_sharding=RULES.tokens_BT)

    next_listed = Head.next_listed

    def condition(self, x_BD: Array, token_B: Array) -> Array:
        return x_BD % (CONTEXTS // VOCAB) * VOCAB + token_B[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableModel:
    """What decoding asks of a model. The hidden state is the number of the context."""

    head: TableHead
    config: ModelConfig = dataclasses.field(
        default=ModelConfig(VOCAB, 2, 2, num_layers=1, num_heads=1, num_kv_heads=1, dtype="float32"), metadata=STATIC
    )

    def target(self, seen: Seen) -> tuple[Array, None]:
        return self.head.logp_CV.at[seen.x_BTD[:, :, 0].astype(jnp.int32)].get(out_sharding=RULES.x_BTD), None

    def seen(self, x_BTD: Array, tokens_BT: Array, taps: tuple[()] = ()) -> Seen:
        return Seen(x_BTD, tokens_BT, None, taps, lambda tokens_BT: tokens_BT, None)

    def extend(self, tokens_BT: Array, cache: Cache, start_B: Array, attended: int | None = None) -> tuple[Seen, Cache]:
        new_BTKH = jnp.broadcast_to(tokens_BT[:, :, None, None], (*tokens_BT.shape, 1, 2))
        new_BTKH = jax.reshard(new_BTKH, RULES.qkv_BTNH)
        cache = [(write(k_BKSH, new_BTKH, start_B), write(v_BKSH, new_BTKH, start_B)) for k_BKSH, v_BKSH in cache]
        width = tokens_BT.shape[1]

        def read(row_S: Array, start: Array) -> Array:
            return lax.dynamic_slice(jnp.pad(row_S, (2, 0)), (start,), (width + 2,))

        k_BKSH = jax.reshard(cache[0][0], RULES.mask_B1TS)
        seen_BT = jax.vmap(read)(k_BKSH[:, 0, :, 0], start_B)
        context_BT = (seen_BT[:, :-2] * VOCAB + seen_BT[:, 1:-1]) * VOCAB + seen_BT[:, 2:]
        return self.seen(context_BT[:, :, None], tokens_BT), cache


def tables() -> dict[str, np.ndarray]:
    """Probabilities `[C, V]`: the target's, and those of a good, a bad and an adversarial draft.

    The adversarial one is certain of the token that is least likely.
    """
    rng = np.random.default_rng(0)
    target_CV, bad_CV = (rng.dirichlet([1.0] * VOCAB, CONTEXTS) for _ in range(2))
    good_CV = 0.85 * target_CV + 0.15 * rng.dirichlet([1.0] * VOCAB, CONTEXTS)
    adversarial_CV = np.eye(VOCAB)[target_CV.argmin(axis=1)]
    return {"target": target_CV, "good": good_CV, "bad": bad_CV, "adversarial": adversarial_CV}


def table_model(target_CV: np.ndarray, draft_CV: np.ndarray, **head: Any) -> TableModel:
    """`head`: fields of its config."""
    with np.errstate(divide="ignore"):
        laws = [jnp.asarray(np.log(a), jnp.float32) for a in (target_CV, draft_CV)]
    return TableModel(TableHead(*laws, HeadConfig(window=WINDOW, **head)))


def table_decoding(
    model: TableModel, rows: int, new: int, verifier: str, law=(1.0, 0, 1.0), **options: Any
) -> Decoding:
    """`rows` rows of one prompt, with seeds 0, 1, 2, ...; temperature and `k` may be one value for each row."""
    temperature, top_k, top_p = law
    config = DecodeConfig(new, temperature, top_k, top_p, verifier=verifier, **options)
    decoding = Decoding(model, [PROMPT] * rows, config)  # type: ignore[arg-type]
    # No more slots than are used: there are many rows.
    decoding.plan = dataclasses.replace(decoding.plan, slots=len(PROMPT) + new + WINDOW)
    decoding.prompt_BP = tiny.shard(np.tile(np.array(PROMPT, np.int32), (rows, 1)))
    return decoding


def joint_law(target_CV: np.ndarray, new: int, law) -> np.ndarray:
    """The exact joint law of the `new` tokens behind the prompt, `[V] * new`, in float64."""
    law_CV = np.stack([reference_law(row, *law) for row in np.log(target_CV)])
    joint = np.ones([VOCAB] * new)
    for tokens in itertools.product(range(VOCAB), repeat=new):
        row = [*PROMPT, *tokens]
        for i, token in enumerate(tokens):
            context = (row[i] * VOCAB + row[i + 1]) * VOCAB + row[i + 2]
            joint[tokens] *= law_CV[context, token]
    return joint
