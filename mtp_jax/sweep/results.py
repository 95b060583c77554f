"""Results of sweeps: the files that `mtp-jax sweep` writes, read and checked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_jax.sweep.config import CASE, SEED
from mtp_jax.validate import ConfigError, require

FORMATS = 3, 4  # in 3 decoding knows k = 0 and W-1 alone
OVER = {"flops": "predicted", "seconds": "measured"}  # what a reading at equal cost is equal in
READINGS = {"steps": "equal steps", "flops": "equal training FLOPs", "seconds": "equal wall-clock"}
LETTERS = {"head.rank": "R", "head.window": "W"}  # of the legend of shapes
NEEDED = "format", "sweep", "size", "title", "command", "reference", "fields", "measure", "machine", "versions", "runs"


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
    """One file. `fields` are those of a `point`; `failed` are the runs that are not among `runs`, with their errors.

    `looks`: how often it was looked at, with more seeds added while it decided nothing; intervals are as much wider.
    `against`: the changes by which a run becomes the one that it is compared with; by default the sweep's own.
    """

    path: str
    raw: Mapping[str, Any]
    fields: tuple[str, ...]
    runs: tuple[Run, ...]
    failed: Mapping[str, str]
    looks: int = 1
    against: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What it is called on the page."""
        return f"{self.raw['sweep']} ({self.raw['size']})"

    @property
    def points(self) -> list[tuple[Any, ...]]:
        """The points that have a run, in the file's order."""
        return list(dict.fromkeys(run.point for run in self.runs))

    def of(self, point: tuple[Any, ...]) -> list[Run]:
        """The runs of a point, by seed."""
        return sorted((run for run in self.runs if run.point == point), key=lambda run: run.seed)

    def reference(self, point: tuple[Any, ...]) -> tuple[Any, ...]:
        """The point that one is compared with."""
        return self._changed(point, self.against or self.raw["reference"])

    def share(self, point: tuple[Any, ...], reading: str) -> float | None:
        """What part of the steps, FLOPs or seconds of the sweep's reference a point had spent at a reading, where both
        are."""
        runs, others = self.of(point), self.of(self._changed(point, self.raw["reference"]))
        step = runs[0].raw["readings"].get(reading)
        if step is None or not others:
            return None
        cost = runs[0].raw["cost"]["over_reference"][OVER[reading]] if reading in OVER else 1.0
        return cost * step / others[0].raw["config"]["steps"]

    def _changed(self, point: tuple[Any, ...], changes: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(_hashable(changes.get(name, at)) for name, at in zip(self.fields, point, strict=True))

    def text(self, point: tuple[Any, ...]) -> str:
        """A point in words, as in "R = 4, learning_rate = 0.001"; a case is its own word."""
        names = [LETTERS.get(name, name.rpartition(".")[2]) for name in self.fields]
        pairs = zip(names, point, strict=True)
        words = (str(value) if name == CASE else f"{name} = {value}" for name, value in pairs)
        return ", ".join(words) or self.of(point)[0].name


def load_results(
    paths: Iterable[str | os.PathLike[str]], looks: int = 1, reference: Mapping[str, str] | None = None
) -> list[Results]:
    """Read results files. `reference`: fields and their values, as they are written, of the runs to compare with.

    Raises `ConfigError`, with the file and the field, on one that is not of this format or has no such run, and where
    `looks` is less than 1.
    """
    require(looks >= 1, f"looks is {looks}; give how often the results were looked at, 1 or more.")
    found = [_load(Path(path), looks) for path in paths]
    require(bool(found), "There are no results files; give one or more that `mtp-jax sweep` has written.")
    return [dataclasses.replace(one, against=_against(one, reference or {})) for one in found]


def _against(results: Results, reference: Mapping[str, str]) -> dict[str, Any]:
    """The values that are written so."""
    found = {}
    for name, wanted in reference.items():
        at = results.fields.index(name) if name in results.fields else None
        values = {} if at is None else {str(point[at]): point[at] for point in results.points}
        known = f"{name} has the values {', '.join(values)}" if values else f"it has {', '.join(results.fields)}"
        require(wanted in values, f"The reference is {name}={wanted}, and {results.path} has no such run; {known}.")
        found[name] = values[wanted]
    return found


def _load(path: Path, looks: int) -> Results:
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
    fields = tuple(name for name in raw["fields"] if name != SEED)
    runs, failed = [], {}
    for run in raw["runs"]:
        for name in ("name", "changes", "state"):
            require(name in run, f"{path}: a run has no field {name!r} ({run.get('name', 'without a name')}).")
        if run["state"] != "done":
            failed[run["name"]] = run.get("error", "")
            continue
        for name in ("config", "cost", "readings", "measured"):
            require(name in run, f"{path}: the run {run['name']} is done and has no field {name!r}.")
        point = tuple(_hashable(run["changes"][name]) for name in fields)
        runs.append(Run(run["name"], point, run["changes"].get(SEED, 0), run))
    require(bool(runs), f"{path} has no finished run ({len(failed)} failed); start the sweep again.")
    return Results(str(path), raw, fields, tuple(runs), failed, looks)


def _hashable(value: Any) -> Any:
    """A value of a field, with tuples where JSON has lists."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
