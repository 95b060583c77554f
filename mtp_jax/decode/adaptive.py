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
from statistics import median, median_low
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.config import require
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.generate import (
    Generation,
    Prompt,
    Request,
    enter,
    for_decoding,
    make_request,
    result,
    start,
    window,
)
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.loop import Plan
from mtp_jax.decode.state import DecodeState
from mtp_jax.decode.verify import get_verifier
from mtp_jax.model.block import Block
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.sharding import RULES

FORWARDS, SECONDS = 16, 0.25  # a run of the best width: so many forwards at least, and more if they would take less
TRIAL, WARM = 8, 0.02  # the same for a trial of another: to enter a loop can take a millisecond
TRIALS = 4  # in a row at most, before a width is the best: a machine that is held up for a moment makes one look good
EXPLORE = 0.01  # the part of the time that trials may lose; those at once, of what promises more, come on top
IN_VAIN = 3  # n trials after it was the best, a width waits n times as long for the next, at most so many times
MARGIN = 1.1  # by which drafts must promise to win: a batch is done with its slowest row, and promises are uncertain
STAY = 1.03  # by which another width must promise more than the one that runs: to change takes time
MEMORY = 0.98  # of what was seen of acceptance, per forward with drafts
PRIOR = 1.0  # drafts that the prior counts for: offset s accepted with chance 2^-s
LAST_MEMORY = 0.1  # what is seen of the last row is remembered ten times as long as acceptance
PRIOR_LAST = 16.0  # drafts that the prior counts for: it gains what a row does in the mean


class Run(NamedTuple):
    """What a run of one width showed."""

    k: int  # its width
    forwards: int  # how many were timed
    seconds: float  # their time
    tried: int  # forwards with drafts
    accepted_k: np.ndarray  # how often the draft at each offset was accepted in them, in the mean of the rows
    gained: int  # by how many tokens more than their number the most that is left to a row went down in them; what a
    # row that ended early gave up does not count
    change: float = 0.0  # seconds that the change to this width took, its first forward included; 0: not known, or none


class Recent:
    """The last few values of something, and their median."""

    def __init__(self, most: int):
        self._values = collections.deque[float](maxlen=most)
        self.median = self.low = 0.0  # `low`: the lower of two in the middle, so that one of two may be held up

    def __len__(self) -> int:
        return len(self._values)

    def see(self, value: float, afresh: bool = False) -> None:
        """One more; `afresh`: those before it count no more."""
        if afresh:
            self._values.clear()
        self._values.append(value)
        self.median, self.low = median(self._values), median_low(self._values)


class Share:
    """What the row that is done last gains from drafts, over what a row gains in the mean. 1 until anything is seen."""

    def __init__(self):
        self.last = self.mean = 0.0

    def see(self, run: Run, memory: float) -> None:
        """Learn from a run, and keep that part of what was seen before."""
        self.forget(memory)
        mean = float(run.accepted_k.sum())
        self.last += min(run.gained, mean)  # more is luck
        self.mean += mean

    def forget(self, memory: float) -> None:
        """Keep that part."""
        self.last, self.mean = memory * self.last, memory * self.mean

    @property
    def value(self) -> float:
        """Of all that was seen."""
        return (PRIOR_LAST + self.last) / (PRIOR_LAST + self.mean)


