"""Results of sweeps over rank: the data sets of the claims."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_jax.sweep.compare import Estimate, Metric, compare, held_out
from mtp_jax.sweep.results import Results, load_results

RANK = "head.rank"
# Why a sweep was looked at again, once for each further look: its data had decided too little, and another look is
# another chance to find what is not there. Results files do not say so. One seed alone decides nothing, so a look at it
# is none.
LOOKED_AGAIN = {
    "scratch_code": ["three seeds left acceptance and the first token undecided, so three more were run"],
    "lora_code": ["heads of 480 steps left the bar of 1.10x undecided, so heads of three times the steps were trained"],
}
first_token_loss = held_out("first_token")
Point = tuple[Any, ...]


@dataclass(frozen=True)
class RankResults(Results):
    """A results file, and the questions that the claims ask of it."""

    @property
    def frozen(self) -> bool:
        """Whether the heads were trained on a frozen trunk with one target."""
        return all(_on_base(run.raw["config"]) and run.head["target"] == "ntp" for run in self.runs)

    @property
    def over_balance(self) -> bool:
        """Whether runs differ in the kind or the weight of load balancing, and in nothing else of the head but rank."""
        names = {*self.besides_rank}
        return bool(names) and names <= {"head.balance", "head.balance_weight"}

    @property
    def over_rank(self) -> bool:
        """Whether points differ in one field and are of different ranks, all compared with rank 1."""
        if self.fields == (RANK,):
            return self.raw["reference"] == {RANK: 1}
        ranks = [self.rank(point) for point in self.points]
        reference = self.reference(self.points[0])
        alone = len(self.fields) == 1 and 1 < len(ranks) == len(set(ranks))
        return alone and reference in self.points and self.rank(reference) == 1

    def rank(self, point: tuple[Any, ...]) -> int:
        """The rank of a point's heads."""
        return self.of(point)[0].head["rank"]

    @property
    def is_code(self) -> bool:
        """Whether the text is source code."""
        return {run.raw["config"]["data"]["source"] for run in self.runs} <= {"stdlib", "packages"}

    @property
    def besides_rank(self) -> list[str]:
        """The fields of the head, other than rank, in which a point differs from its reference."""
        others = {point: self.of(self.reference(point)) for point in self.points}
        pairs = [(self.of(point)[0].head, of[0].head) for point, of in others.items() if of]
        unread = (
            {"rank"} if {run.head["factors"] for run in self.runs} <= {"lowrank", "lora"} else {"rank", "factor_width"}
        )
        names = dict.fromkeys(name for own, _ in pairs for name in own if name not in unread)
        return [f"head.{name}" for name in names if any(own.get(name) != other.get(name) for own, other in pairs)]


def load(paths: Iterable[str | os.PathLike[str]]) -> list[RankResults]:
    """Read results files. Raises `ConfigError`, with the file and the field, on one that is not of this format."""
    found = load_results(paths)
    return [RankResults(**{**vars(of), "looks": 1 + len(LOOKED_AGAIN.get(of.raw["sweep"], []))}) for of in found]


def rank_sweeps(all_results: Sequence[RankResults], frozen: bool = True) -> list[RankResults]:
    """The data sets: sweeps over rank, on a frozen trunk or from scratch."""
    return [r for r in all_results if r.over_rank and r.frozen == frozen]


def all_rank_sweeps(all_results: Sequence[RankResults]) -> list[RankResults]:
    """Both kinds, those on a frozen trunk first."""
    return rank_sweeps(all_results) + rank_sweeps(all_results, frozen=False)


def above_one(results: RankResults) -> list[Point]:
    """The points that are not their own reference."""
    others = {point: results.reference(point) for point in results.points}
    return [point for point, other in others.items() if other != point and results.of(other)]


def differences(results: RankResults, reading: str, metric: Metric) -> list[Estimate | None]:
    """Of all points, to what they are compared with."""
    return [compare(results, point, reading, metric) for point in above_one(results)]


def _on_base(config: dict[str, Any]) -> bool:
    """Whether a run trained a head alone. Earlier results say it with `freeze`."""
    return bool(config.get("base")) or config.get("freeze") == "trunk"
