"""Prefill and the compiled loop: forward, verify, commit, draft."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax.decode.law import Sampling
from mtp_jax.decode.state import DecodeState, Stops
from mtp_jax.decode.verify import get_verifier
from mtp_jax.model.cache import Cache, init_cache
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.sharding import RULES


@dataclass(frozen=True)
class Plan:
    """What a loop is compiled for: `k` drafts per forward, the verifier, cache `slots`, whether top-k/p are used."""

    k: int
    verifier: str
    slots: int
    filtered: bool = False


def prefill(
    plan: Plan,
    model: LanguageModel,
    prompt_BP: Array,
    length_B: Array,
    limit_B: Array,
    sampling: Sampling,
    stops: Stops,
) -> DecodeState:
    """Read the prompts (padded on the right to P, `length_B` tokens each), commit one token and draft k."""
    x_BD, cache = read(model, prompt_BP, length_B, plan.slots)
    return begin(plan, model, x_BD, cache, prompt_BP, length_B, limit_B, sampling, stops)


@functools.partial(jax.jit, static_argnames="slots")
def read(model: LanguageModel, prompt_BP: Array, length_B: Array, slots: int) -> tuple[Array, Cache]:
    """The hidden state of each prompt's last token, and a cache of `slots` positions that holds the prompts.

    Padding is never seen: what it leaves in the cache lies behind `length_B` and is overwritten before it is read.
    """
    batch, width = prompt_BP.shape
    cache = init_cache(model.config, batch, slots)
    x_BPD, cache = model.extend(prompt_BP, cache, jnp.zeros_like(length_B), width)
    return _row(x_BPD, length_B - 1), cache


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="cache")
def begin(
    plan: Plan,
    model: LanguageModel,
    x_BD: Array,
    cache: Cache,
    prompt_BP: Array,
    length_B: Array,
    limit_B: Array,
    sampling: Sampling,
    stops: Stops,
) -> DecodeState:
    """The state after prompts were read: one token committed, k drafted. Small, so each plan compiles it fast."""
    batch, width = prompt_BP.shape
    state = DecodeState(
        tokens_BS=jnp.pad(prompt_BP, ((0, 0), (0, plan.slots - width))),
        length_B=length_B,
        limit_B=limit_B,
        done_B=length_B >= limit_B,
        draft_Bk=prompt_BP[:, :0],
        noise_BTV=get_verifier(plan.verifier).noise(sampling, length_B[:, None], model.config.vocab_size),
        cache=cache,
        forwards_B=jnp.zeros_like(length_B),
        accepted_Bk=jnp.zeros((batch, plan.k), jnp.int32, out_sharding=RULES.tokens_BT),
    )
    return advance(plan, model, state, x_BD[:, None], sampling, stops)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run(
    plan: Plan, model: LanguageModel, state: DecodeState, sampling: Sampling, stops: Stops, max_forwards: Array
) -> DecodeState:
    """Decode until every row is done, or for `max_forwards` forwards: a small budget streams, re-entering this
    executable."""

    def live(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < max_forwards) & ~jnp.all(carry[1].done_B)

    def iterate(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, step(plan, model, carry[1], sampling, stops)

    return lax.while_loop(live, iterate, (jnp.zeros((), jnp.int32), state))[1]


def step(plan: Plan, model: LanguageModel, state: DecodeState, sampling: Sampling, stops: Stops) -> DecodeState:
    """One iteration: a forward of k + 1 tokens, then `advance`."""
    last_B1 = _row(state.tokens_BS, state.length_B - 1)[:, None]
    inputs_BT = jnp.concatenate([last_B1, state.draft_Bk], axis=1)
    x_BTD, cache = model.extend(inputs_BT, state.cache, state.length_B - 1)
    state = dataclasses.replace(state, cache=cache, forwards_B=state.forwards_B + ~state.done_B)
    return advance(plan, model, state, x_BTD, sampling, stops)


def advance(
    plan: Plan, model: LanguageModel, state: DecodeState, x_BTD: Array, sampling: Sampling, stops: Stops
) -> DecodeState:
    """Verify the drafts against the target at the T positions of `x_BTD`, commit, and draft anew.

    A row commits its accepted drafts and the target's token after them, cut behind the first stop token and at its
    limit. Every live row commits at least one token.
    """
    verifier, width = get_verifier(plan.verifier), x_BTD.shape[1]
    logits_BTV = verifier.law(model.head.target_log_probs(x_BTD), sampling, filtered=plan.filtered)
    tokens_BT, accepted_B = verifier.verify(logits_BTV, state.draft_Bk, state.noise_BTV)

    stop_BT = stops.hit(tokens_BT)
    before_stop_B = jnp.sum(jnp.cumprod((~stop_BT).astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    count_B = jnp.minimum(jnp.minimum(accepted_B, before_stop_B) + 1, state.limit_B - state.length_B)
    count_B = jnp.where(state.done_B, 0, count_B)
    length_B = state.length_B + count_B
    stopped_B = before_stop_B < count_B

    # Tokens behind the new length are garbage that is overwritten before it is committed.
    tokens_BS = jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))(
        state.tokens_BS, tokens_BT, state.length_B
    )
    accepted_Bk = state.accepted_Bk
    if state.draft_Bk.shape[1]:
        offsets = jnp.arange(plan.k, dtype=jnp.int32)[None]
        # Drafts behind a stop token or the limit do not count: count_B is 0 for rows that are done.
        accepted_Bk = accepted_Bk + (offsets < jnp.minimum(accepted_B, count_B)[:, None])

    ahead = jnp.arange(plan.k + 1, dtype=jnp.int32)[None]
    noise_BTV = verifier.noise(sampling, length_B[:, None] + ahead, logits_BTV.shape[-1])
    last = jnp.clip(count_B - 1, 0, width - 1)
    state = dataclasses.replace(
        state,
        tokens_BS=tokens_BS,
        length_B=length_B,
        done_B=state.done_B | stopped_B | (length_B >= state.limit_B),
        noise_BTV=noise_BTV,
        accepted_Bk=accepted_Bk,
    )
    draft_Bk = draft(plan, model, _row(x_BTD, last), _row(tokens_BT, last), noise_BTV, sampling)
    return dataclasses.replace(state, draft_Bk=draft_Bk)


def draft(
    plan: Plan, model: LanguageModel, x_BD: Array, token_B: Array, noise_BTV: Array | None, sampling: Sampling
) -> Array:
    """k drafts `[B, k]` from the joint law at the last accepted position, given the token the target chose there.

    Sequential conditionals: each draft is chosen as the target will choose (same law, same noise), then conditioned on.
    """
    if plan.k == 0:
        return token_B[:, None][:, :0]
    verifier, head = get_verifier(plan.verifier), model.head
    joint = head.condition(head.draft_state(x_BD, plan.k + 1), token_B)
    drafts = []
    for i in range(plan.k):
        logits_B1V = verifier.law(head.next_log_probs(joint)[:, None], sampling, filtered=plan.filtered)
        noise_B1V = None if noise_BTV is None else noise_BTV[:, i : i + 1]
        drafts.append(verifier.choose(logits_B1V, noise_B1V)[:, 0])
        if i + 1 < plan.k:
            joint = head.condition(joint, drafts[-1])
    return jnp.stack(drafts, axis=1)


def _row(array: Array, index_B: Array) -> Array:
    """`array[b, index_B[b]]` for every row b."""
    return jax.vmap(lambda row, i: lax.dynamic_index_in_dim(row, i, keepdims=False))(array, index_B)
