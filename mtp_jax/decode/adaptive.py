"""Adaptive draft length: the number of drafts per forward that gives the most tokens per second, 0 included.

The output of `greedy` and `coupled` does not depend on what was drafted, so the width may change between any two
forwards. The loop is entered for a few forwards at a time, each width compiled once. The policy is host code: it knows
what a forward of each width costs and how often a draft at each offset is accepted.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.config import require
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.generate import Generation, Prompt, Request, for_decoding, make_request, proceed, result, start
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.loop import Plan
from mtp_jax.decode.state import DecodeState
from mtp_jax.decode.verify import get_verifier
from mtp_jax.model.block import Block
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.sharding import RULES

FORWARDS, SECONDS = 16, 0.1  # a run of the best width: so many forwards at least, and more if they would take less
TRIAL, WARM = 8, 0.02  # the same for a run that explores: entering a loop and its first forwards can take milliseconds
PACE = 20.0  # seconds of the best width over which the machine's pace is averaged: the least of a few trials is not
EXPLORE = 0.01  # the part of the time that may be lost by exploring
MARGIN = 1.1  # by which drafts must promise to win: a batch is done with its slowest row, and promises are uncertain
MEMORY = 0.98  # of what was seen of acceptance, per forward
PRIOR = 1.0  # drafts that the prior counts for: offset s accepted with chance 2^-s


class Policy:
    """Which width to run next, for one batch size. Times are seconds.

    Width k emits 1 + a_1 + .. + a_k tokens per forward and row, a_s the chance that drafts 1..s are accepted; its rate
    is that over the seconds of a forward. Widths 0 and the widest are run first. One between them, of unknown cost, is
    run (and compiled) when it would win if it cost no more than the next narrower. Then the best is run. Each other one
    is tried when what that loses is its share of `EXPLORE` of the time since it ran, so rivals are tried often. What a
    trial took counts in units of what the best took before it, so a machine that slows down slows all widths.
    """

    def __init__(self, most: int):
        """For widths 0..most."""
        self._costs = [collections.deque[float](maxlen=3) for _ in range(most + 1)]
        self._pace = 1.0  # seconds that a unit of these costs takes now: the machine's, and it changes
        prior = 0.5 ** np.arange(1, most + 1)
        self._accepted, self._tried = PRIOR * prior, np.full(most, PRIOR)
        self._since = np.zeros(most + 1)  # seconds that the best width has run since each ran

    @property
    def most(self) -> int:
        """The widest."""
        return len(self._costs) - 1

    def ran(self, k: int) -> bool:
        """Whether a run of width k was recorded."""
        return bool(self._costs[k])

    def cost(self, k: int) -> float:
        """Seconds of a forward of width k: the least of its last trials, as others on the machine only ever add to it.

        Of a width that never ran, that of the next narrower, which it cannot be below.
        """
        return self._pace * min(self._costs[max(i for i in range(k + 1) if self.ran(i))])

    def tokens(self, k: int) -> float:
        """Expected tokens of a forward of width k, per row."""
        return float(1 + np.sum((self._accepted / self._tried)[:k]))

    def rate(self, k: int) -> float:
        """Expected tokens per second and row."""
        return self.tokens(k) / self.cost(k)

    def choose(self) -> tuple[int, int]:
        """The width to run, and for how many forwards."""
        unknown = self._unknown()
        if unknown is not None:
            return unknown, self._trial(unknown) if self.ran(0) else FORWARDS
        best = self._best()
        others = [k for k in range(self.most + 1) if k != best and self.ran(k)]
        waits = {k: len(others) * self._loss(k, best) / EXPLORE - self._since[k] for k in others}
        next_trial = min(waits, key=waits.__getitem__, default=best)
        wait = waits.get(next_trial, SECONDS)
        if wait <= 0:
            return next_trial, self._trial(next_trial)
        return best, max(FORWARDS, int(min(SECONDS, wait) / self.cost(best)))

    def record(self, k: int, forwards: int, seconds: float, tried: int, accepted_k: np.ndarray) -> None:
        """What a run of width k showed.

        Args:
          k: its width.
          forwards: how many it took.
          seconds: its time.
          tried: forwards with drafts, of the row that has most left to do.
          accepted_k: how often its draft at each offset was accepted.
        """
        per_forward = seconds / forwards
        if self._unknown() is None and k == self._best():
            self._since += seconds
            slower = min(3.0, per_forward / self.cost(k))  # not what compiling for another window took
            self._pace *= 1 + (slower - 1) * (1 - math.exp(-seconds / PACE))
        else:
            self._costs[k].append(per_forward / self._pace)
        self._since[k] = 0
        memory = MEMORY**forwards
        self._accepted[:k] = memory * self._accepted[:k] + accepted_k
        self._tried[:k] = memory * self._tried[:k] + tried

    def _unknown(self) -> int | None:
        """The width, if any, whose cost is to be known before a choice."""
        if len(self._costs[0]) < 2:  # the first run was of a model that might have been slow, and was short for that
            return 0
        best = self._best() if self.ran(self.most) else self.most
        return None if self.ran(best) else best

    def _best(self) -> int:
        best = max(range(self.most + 1), key=self.rate)
        return 0 if self.rate(best) < MARGIN * self.rate(0) else best

    def _trial(self, k: int) -> int:
        """Forwards of a trial of width k."""
        return max(TRIAL, int(WARM / self.cost(k)))

    def _loss(self, k: int, best: int) -> float:
        """Seconds that a trial of width k would lose; its first forward has no drafts. What promises more than the best
        is taken to lose a little: it is tried often, and not all the time."""
        forwards = self._trial(k)
        seconds = forwards * self.cost(k)
        emitted = 1 + (forwards - 1) * self.tokens(k)
        return max(0.1 * seconds, seconds - emitted / self.rate(best))


_POLICIES: weakref.WeakKeyDictionary[LanguageModel, dict[Any, Policy]] = weakref.WeakKeyDictionary()


def learnt_policy(model: LanguageModel, request: Request) -> Policy:
    """What requests of this batch size and kind have learnt of this model so far."""
    # What the loops are compiled for.
    kind = len(request.length_B), request.plan, request.stops.ids_n.shape, request.limits.confidence_B is None
    return _POLICIES.setdefault(model, {}).setdefault(kind, Policy(request.plan.k))


def generate_adaptive(
    model: LanguageModel, prompts: Sequence[Prompt], *, policy: Policy | None = None, **options: Any
) -> Generation:
    """`generate` with k="adaptive": its tokens, at the width that is fastest here and now.

    Args:
      model, prompts, options: as in `generate`, without k.
      policy: which width to run (default: `learnt_policy`).

    Raises:
      ConfigError: as `generate`, and for a verifier whose tokens depend on what was drafted.
    """
    config = DecodeConfig(**options)
    decoder = model if not isinstance(model.blocks, Block) else for_decoding(model)
    request = make_request(decoder, prompts, config)
    policy = policy or learnt_policy(model, request)
    return result(request, proceed_adaptively(decoder, request, start_plain(decoder, request), policy))


def start_plain(model: LanguageModel, request: Request) -> DecodeState:
    """Prefill, without drafts."""
    return start(model, _with_width(request, 0))


def proceed_adaptively(model: LanguageModel, request: Request, state: DecodeState, policy: Policy) -> DecodeState:
    """The loop until every row is done, at widths from 0 to the request's.

    Args:
      model, request: as in `proceed`.
      state: that of `start_plain`. It is donated.
      policy: chooses the widths, and learns.

    Returns:
      The last state. `drafted_Bk` and `accepted_Bk` are the host's, and count over all widths.
    """
    most, batch = request.plan.k, len(request.length_B)
    require(
        not get_verifier(request.plan.verifier).keeps_q,
        f"k is 'adaptive' and the verifier {request.plan.verifier}, whose tokens depend on what was drafted; use "
        "coupled, whose tokens do not, or a fixed k.",
    )
    require(policy.most == most, f"The policy is for widths 0..{policy.most} and the head drafts 0..{most}.")
    request = _with_width(request, 0)
    total_2Bk = np.zeros((2, batch, most), int)
    now = _progress(state)
    while not now.done_B.all():
        k, budget = policy.choose()
        last = int(np.argmax(np.where(now.done_B, 0, now.left_B)))
        changed = k != request.plan.k
        begin = time.perf_counter()
        if changed:
            request = _with_width(request, k)
            state = _without_drafts(request.plan, state, request.sampling)
            now = now._replace(drafts_2Bk=np.zeros((2, batch, k), int))
        untimed = int(not policy.ran(k))
        if untimed:  # compiling, and touching memory for the first time, is not the cost of a forward
            state = jax.block_until_ready(proceed(model, request, state, 1))
            begin = time.perf_counter()
        state = jax.block_until_ready(proceed(model, request, state, budget))
        seconds = time.perf_counter() - begin
        before, now = now, _progress(state)
        took_B, drafts_2Bk = now.forwards_B - before.forwards_B, now.drafts_2Bk - before.drafts_2Bk
        total_2Bk[:, :, :k] += drafts_2Bk
        # The batch is done when its last row is. The first forward of another width has no drafts.
        tried = max(int(took_B[last]) - changed, 0)
        if took_B.max() > untimed:
            policy.record(k, int(took_B.max()) - untimed, seconds, tried, drafts_2Bk[1][last])
    return dataclasses.replace(state, drafted_Bk=total_2Bk[0], accepted_Bk=total_2Bk[1])


class _Progress(NamedTuple):
    """What the host looks at between two runs: which rows are done, the tokens that are left to them, their forwards,
    and how often a draft at each offset was used and accepted."""

    done_B: np.ndarray
    left_B: np.ndarray
    forwards_B: np.ndarray
    drafts_2Bk: np.ndarray


def _progress(state: DecodeState) -> _Progress:
    # numpy alone: an eager operation of jax, between runs, takes as long as a forward of a small model. Copies: the
    # state is donated.
    done_B, limit_B, length_B, forwards_B, drafted_Bk, accepted_Bk = map(
        np.array,
        (state.done_B, state.limit_B, state.length_B, state.forwards_B, state.drafted_Bk, state.accepted_Bk),
    )
    return _Progress(done_B, limit_B - length_B, forwards_B, np.stack([drafted_Bk, accepted_Bk]))


def _with_width(request: Request, k: int) -> Request:
    return dataclasses.replace(request, plan=dataclasses.replace(request.plan, k=k))


def _without_drafts(plan: Plan, state: DecodeState, sampling: Sampling) -> DecodeState:
    """The state for a loop of another width: its next forward has no drafts."""
    vocab = 0 if state.noise_BTV is None else state.noise_BTV.shape[-1]
    return dataclasses.replace(state, **_fresh(plan, vocab, state.length_B, sampling))


@functools.partial(jax.jit, static_argnames=("plan", "vocab_size"))
def _fresh(plan: Plan, vocab_size: int, length_B: Array, sampling: Sampling) -> dict[str, Array | None]:
    zeros_Bk = jnp.zeros((length_B.shape[0], plan.k), jnp.int32, out_sharding=RULES.tokens_BT)
    return {
        "draft_Bk": zeros_Bk,
        "draft_len_B": jnp.zeros_like(length_B),
        "noise_BTV": get_verifier(plan.verifier).noise(sampling, length_B, plan.k + 1, vocab_size),
        "drafted_Bk": zeros_Bk,
        "accepted_Bk": zeros_Bk,
    }
