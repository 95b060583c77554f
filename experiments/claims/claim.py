"""Claim: its verdict and evidence, and how numbers stand in its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from experiments.claims.data import Point, RankResults
from experiments.claims.verdict import Verdict
from mtp_jax.sweep.compare import Estimate, tokens_per_forward

MAIN_T = 0.7  # the temperature that is judged
TOKENS_T = tokens_per_forward(MAIN_T)


@dataclass
class Claim:
    """A claim, what was found and where it was found."""

    title: str
    verdict: Verdict
    text: str
    table: str = ""
    sources: Sequence[RankResults] = field(default_factory=list)


def undecided(title: str, what: str) -> Claim:
    """A claim without data."""
    return Claim(title, "undecided", f"There are no data: {what}.")


def signed(e: Estimate | None) -> str:
    """A difference with its interval, in a table."""
    return "-" if e is None else f"{e:+.3f}"


def over_text(
    results: RankResults, point: Point, e: Estimate | None, text: Callable[[Estimate | None], str] = signed
) -> str:
    """What a point has against its reference, in a table."""
    return "reference" if results.reference(point) == point else text(e)


def above(e: Estimate, least: float) -> Estimate:
    """How far it is above `least`."""
    return replace(e, mean=e.mean - least)


def ratio_text(e: Estimate | None) -> str:
    """A ratio with its interval, in a table."""
    return "-" if e is None else f"{e:.3f}".replace(" ", "x ", 1)
