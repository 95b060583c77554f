"""Results files, as `mtp-jax sweep` writes them, and the questions that the page asks of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_jax.config import ConfigError, require

SEED, RANK = "seed", "head.rank"
FORMATS = 3, 4  # in 3 decoding knows k = 0 and W-1 alone
READINGS = {"steps": "equal steps", "flops": "equal training FLOPs", "seconds": "equal wall-clock"}
NEEDED = ("format", "sweep", "size", "title", "command", "reference", "fields", "machine", "versions", "first", "runs")


@dataclass(frozen=True)
class Run:
    """A finished run. `point` is what it is of the question, without its seed: the values of the fields in order."""

    name: str
    point: tuple[Any, ...]
    seed: int
    raw: Mapping[str, Any]

    def at(self, reading: str) -> Mapping[str, Any] | None:
        """What was measured for a reading; None if that is not one of this run's."""
        step = self.raw["readings"].get(reading)
        return None if step is None else self.raw["measured"][str(step)]

    @property
    def head(self) -> Mapping[str, Any]:
        """The head's config."""
        return self.raw["config"]["head"]


@dataclass(frozen=True)
class Results:
    """One file. `fields` are those of a `point`; `failed` are the runs that are not among `runs`, with their errors."""

    path: str
    raw: Mapping[str, Any]
    fields: tuple[str, ...]
    runs: tuple[Run, ...]
    failed: Mapping[str, str]

    @property
    def label(self) -> str:
        """What it is called on the page."""
        return f"{self.raw['sweep']} ({self.raw['size']})"

    @property
    def frozen(self) -> bool:
        """Whether the heads were trained on a frozen trunk with one target."""
        return all(run.raw["config"]["freeze"] == "trunk" and run.head["target"] == "ntp" for run in self.runs)

    @property
    def over_balance(self) -> bool:
        """Whether runs differ in the kind or the weight of load balancing."""
        return len({(run.head["balance"], run.head["balance_weight"]) for run in self.runs}) > 1

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
    def points(self) -> list[tuple[Any, ...]]:
        """The points that have a run, in the file's order."""
        return list(dict.fromkeys(run.point for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """The seeds that have a run."""
        return sorted({run.seed for run in self.runs})

    def of(self, point: tuple[Any, ...]) -> list[Run]:
        """The runs of a point, by seed."""
        return sorted((run for run in self.runs if run.point == point), key=lambda run: run.seed)

    def plain_alike(self, run: Run) -> list[Run]:
        """Runs, one of each point, whose decoding without drafts is the same work as that of `run`: the same model with
        a next-token head (`ntp`)."""
        own = run.raw["config"]["model"]
        firsts = [self.of(point)[0] for point in self.points]
        alike = [other for other in firsts if other.head["target"] == "ntp" and other.raw["config"]["model"] == own]
        return alike if run.head["target"] == "ntp" else [run]

    def reference(self, point: tuple[Any, ...]) -> tuple[Any, ...]:
        """The point that one is compared with."""
        changes = self.raw["reference"]
        return tuple(changes.get(field, value) for field, value in zip(self.fields, point, strict=True))

    def text(self, point: tuple[Any, ...]) -> str:
        """A point in words."""
        if self.fields == (RANK,):
            return f"R = {point[0]}"
        pairs = zip(self.fields, point, strict=True)
        words = (str(value) if field == "case" else f"{_short(field)} = {value}" for field, value in pairs)
        return ", ".join(words)

    def share(self, point: tuple[Any, ...], reading: str) -> float:
        """What part of the steps, FLOPs or seconds of its reference a point had spent at a reading."""
        run, other = self.of(point)[0], self.of(self.reference(point))[0]
        over = {"flops": "predicted", "seconds": "measured"}.get(reading)
        cost = run.raw["cost"]["over_reference"][over] if over else 1.0
        return cost * run.raw["readings"][reading] / other.raw["config"]["steps"]

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


def _short(field: str) -> str:
    return {RANK: "R", "head.window": "W"}.get(field, field.rpartition(".")[2])


def load_results(paths: Iterable[str | os.PathLike[str]]) -> list[Results]:
    """Read results files. Raises `ConfigError`, with the file and the field, on one that is not of this format."""
    found = [_load(Path(path)) for path in paths]
    require(bool(found), "There are no results files; give one or more that `mtp-jax sweep` has written.")
    return found


def _load(path: Path) -> Results:
    require(path.is_file(), f"There is no results file {path}; `mtp-jax sweep` writes them.")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); give a file that `mtp-jax sweep` has written.") from error
    for name in NEEDED:
        require(
            isinstance(raw, dict) and name in raw,
            f"{path} has no field {name!r}; give a file that `mtp-jax sweep` has written.",
        )
    known = ", ".join(map(str, FORMATS))
    require(raw["format"] in FORMATS, f"{path} is of format {raw['format']} and this is for {known}; write it anew.")
    fields = tuple(field for field in raw["fields"] if field != SEED)
    runs, failed = [], {}
    for run in raw["runs"]:
        for name in ("name", "changes", "state"):
            require(name in run, f"{path}: a run has no field {name!r} ({run.get('name', 'without a name')}).")
        if run["state"] != "done":
            failed[run["name"]] = run.get("error", "")
            continue
        for name in ("config", "cost", "readings", "measured"):
            require(name in run, f"{path}: the run {run['name']} is done and has no field {name!r}.")
        point = tuple(run["changes"][field] for field in fields)
        runs.append(Run(run["name"], point, run["changes"].get(SEED, 0), run))
    require(bool(runs), f"{path} has no finished run ({len(failed)} failed); start the sweep again.")
    return Results(str(path), raw, fields, tuple(runs), failed)
