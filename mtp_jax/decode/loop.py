"""Decoding loop: prefill, then forward, verify, commit, draft in one compiled `while`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax import arrays
from mtp_jax.decode.decoder import Decoder, Packed, unpacked
from mtp_jax.decode.law import Sampling, of_drafts
from mtp_jax.decode.state import DecodeState
from mtp_jax.decode.verify import get_verifier
from mtp_jax.decode.verify.base import leading
from mtp_jax.heads.base import Draft, Head, Seen
from mtp_jax.model.cache import Cache, init_cache
from mtp_jax.sharding import RULES

# What the trunk saw of each prompt's last token: `Seen` without the functions in it.
Last = tuple[Array, Array, tuple[Array, ...]]

SCORES, LEAST = 2**28, 16
"""Bytes of attention's scores for which prompts are read at once, on a device; and tokens that always are."""


@dataclass(frozen=True)
class Plan:
    """What a loop is compiled for: `k` drafts per forward, the verifier, cache `slots`, whether top-k/p are used.

    `attended`: attention reads the first so many slots only; None: all. The loop stops before a row grows out of them.
    """

    k: int
    verifier: str
    slots: int
    filtered: bool = False
    attended: int | None = None


class Limits(NamedTuple):
    """Where rows end and how much they draft: `limit_B` and `most_B` of `DecodeState`."""

    length_B: Array
    most_B: Array


def prefill(
    plan: Plan,
    decoder: Decoder | Packed,
    prompt_BP: Array,
    length_B: Array,
    limits: Limits,
    sampling: Sampling,
    stops_n: Array,
) -> DecodeState:
    """Read the prompts (padded on the right to P, `length_B` tokens each), commit one token and draft k."""
    drafts = plan.k > 0 and unpacked(decoder).head.has_cache
    last, caches = read(decoder, prompt_BP, length_B, drafts)
    return begin(plan, decoder, last, caches, prompt_BP, length_B, limits, sampling, stops_n)


@functools.partial(jax.jit, static_argnames="drafts")
def read(
    decoder: Decoder | Packed, prompt_BP: Array, length_B: Array, drafts: bool = False
) -> tuple[Last, tuple[Cache, Any]]:
    """What the trunk saw of each prompt's last token, and caches of P positions that hold the prompts.

    Padding is never seen: what it leaves in the caches lies behind `length_B` and is overwritten before it is read.
    The head's cache is filled if `drafts`; the entry of the last token, whose next one is not known, is garbage.
    Prompts whose scores would not fit into `SCORES` are read in parts, as many as the longest needs.
    """
    decoder, (batch, width) = unpacked(decoder), prompt_BP.shape
    next_BP = jnp.pad(prompt_BP[:, 1:], ((0, 0), (0, 1)))
    empty = init_cache(decoder.config, batch, width), decoder.head.init_cache(batch, width) if drafts else ()

    def extend(start: Array, part: int, caches: tuple[Cache, Any]) -> tuple[Seen, tuple[Cache, Any]]:
        """Read the `part` tokens of each row from `start` on."""
        tokens_BT, next_BT = (lax.dynamic_slice_in_dim(a, start, part, axis=1) for a in (prompt_BP, next_BP))
        start_B = jnp.zeros_like(length_B) + start
        seen, cache = decoder.extend(tokens_BT, caches[0], start_B)
        head_cache = decoder.head.extend(caches[1], seen, next_BT, start_B, None)[0] if drafts else ()
        return seen, (cache, head_cache)

    def states(seen: Seen, index_B: Array) -> tuple[Array, tuple[Array, ...]]:
        at = seen.at(index_B)
        return at.x_BTD, at.taps

    def iterate(carry: tuple[Array, Any, tuple[Cache, Any]]) -> tuple[Array, Any, tuple[Cache, Any]]:
        start, last, caches = carry
        seen, caches = extend(start, part, caches)
        index_B = length_B - 1 - start
        here_B11 = ((index_B >= 0) & (index_B < part))[:, None, None]
        found = states(seen, jnp.clip(index_B, 0, part - 1))
        return start + part, jax.tree.map(lambda new, old: jnp.where(here_B11, new, old), found, last), caches

    part, start = _part(decoder, batch, width), jnp.zeros((), jnp.int32)
    if part == width:
        seen, caches = extend(start, width, empty)
        x_BTD, taps = states(seen, length_B - 1)
    else:
        like = jax.eval_shape(lambda: states(extend(start, part, empty)[0], length_B))
        last = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding.spec), like)
        live = lambda carry: carry[0] < jnp.max(length_B)  # noqa: E731
        _, (x_BTD, taps), caches = lax.while_loop(live, iterate, (start, last, empty))
    return (x_BTD, arrays.at(prompt_BP, length_B - 1)[:, None], taps), caches


