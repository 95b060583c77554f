"""One rule by which every claim is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mtp_jax.results.compare import Estimate

Verdict = Literal["confirmed", "not confirmed", "undecided"]

# Effects that are of no use: nats per window, tokens per forward, and a ratio of speeds over 1.
LOSS, TOKENS, SPEED = 0.02, 0.02, 0.01
RULE = (
    "A claim holds on a data set if the interval of some run lies wholly on its side, where the intervals are widened "
    "for the number of runs that are compared (Bonferroni); it fails there if no run's interval of 95% reaches an "
    f"effect that is of use ({LOSS:g} nats per window, {TOKENS:g} tokens per forward, {SPEED:.0%} of speed); else, and "
    "wherever there is one seed alone, nothing is decided. Confirmed: it holds on every data set given. Not confirmed: "
    "it fails on one. Undecided: the rest. Ranks are compared at equal wall-clock of training where nothing else is "
    "said."
)


def holds(estimates: Sequence[Estimate | None], useful: float, tests: int | None = None) -> bool | None:
    """Whether an effect, counted as positive, is there in one of the estimates; None where they cannot tell."""
    known = [e for e in estimates if e is not None and e.seeds > 1]
    if not known:
        return None
    if any(e.interval(tests or len(known))[0] > 0 for e in known):
        return True
    return False if all(e.interval()[1] < useful for e in known) else None


def negative(e: Estimate | None) -> Estimate | None:
    """The same effect the other way round: what falls, as something that grows."""
    return e and Estimate(-e.mean, e.seeds, e.documents, e.seed_error, e.error)


def equal(estimates: Sequence[Estimate | None], margin: float) -> bool | None:
    """Whether no estimate differs from 0 by more than `margin`; None where they cannot tell."""
    known = [e.interval(len(estimates)) for e in estimates if e is not None and e.seeds > 1]
    if not known:
        return None
    if any(low > margin or high < -margin for low, high in known):
        return False
    return True if all(-margin <= low and high <= margin for low, high in known) else None


def both(*parts: bool | None) -> bool | None:
    """Whether all hold."""
    return False if False in parts else None if None in parts else True


def judge(found: Sequence[bool | None]) -> Verdict:
    """The verdict on what was found on each data set."""
    whole = both(*found) if found else None
    return {True: "confirmed", False: "not confirmed", None: "undecided"}[whole]  # type: ignore[return-value]
