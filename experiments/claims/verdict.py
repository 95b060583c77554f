"""Verdicts: one rule by which every claim is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mtp_jax.sweep.compare import Estimate

Verdict = Literal["confirmed", "not confirmed", "undecided"]

# The least effects that are of use: nats per window, tokens per forward, and a ratio of speeds over 1.
LOSS, TOKENS, SPEED = 0.02, 0.02, 0.01
RULE = (
    "A claim holds on a data set if the interval of some run lies wholly above the least effect that is of use "
    f"({LOSS:g} nats per window, {TOKENS:g} tokens per forward, {SPEED:.0%} of speed), where the intervals are widened "
    "for the number of runs that are compared (Bonferroni); it fails there if the intervals of 95% of all runs lie "
    "wholly below it; else, and wherever there is one seed alone, nothing is decided. So no interval is both. "
    "Confirmed: it holds on every data set given. Not confirmed: it fails on one. Undecided: the rest. The level is "
    "divided over the looks at a data set: the intervals shown are of 95% for all its looks together. Ranks are "
    "compared at equal wall-clock of training where nothing else is said."
)


def holds(estimates: Sequence[Estimate | None], useful: float, tests: int | None = None) -> bool | None:
    """Whether an effect, counted as positive, is there in one of the estimates.

    True: an interval, widened for so many tests (those of several seeds, if None), lies wholly above `useful`. False:
    those of 95% all lie wholly below it. None: they cannot tell. The first two exclude each other.
    """
    known = [e for e in estimates if e is not None and e.seeds > 1]
    if any(e.interval(tests or len(known))[0] > useful for e in known):
        return True
    return False if known and all(e.interval()[1] < useful for e in known) else None


def negative(e: Estimate | None) -> Estimate | None:
    """The same effect the other way round: what falls, as something that grows."""
    return e and replace(e, mean=-e.mean)


def equal(estimates: Sequence[Estimate | None], margin: float) -> bool | None:
    """Whether no estimate differs from 0 by more than `margin`; None where they cannot tell."""
    known = [e.interval(len(estimates)) for e in estimates if e is not None and e.seeds > 1]
    if any(low > margin or high < -margin for low, high in known):
        return False
    return True if known and all(-margin <= low and high <= margin for low, high in known) else None


def both(*parts: bool | None) -> bool | None:
    """Whether all hold."""
    return False if False in parts else None if None in parts else True


def judge(found: Sequence[bool | None]) -> Verdict:
    """The verdict on what was found on each data set; undecided where there is none."""
    whole = both(*found) if found else None
    return {True: "confirmed", False: "not confirmed", None: "undecided"}[whole]  # type: ignore[return-value]