def _part(decoder: Decoder, batch: int, width: int) -> int:
    """How many of `width` tokens are read at once, so that a layer's scores take no more than `SCORES` on a device."""
    part, devices = width, jax.sharding.get_abstract_mesh().size
    while part > LEAST and part % 2 == 0 and 4 * batch * decoder.config.num_heads * part * width > SCORES * devices:
        part //= 2
    return part


@functools.partial(jax.jit, static_argnames="plan")
def begin(
    plan: Plan,
    decoder: Decoder | Packed,
    last: Last,
    caches: tuple[Cache, Any],
    prompt_BP: Array,
    length_B: Array,
    limits: Limits,
    sampling: Sampling,
    stops_n: Array,
) -> DecodeState:
    """The state after prompts were read: one token committed, k drafted. Small, so each plan compiles it fast.

    The caches become as long as the plan's: `read`, which takes longer to compile, is the same for all of them.
    """
    decoder, (batch, width) = unpacked(decoder), prompt_BP.shape
    whole = (
        init_cache(decoder.config, batch, plan.slots),
        decoder.head.init_cache(batch, plan.slots) if plan.k and decoder.head.has_cache else (),
    )
    caches = jax.tree.map(lambda new, read: lax.dynamic_update_slice(new, read, (0,) * new.ndim), whole, caches)
    tokens_BS = jnp.pad(prompt_BP, ((0, 0), (0, plan.slots - width)))
    counts_Bk = jnp.zeros((batch, plan.k), jnp.int32, out_sharding=RULES.tokens_BT)
    state = DecodeState(
        tokens_BS=tokens_BS,
        logp_BS=jnp.zeros_like(tokens_BS, jnp.float32),
        accepted_BS=jnp.zeros_like(tokens_BS, bool) if plan.k else None,
        finite_B=length_B > 0,
        length_B=length_B,
        limit_B=limits.length_B,
        done_B=length_B >= limits.length_B,
        draft_Bk=prompt_BP[:, :0],
        draft_len_B=jnp.zeros_like(length_B),
        most_B=limits.most_B,
        noise_BTV=get_verifier(plan.verifier).noise(sampling, length_B, 1, decoder.config.vocab_size),
        logq_BkV=None,
        cache=caches[0],
        head_cache=caches[1],
        forwards_B=jnp.zeros_like(length_B),
        drafted_Bk=counts_Bk,
        accepted_Bk=counts_Bk,
    )
    return advance(plan, decoder, state, decoder.seen(*last), sampling, stops_n)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run(
    plan: Plan, decoder: Decoder | Packed, state: DecodeState, sampling: Sampling, stops_n: Array, max_forwards: Array
) -> DecodeState:
    """Decode until every row is done, or for `max_forwards` forwards: a small budget streams, re-entering this
    executable. It returns early too when a row has grown out of what attention reads."""
    decoder = unpacked(decoder)

    def live(carry: tuple[Array, DecodeState]) -> Array:
        forwards, state = carry
        # What ended rows compute is not looked at.
        reached = jnp.all(state.done_B | (state.length_B + plan.k <= (plan.attended or plan.slots)))
        return (forwards < max_forwards) & ~jnp.all(state.done_B) & reached

    def iterate(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, step(plan, decoder, carry[1], sampling, stops_n)

    return lax.while_loop(live, iterate, (jnp.zeros((), jnp.int32), state))[1]


def step(plan: Plan, decoder: Decoder, state: DecodeState, sampling: Sampling, stops_n: Array) -> DecodeState:
    """One iteration: a forward of k + 1 tokens, then `advance`."""
    last_B1 = arrays.at(state.tokens_BS, state.length_B - 1)[:, None]
    inputs_BT = jnp.concatenate([last_B1, state.draft_Bk], axis=1)
    seen, cache = decoder.extend(inputs_BT, state.cache, state.length_B - 1, plan.attended)
    state = dataclasses.replace(state, cache=cache, forwards_B=state.forwards_B + (~state.done_B).astype(jnp.int32))
    return advance(plan, decoder, state, seen, sampling, stops_n)


def advance(
    plan: Plan, decoder: Decoder, state: DecodeState, seen: Seen, sampling: Sampling, stops_n: Array
) -> DecodeState:
    """Verify the drafts against the target at the T positions that were seen, commit, and draft anew.

    A row commits its accepted drafts and the target's token after them, cut at its limit and behind the first token
    that is a stop, or whose probability is not a number. Every live row commits at least one token.
    """
    verifier, width = get_verifier(plan.verifier), seen.x_BTD.shape[1]
    logp_BTV, memo = decoder.target(seen)
    logits_BTV = verifier.law(logp_BTV, sampling, filtered=plan.filtered)
    tokens_BT, accepted_B = verifier.verify(logits_BTV, state, sampling)
    logp_BT = arrays.log_prob(logp_BTV, tokens_BT)

    broken_BT = jnp.isnan(logp_BT)
    ends_BT = jnp.any(tokens_BT[:, :, None] == stops_n[None, None], axis=-1) | broken_BT
    # The first token is committed; one behind a draft if that was accepted, did not end the row, and there is room.
    offsets_1T = jnp.arange(width, dtype=jnp.int32)[None]
    offsets_1k, room_B1 = offsets_1T[:, :-1], (state.limit_B - state.length_B)[:, None]
    accepted_Bk = offsets_1k < accepted_B[:, None]
    count_B = 1 + leading(accepted_Bk & ~ends_BT[:, :-1] & (offsets_1k + 1 < room_B1))
    committed_BT, live_B = offsets_1T < count_B[:, None], ~state.done_B
    start_B, length_B = state.length_B - 1, state.length_B + jnp.where(live_B, count_B, 0)

    if state.accepted_BS is not None:
        accepted_BS = _put(state.accepted_BS, offsets_1T < accepted_B[:, None], state.length_B)
        state = dataclasses.replace(state, accepted_BS=accepted_BS)
    if state.draft_Bk.shape[1]:
        drafted_Bk = (offsets_1k < state.draft_len_B[:, None]) & live_B[:, None]
        # Drafts behind a stop token do not count.
        accepted_Bk = accepted_Bk & committed_BT[:, :-1] & live_B[:, None]
        state = dataclasses.replace(
            state,
            drafted_Bk=state.drafted_Bk + drafted_Bk.astype(jnp.int32),
            accepted_Bk=state.accepted_Bk + accepted_Bk.astype(jnp.int32),
        )

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
    if plan.k == 0:
        return dataclasses.replace(state, draft_Bk=tokens_BT[:, :0])
    # Whether a draft was right is known now, and with it the token behind every position that stays.
    head_cache, memo = decoder.head.extend(state.head_cache, seen, tokens_BT, start_B, memo)
    last_B = count_B - 1
    drafting = decoder.head.begin(
        seen.at(last_B),
        arrays.at(tokens_BT, last_B),
        window=plan.k + 1,
        cache=head_cache,
        position_B=start_B + last_B,
        memo=jax.tree.map(lambda a: arrays.at(a, last_B), memo),
    )
    return draft(plan, decoder.head, dataclasses.replace(state, head_cache=head_cache), drafting, sampling)


def draft(plan: Plan, head: Head, state: DecodeState, drafting: Draft, sampling: Sampling) -> DecodeState:
    """Put k drafts into the state.

    Sequential conditionals: each draft is chosen as the target will choose (same filters, same noise), then conditioned
    on. How many of them a row uses depends on what is known before they are drawn, or the output's law would change.
    """
    verifier, sampling = get_verifier(plan.verifier), of_drafts(sampling, head.config)
    drafts, laws = [], []
    for i in range(plan.k):
        logq_Bn, shortlist = head.next_listed(drafting)
        logits_B1n = verifier.law(logq_Bn[:, None], sampling, filtered=plan.filtered)
        noise_B1n = None if state.noise_BTV is None else state.noise_BTV[:, i : i + 1]
        if shortlist and noise_B1n is not None:
            noise_B1n = shortlist.of_all(noise_B1n)
        chosen_B = verifier.choose(logits_B1n, noise_B1n)[:, 0]
        drafts.append(shortlist.ids(chosen_B) if shortlist else chosen_B)
        if verifier.keeps_q:
            law_Bn = jax.nn.log_softmax(logits_B1n[:, 0], axis=-1)
            laws.append(shortlist.spread(law_Bn) if shortlist else law_Bn)
        if i + 1 < plan.k:
            drafting = head.condition(drafting, drafts[-1])
    return dataclasses.replace(
        state,
        draft_Bk=jnp.stack(drafts, axis=1),
        # The last token of a row is the target's own.
        draft_len_B=jnp.minimum(state.most_B, jnp.maximum(state.limit_B - state.length_B - 1, 0)),
        logq_BkV=jnp.stack(laws, axis=1) if laws else None,
    )


def _put(array_BS: Array, new_BT: Array, start_B: Array) -> Array:
    """`array` with row b's entries from `start_B[b]` replaced."""
    return jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))(array_BS, new_BT, start_B)
