"""Prefill and the compiled loop: forward, verify, commit, draft."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax.decode import pick
from mtp_jax.decode.law import COMPONENT, Sampling, block_keys
from mtp_jax.decode.state import DecodeState, Stops
from mtp_jax.decode.verify import get_verifier
from mtp_jax.decode.verify.base import leading
from mtp_jax.model.cache import Cache, init_cache
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.sharding import RULES


@dataclass(frozen=True)
class Plan:
    """What a loop is compiled for: `k` drafts per forward, the verifier, cache `slots`, whether top-k/p are used, and
    the kind of drafts (see `DecodeConfig.draft`).

    `window`: attention reads the first so many slots only; None: all. The loop stops before a row grows out of it.
    """

    k: int
    verifier: str
    slots: int
    filtered: bool = False
    draft: str = "joint"
    window: int | None = None

    def fits(self, length_B: Array, done_B: Array) -> Array:
        """Whether the next forward of every live row lies in the window; what ended rows compute is not looked at."""
        return jnp.all(done_B | (length_B + self.k <= (self.window or self.slots)))


class Limits(NamedTuple):
    """Where rows end and how much they draft: `limit_B`, `most_B` and `confidence_B` of `DecodeState`."""

    length_B: Array
    most_B: Array
    confidence_B: Array | None = None


def prefill(
    plan: Plan,
    model: LanguageModel,
    prompt_BP: Array,
    length_B: Array,
    limits: Limits,
    sampling: Sampling,
    stops: Stops,
) -> DecodeState:
    """Read the prompts (padded on the right to P, `length_B` tokens each), commit one token and draft k."""
    x_BD, cache = read(model, prompt_BP, length_B, plan.slots)
    return begin(plan, model, x_BD, cache, prompt_BP, length_B, limits, sampling, stops)


@functools.partial(jax.jit, static_argnames="slots")
def read(model: LanguageModel, prompt_BP: Array, length_B: Array, slots: int) -> tuple[Array, Cache]:
    """The hidden state of each prompt's last token, and a cache of `slots` positions that holds the prompts.

    Padding is never seen: what it leaves in the cache lies behind `length_B` and is overwritten before it is read.
    """
    batch, width = prompt_BP.shape
    cache = init_cache(model.config, batch, slots)
    x_BPD, cache = model.extend(prompt_BP, cache, jnp.zeros_like(length_B), width)
    return pick.at(x_BPD, length_B - 1), cache


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="cache")
def begin(
    plan: Plan,
    model: LanguageModel,
    x_BD: Array,
    cache: Cache,
    prompt_BP: Array,
    length_B: Array,
    limits: Limits,
    sampling: Sampling,
    stops: Stops,
) -> DecodeState:
    """The state after prompts were read: one token committed, k drafted. Small, so each plan compiles it fast."""
    batch, width = prompt_BP.shape
    tokens_BS = jnp.pad(prompt_BP, ((0, 0), (0, plan.slots - width)))
    counts_Bk = jnp.zeros((batch, plan.k), jnp.int32, out_sharding=RULES.tokens_BT)
    state = DecodeState(
        tokens_BS=tokens_BS,
        logp_BS=jnp.zeros_like(tokens_BS, jnp.float32),
        finite_B=length_B > 0,
        length_B=length_B,
        limit_B=limits.length_B,
        done_B=length_B >= limits.length_B,
        draft_Bk=prompt_BP[:, :0],
        draft_len_B=jnp.zeros_like(length_B),
        most_B=limits.most_B,
        confidence_B=limits.confidence_B,
        noise_BTV=get_verifier(plan.verifier).noise(sampling, length_B, 1, model.config.vocab_size),
        logq_BkV=None,
        cache=cache,
        forwards_B=jnp.zeros_like(length_B),
        drafted_Bk=counts_Bk,
        accepted_Bk=counts_Bk,
    )
    return advance(plan, model, state, x_BD[:, None], sampling, stops)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run(
    plan: Plan, model: LanguageModel, state: DecodeState, sampling: Sampling, stops: Stops, max_forwards: Array
) -> DecodeState:
    """Decode until every row is done, or for `max_forwards` forwards: a small budget streams, re-entering this
    executable. It returns early too when a row has grown out of the plan's window."""

    def live(carry: tuple[Array, DecodeState]) -> Array:
        forwards, state = carry
        return (forwards < max_forwards) & ~jnp.all(state.done_B) & plan.fits(state.length_B, state.done_B)

    def iterate(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, step(plan, model, carry[1], sampling, stops)

    return lax.while_loop(live, iterate, (jnp.zeros((), jnp.int32), state))[1]


def step(plan: Plan, model: LanguageModel, state: DecodeState, sampling: Sampling, stops: Stops) -> DecodeState:
    """One iteration: a forward of k + 1 tokens, then `advance`."""
    last_B1 = pick.at(state.tokens_BS, state.length_B - 1)[:, None]
    inputs_BT = jnp.concatenate([last_B1, state.draft_Bk], axis=1)
    x_BTD, cache = model.extend(inputs_BT, state.cache, state.length_B - 1, plan.window)
    state = dataclasses.replace(state, cache=cache, forwards_B=state.forwards_B + ~state.done_B)
    return advance(plan, model, state, x_BTD, sampling, stops)


def advance(
    plan: Plan, model: LanguageModel, state: DecodeState, x_BTD: Array, sampling: Sampling, stops: Stops
) -> DecodeState:
    """Verify the drafts against the target at the T positions of `x_BTD`, commit, and draft anew.

    A row commits its accepted drafts and the target's token after them, cut at its limit and behind the first token
    that is a stop, or whose probability is not a number. Every live row commits at least one token.
    """
    verifier, width = get_verifier(plan.verifier), x_BTD.shape[1]
    logp_BTV, first_BTRV = model.head.target_state(x_BTD)
    logits_BTV = verifier.law(logp_BTV, sampling, filtered=plan.filtered)
    tokens_BT, accepted_B = verifier.verify(logits_BTV, state, sampling)
    logp_BT = pick.log_prob(logp_BTV, tokens_BT)

    broken_BT = jnp.isnan(logp_BT)
    ends_BT = stops.hit(tokens_BT) | broken_BT
    # The first token is committed; one behind a draft if that was accepted, did not end the row, and there is room.
    offsets_1T = jnp.arange(width, dtype=jnp.int32)[None]
    offsets_1k, room_B1 = offsets_1T[:, :-1], (state.limit_B - state.length_B)[:, None]
    accepted_Bk = offsets_1k < accepted_B[:, None]
    count_B = 1 + leading(accepted_Bk & ~ends_BT[:, :-1] & (offsets_1k + 1 < room_B1))
    committed_BT, live_B = offsets_1T < count_B[:, None], ~state.done_B
    length_B = state.length_B + jnp.where(live_B, count_B, 0)

    if state.draft_Bk.shape[1]:
        drafted_Bk = (offsets_1k < state.draft_len_B[:, None]) & live_B[:, None]
        # Drafts behind a stop token do not count.
        accepted_Bk = accepted_Bk & committed_BT[:, :-1] & live_B[:, None]
        state = dataclasses.replace(
            state, drafted_Bk=state.drafted_Bk + drafted_Bk, accepted_Bk=state.accepted_Bk + accepted_Bk
        )

    last_B = count_B - 1
    state = dataclasses.replace(
        state,
        # What lies behind the new length is garbage that is overwritten before it is committed.
        tokens_BS=_put(state.tokens_BS, tokens_BT, state.length_B),
        logp_BS=_put(state.logp_BS, logp_BT, state.length_B),
        finite_B=state.finite_B & ~(jnp.any(broken_BT & committed_BT, axis=1) & live_B),
        length_B=length_B,
        done_B=state.done_B | jnp.any(ends_BT & committed_BT, axis=1) | (length_B >= state.limit_B),
        noise_BTV=verifier.noise(sampling, length_B, plan.k + 1, logits_BTV.shape[-1]),
    )
    first_BRV = None if first_BTRV is None else pick.at(first_BTRV, last_B)
    return draft(plan, model, state, pick.at(x_BTD, last_B), pick.at(tokens_BT, last_B), sampling, first_BRV)


def draft(
    plan: Plan,
    model: LanguageModel,
    state: DecodeState,
    x_BD: Array,
    token_B: Array,
    sampling: Sampling,
    first_BRV: Array | None,
) -> DecodeState:
    """Put k drafts into the state, from the joint law at the last accepted position given the target's token there.

    Sequential conditionals: each draft is chosen as the target will choose (same law, same noise), then conditioned on.
    How many of them a row uses depends on what is known before they are drawn, or the output's law would change.
    """
    if plan.k == 0:
        return dataclasses.replace(state, draft_Bk=token_B[:, None][:, :0])
    verifier, head = get_verifier(plan.verifier), model.head
    ancestral = plan.draft == "ancestral"
    joint = head.draft_state(x_BD, 1 if ancestral else plan.k + 1, first_BRV)
    joint = joint.skip() if plan.draft == "unconditioned" else head.condition(joint, token_B)
    if ancestral:
        component_B = draw_component(joint.log_alpha_BR, sampling, state.length_B)
        joint = head.component_state(joint, x_BD, component_B, plan.k + 1)
    # The last token of a row is the target's own.
    most_B = jnp.minimum(state.most_B, jnp.maximum(state.limit_B - state.length_B - 1, 0))
    drafts, laws, sure = [], [], []
    for i in range(plan.k):
        logq_BV = head.next_log_probs(joint)
        logits_B1V = verifier.law(logq_BV[:, None], sampling, filtered=plan.filtered)
        noise_B1V = None if state.noise_BTV is None else state.noise_BTV[:, i : i + 1]
        drafts.append(verifier.choose(logits_B1V, noise_B1V)[:, 0])
        if verifier.keeps_q:
            laws.append(jax.nn.log_softmax(logits_B1V, axis=-1))
        if state.confidence_B is not None:
            sure.append(jnp.max(logq_BV, axis=-1) >= jnp.log(state.confidence_B))
        if i + 1 < plan.k:
            joint = head.condition(joint, drafts[-1])
    if sure:
        most_B = jnp.minimum(most_B, leading(jnp.stack(sure, axis=1)))
    return dataclasses.replace(
        state,
        draft_Bk=jnp.stack(drafts, axis=1),
        draft_len_B=most_B,
        logq_BkV=jnp.concatenate(laws, axis=1) if laws else None,
    )


def draw_component(log_alpha_BR: Array, sampling: Sampling, start_B: Array) -> Array:
    """A component of each row, `[B]`: from its posterior; the likeliest at temperature 0."""
    rank = log_alpha_BR.shape[-1]
    noise_BR = jax.vmap(lambda key: jax.random.gumbel(key, (rank,)))(block_keys(sampling, start_B, COMPONENT))
    return jnp.argmax(log_alpha_BR + jnp.where(sampling.temperature_B[:, None] > 0, noise_BR, 0.0), axis=-1)


def _put(array_BS: Array, new_BT: Array, start_B: Array) -> Array:
    """`array` with row b's entries from `start_B[b]` replaced."""
    return jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))(array_BS, new_BT, start_B)