class Policy:
    """Which width to run next, for one batch size. Times are seconds.

    Width k emits 1 + a_1 + .. + a_k tokens per forward and row, a_s the chance that drafts 1..s are accepted. A batch
    is done when its last row is, and that row gains only a part of these drafts. The rate of a width is what it gets
    over the seconds of a forward. The best is run, and each other one is tried when what a trial of it loses is its
    share of `EXPLORE` of the time since it ran, so close rivals are tried often; after n trials that did not make it
    the best it waits n times as long, `IN_VAIN` times at most. One that promises more than the best is tried again at
    once, until it no longer does, or is the best after some trials; after a trial that the end of a call cut it waits
    for its share too. A width of unknown cost is tried (and compiled) when it would be the best if it cost no more than
    the next narrower.

    Costs are relative: the best runs as briefly right after a trial, and a machine that is slow slows both.
    """

    def __init__(self, most: int):
        """For widths 0..most."""
        self.best = 0
        self.entered: set[tuple[Plan, bool]] = set()  # loops that have run, and whether after a change to them
        # Over that of width 0, as the last trials showed it.
        self._costs = [Recent(TRIALS) for _ in range(most + 1)]
        self._paces = Recent(3)  # seconds for a cost of 1, as the last runs of the best showed
        self._changes = Recent(3)  # seconds that a change of width took
        # To be compared: a width, its seconds per forward, and whether it was tried because it was due.
        self._trial: tuple[int, float, bool] | None = None
        self._parts: dict[int, tuple[int, float]] = {}  # forwards and seconds of runs that a call cut short
        prior = 0.5 ** np.arange(1, most + 1)
        self._accepted, self._tried = PRIOR * prior, np.full(most, PRIOR)
        self._drafts = self._expected()
        self._long, self._short = Share(), Share()  # in runs of the best and in trials, which are over before rows part
        self._since = np.zeros(most + 1)  # seconds that the best width has run since each ran
        self._vain = np.full(
            most + 1, 1 - TRIALS
        )  # trials of each since it was the best; the start has some that are free

    @property
    def most(self) -> int:
        """The widest."""
        return len(self._costs) - 1

    def known(self, k: int) -> bool:
        """Whether the cost of width k is known."""
        return bool(self._costs[k])

    def cost(self, k: int) -> float:
        """Seconds of a forward of width k. Of a width that was never tried, those of the next narrower: it takes no
        less."""
        return self._paces.median * self._relative(k).median

    def tokens(self, k: int) -> float:
        """Expected tokens of a forward of width k, of the row that is done last."""
        return 1 + self._long.value * self._drafts[k]

    def rate(self, k: int) -> float:
        """Expected tokens per second, of the row that is done last."""
        return self.tokens(k) / self.cost(k)

    def choose(self) -> tuple[int, int]:
        """The width to run, and for how many forwards."""
        if not self.known(0):
            return 0, TRIAL
        if self._trial:
            return self.best, self._forwards(self.best)
        favourite = self._favourite()
        if favourite != self.best and favourite not in self._parts:
            return favourite, self._forwards(favourite)
        rivals = [k for k in range(self.most + 1) if k != self.best and (self.known(k) or k in self._parts)]
        overdue = {k: self._since[k] - len(rivals) * self._price(k) for k in rivals}
        rival = max(rivals, key=overdue.__getitem__, default=self.best)
        if overdue.get(rival, -1) >= 0:
            return rival, self._forwards(rival)
        return self.best, max(FORWARDS, int(SECONDS / self.cost(self.best)))

    def record(self, run: Run) -> None:
        """Learn from a run."""
        k, forwards, seconds, tried, accepted_k, _, change = run
        memory = MEMORY**tried
        due = k != self.best and self.known(k) and k != self._favourite()
        if not self.known(0):
            self._costs[0].see(1.0)
        elif k == self.best:
            self._since += forwards * self.cost(k)  # as expected: a run that was held up earns no trials
            # Over some calls: at the beginning of one its rows are level, and the last has had the worst luck.
            self._long.see(run, memory**LAST_MEMORY)
        else:  # so few forwards do not show it, and what is not seen any more is forgotten
            self._long.forget(memory)
            self._short.see(run, memory)
        self._since[k] = 0
        timed, spent = self._parts.pop(k, (0, 0.0))
        timed, spent = timed + forwards, spent + seconds
        if timed < TRIAL // 2 and len(self._paces):  # a few forwards at the end of a call say little
            self._parts[k] = timed, spent
        elif k == self.best:
            self._compare(spent / timed)
        else:
            self._trial = k, spent / timed, due
            self._vain[k] += 1
            self._parts.pop(self.best, None)
        if change:
            self._changes.see(change)
        if k:
            self._accepted[:k] = memory * self._accepted[:k] + accepted_k
            self._tried[:k] = memory * self._tried[:k] + tried
            self._drafts = self._expected()
        if not self._trial and self._sure(favourite := self._favourite()):
            self.best = favourite
        self._vain[self.best] = 0

    def cut(self, k: int) -> None:
        """A call ended before a forward of width k was timed."""
        if k != self.best:
            self._parts.setdefault(k, (0, 0.0))
            self._since[k] = 0

    def _compare(self, seconds: float) -> None:
        """A forward of the best took so many seconds, and that of a trial before it another number of them."""
        cost = self._costs[self.best].median
        self._paces.see(seconds / cost)
        if self._trial:
            rival, its_seconds, due = self._trial
            costs, relative = self._costs[rival], cost * its_seconds / seconds
            # One that was due and costs clearly less has to show it again. A trial that was held up says little.
            costs.see(relative, afresh=due and MARGIN * relative < costs.median)
            self._trial = None

    def _relative(self, k: int) -> Recent:
        """Costs of width k, or of the next narrower that has any."""
        while not self.known(k):
            k -= 1
        return self._costs[k]

    def _expected(self) -> list[float]:
        """Drafts that a forward of each width gains, of a row in the mean."""
        return [0.0, *np.cumsum(self._accepted / self._tried).tolist()]

    def _sure(self, k: int) -> bool:
        """Whether width k was tried often enough to be the best. Of trials that take long one may be held up."""
        trials = int(SECONDS / (self._forwards(k) * self.cost(k)))
        return len(self._costs[k]) >= min(TRIALS, max(3, trials))

    def _favourite(self) -> int:
        advantage = {self.best: STAY} | {0: MARGIN}
        return max(range(self.most + 1), key=lambda k: advantage.get(k, 1.0) * self.rate(k))

    def _forwards(self, k: int) -> int:
        """Of a trial of width k, or of a run that is compared with one. Never more than of the best, whose cost is
        known well."""
        return max(TRIAL, int(WARM / max(self.cost(k), self.cost(self.best))))

    def _price(self, k: int) -> float:
        """Seconds for which the best has to run before the next trial of width k, were it the only rival."""
        return min(max(1, self._vain[k]), IN_VAIN) * self._loss(k) / EXPLORE

    def _loss(self, k: int) -> float:
        """Seconds that a trial of width k would lose, with a change to it and one back, whose first forwards have no
        drafts. What promises more than the best is taken to lose a little: it is tried often, and not all the time."""
        forwards, cost = self._forwards(k), self._paces.median * self._relative(k).low
        seconds = forwards * cost + 2 * (self._changes.low or cost)
        emitted = forwards * (1 + self._short.value * self._drafts[k]) + 2
        return max(0.1 * seconds, seconds - emitted / self.rate(self.best))


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
      ConfigError: as `generate`, and for a verifier whose tokens depend on what was drafted, or a policy for other
        widths.
    """
    config = DecodeConfig(**options)
    decoder = model if not isinstance(model.blocks, Block) else for_decoding(model)
    request = make_request(decoder, prompts, config)
    policy = policy or learnt_policy(model, request)
    return result(request, proceed_adaptively(decoder, request, start_adaptively(decoder, request, policy), policy))


def start_adaptively(model: LanguageModel, request: Request, policy: Policy) -> DecodeState:
    """`start` at the best width so far. Errors as in `generate_adaptive`."""
    most = request.plan.k
    require(
        not get_verifier(request.plan.verifier).keeps_q,
        f"k is 'adaptive' and the verifier {request.plan.verifier}, whose tokens depend on what was drafted; use "
        "coupled, whose tokens do not, or a fixed k.",
    )
    require(policy.most == most, f"The policy is for widths 0..{policy.most} and the head drafts 0..{most}.")
    return start(model, _with_width(request, policy.best))


def proceed_adaptively(model: LanguageModel, request: Request, state: DecodeState, policy: Policy) -> DecodeState:
    """The loop until every row is done, at widths from 0 to the request's.

    Args:
      model, request: as in `proceed`.
      state: that of `start_adaptively`. It is donated.
      policy: chooses the widths, and learns.

    Returns:
      The last state. `drafted_Bk` and `accepted_Bk` are the host's, and count over all widths.
    """
    most, batch = request.plan.k, len(request.length_B)
    request = _with_width(request, state.draft_Bk.shape[1])
    total_2Bk = np.zeros((2, batch, most), int)
    done_B = np.array(state.done_B)  # waits for the prefill
    forwards_B, seen_2Bk = np.zeros(batch, int), np.zeros((2, batch, request.plan.k), int)
    while not done_B.all():
        k, budget = policy.choose()
        changed = k != request.plan.k
        begin = time.perf_counter()
        if changed:
            request = _with_width(request, k)
            state = _without_drafts(request.plan, state, request.sampling)
            seen_2Bk = np.zeros((2, batch, k), int)
        size = window(request.plan, state)
        loop = dataclasses.replace(request.plan, window=size)
        new = (loop, changed) not in policy.entered
        policy.entered |= {(loop, changed), (loop, False)}
        # Compiling and drafting none are not what a forward costs.
        apart = int(changed or new)
        if apart:
            state = jax.block_until_ready(enter(model, request, state, size, 1))
        change, begin = time.perf_counter() - begin, time.perf_counter()
        state = jax.block_until_ready(enter(model, request, state, size, budget))
        seconds = time.perf_counter() - begin
        done_B, left_B, now_B, now_2Bk = _progress(state)
        took_B, drafts_2Bk = now_B - forwards_B, now_2Bk - seen_2Bk
        forwards_B, seen_2Bk = now_B, now_2Bk
        total_2Bk[:, :, :k] += drafts_2Bk
        took = int(took_B.max())
        if took > apart:
            tried_B = np.maximum(took_B - changed, 0)  # the first forward of another width has no drafts
            tried, accepted_Bk = int(tried_B.max()), drafts_2Bk[1]
            accepted_k = tried * accepted_Bk.sum(0) / max(1, tried_B.sum())
            gained = int((left_B + took_B + accepted_Bk.sum(1)).max() - left_B.max()) - took
            change = 0.0 if new or not changed else change
            policy.record(Run(k, took - apart, seconds, tried, accepted_k, gained, change))
        else:
            policy.cut(k)
    return dataclasses.replace(state, drafted_Bk=total_2Bk[0], accepted_Bk=total_2Bk[1])


def _progress(state: DecodeState) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which rows are done, the tokens that are left to each, its forwards, and how often a draft at each offset was
    used and accepted, `[2, B, k]`."""
    # numpy alone: an eager operation of jax, between runs, takes as long as a forward of a small model. Copies: the
    # state is donated.
    done_B, limit_B, length_B, forwards_B, *drafts_2Bk = map(
        np.array,
        (state.done_B, state.limit_B, state.length_B, state.forwards_B, state.drafted_Bk, state.accepted_Bk),
    )
    return done_B, np.where(done_B, 0, limit_B - length_B), forwards_B, np.stack(drafts_2Bk)


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
