"""Adaptive draft length: the number of drafts per forward that gives the most tokens per second, 0 included.

The output of `greedy` and `coupled` does not depend on what was drafted, so the width may change between any two
forwards. The loop is entered for a few forwards at a time, each width compiled once. The policy is host code: it knows
what a forward of each width costs and how often a draft at each offset is accepted.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
import weakref
from collections.abc import Sequence
from typing import Any

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

FORWARDS, TRIAL = 16, 2  # the least forwards of a run, and of one that explores
SECONDS = 0.03  # a run has more forwards if it would take less: entering the loop costs some 0.3 ms
MARGIN = 1.1  # by which drafts must promise to win: a batch is done with its slowest row, and promises are uncertain
REST = 4  # runs between two that explore
EXPLORE = 0.02  # exploring goes on while it has cost no more than this share of the time
MEMORY = 0.98  # of what was seen of acceptance, per forward
PRIOR = 4.0  # drafts that the prior counts for: offset s accepted with chance 2^-s. Hope costs less than giving up


class Policy:
    """Which width to run next, for one batch size. Times are seconds.

    Width k emits 1 + a_1 + .. + a_k tokens per forward and row, a_s the chance that drafts 1..s are accepted; its rate
    is that over the seconds of a forward. The cost of a width that never ran is interpolated, and it is not compiled
    before it seems best. Now and then the known width that has not run for longest is tried, if what was lost on slower
    widths stays within `EXPLORE` of the time.
    """

    def __init__(self, most: int):
        """For widths 0..most."""
        self._seconds = [collections.deque[float](maxlen=3) for _ in range(most + 1)]
        self._last = [0] * (most + 1)  # the run in which each width ran last
        prior = 0.5 ** np.arange(1, most + 1)
        self._accepted, self._tried = PRIOR * prior, np.full(most, PRIOR)
        self._runs = self._rested = 0
        self._elapsed = self._lost = 0.0

    @property
    def most(self) -> int:
        """The widest."""
        return len(self._last) - 1

    def ran(self, k: int) -> bool:
        """Whether a run of width k was recorded."""
        return bool(self._seconds[k])

    def cost(self, k: int) -> float:
        """Seconds of a forward of width k: the least of its last runs, as others on the machine only ever add to it."""
        known = [(i, min(s)) for i, s in enumerate(self._seconds) if s]
        widths, costs = zip(*known, strict=True)
        return float(np.interp(k, widths, costs))

    def rate(self, k: int) -> float:
        """Expected tokens per second and row."""
        return float(1 + np.sum((self._accepted / self._tried)[:k])) / self.cost(k)

    def choose(self) -> tuple[int, int]:
        """The width to run, and for how many forwards."""
        for k in (0, self.most):
            if not self._seconds[k]:
                return k, TRIAL
        best = self._best()
        stale = min((k for k, seconds in enumerate(self._seconds) if seconds), key=lambda k: self._last[k])
        loss = self._loss(stale, best, self.cost(stale))
        affordable = FORWARDS if loss <= 0 else int((EXPLORE * self._elapsed - self._lost) / loss)
        if stale != best and self._rested >= REST and affordable >= TRIAL:
            self._rested = 0
            return stale, min(affordable, FORWARDS)
        self._rested += 1
        return best, max(FORWARDS, int(SECONDS / self.cost(best)))

    def record(self, k: int, forwards: int, seconds: float, tried: int, accepted_k: np.ndarray) -> None:
        """What a run of width k showed.

        Args:
          k: its width.
          forwards: how many it took.
          seconds: its time.
          tried: forwards with drafts, of the row that has most left to do.
          accepted_k: how often its draft at each offset was accepted.
        """
        self._runs += 1
        self._last[k] = self._runs
        self._seconds[k].append(seconds / forwards)
        self._elapsed += seconds
        memory = MEMORY**forwards
        self._accepted[:k] = memory * self._accepted[:k] + accepted_k
        self._tried[:k] = memory * self._tried[:k] + tried
        if self._seconds[0] and self._seconds[-1]:
            self._lost += max(0.0, self._loss(k, self._best(), seconds))

    def _best(self) -> int:
        best = max(range(self.most + 1), key=self.rate)
        return 0 if self.ran(best) and self.rate(best) < MARGIN * self.rate(0) else best

    def _loss(self, k: int, best: int, seconds: float) -> float:
        """The part of `seconds` that width k wastes, as far as is known; below 0 where it promises a little more."""
        return seconds * (1 - self.rate(k) / self.rate(best))


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
      The last state. `drafted_Bk` and `accepted_Bk` count over all widths.
    """
    most, batch = request.plan.k, len(request.length_B)
    require(
        not get_verifier(request.plan.verifier).keeps_q,
        f"k is 'adaptive' and the verifier {request.plan.verifier}, whose tokens depend on what was drafted; use "
        "coupled, whose tokens do not, or a fixed k.",
    )
    require(policy.most == most, f"The policy is for widths 0..{policy.most} and the head drafts 0..{most}.")
    request = _with_width(request, 0)
    forwards_B = np.zeros(batch, int)
    seen_2Bk, total_2Bk = np.zeros((2, batch, 0), int), np.zeros((2, batch, most), int)
    while not np.all(state.done_B):
        k, budget = policy.choose()
        last = int(np.argmax(np.where(state.done_B, 0, state.limit_B - state.length_B)))
        changed = k != request.plan.k
        if changed:
            request = _with_width(request, k)
            state, seen_2Bk = _without_drafts(request.plan, state, request.sampling), np.zeros((2, batch, k), int)
        untimed = int(not policy.ran(k))
        if untimed:  # compiling, and touching memory for the first time, is not the cost of a forward
            state = proceed(model, request, state, 1)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = jax.block_until_ready(proceed(model, request, state, budget))
        seconds = time.perf_counter() - begin
        took_B, forwards_B = np.array(state.forwards_B) - forwards_B, np.array(state.forwards_B)
        new_2Bk = np.array([state.drafted_Bk, state.accepted_Bk]) - seen_2Bk
        seen_2Bk = seen_2Bk + new_2Bk
        total_2Bk[:, :, :k] += new_2Bk
        # The batch is done when its last row is. The first forward of another width has no drafts.
        tried = int(np.maximum(took_B[last] - changed, 0))
        if took_B.max() > untimed:
            policy.record(k, int(took_B.max()) - untimed, seconds, tried, new_2Bk[1][last])
    return dataclasses.replace(state, drafted_Bk=jnp.asarray(total_2Bk[0]), accepted_Bk=jnp.asarray(total_2Bk[1]))


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
