"""What a sweep leaves: a directory for each run, a record of what was measured of it, and one results file.

DIR/RUN/               a run directory, as `mtp-jax train` makes it
DIR/records/RUN.json   what was measured of the run, or why it failed
DIR/logs/RUN.log       what it printed, if `mtp-jax sweep` started it

DIR may be in a bucket; logs grow, which files in a bucket do not, and are then in logs/BUCKET/... here.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from mtp_jax.config import to_dict
from mtp_jax.paths import is_local
from mtp_jax.run_dir import replace_file
from mtp_jax.sweep.config import COSTS, NamedSweep

FORMAT = 1


@dataclass(frozen=True)
class Place:
    """The directory of a sweep, on a disk or in a bucket."""

    directory: epath.Path

    def run(self, name: str) -> epath.Path:
        """The run directory of a run."""
        return self.directory / name

    def log(self, name: str) -> Path:
        """What a run prints."""
        if is_local(self.directory):
            return Path(self.directory, "logs", f"{name}.log")
        return Path("logs", str(self.directory).partition("://")[2], f"{name}.log")

    def record(self, name: str) -> epath.Path:
        """What was measured of a run."""
        return self.directory / "records" / f"{name}.json"

    def read(self, named: NamedSweep, name: str) -> dict[str, Any] | None:
        """The record of a run, if it is of that config and of that measurement (and costs, of all shapes)."""
        path = self.record(name)
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        same = record["config"] == plain(named.config(name, self.directory))
        shapes = {variant.shape for variant in named.sweep.variants.values()}
        same = same and shapes <= set(record.get("costs", shapes))
        same = same and (name in named.sweep.first or record["measure"] == plain(named.sweep.measure))
        return record if same else None

    def done(self, named: NamedSweep, name: str) -> bool:
        """Whether a run is trained and measured."""
        record = self.read(named, name)
        return record is not None and record["state"] == "done"

    def write(self, named: NamedSweep, name: str, values: dict[str, Any]) -> None:
        """Write the record of a run, in one go."""
        config = {"config": plain(named.config(name, self.directory)), "measure": plain(named.sweep.measure)}
        write_json(self.record(name), {"name": name, **config, **values})


def plain(config: Any) -> Any:
    """A config as what JSON makes of it."""
    return json.loads(json.dumps(to_dict(config)))


def write_json(path: epath.Path, values: Any) -> None:
    """Write a JSON file in one go, so that a kill right here leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(values, indent=1) + "\n")


def collect(named: NamedSweep, place: Place) -> dict[str, Any]:
    """The results file of a sweep, from the records that are there."""
    found = {name: record for name in named.runs if (record := place.read(named, name)) is not None}
    shared = next((record for record in found.values() if record["state"] == "done"), {})
    first, runs = {}, []
    for name, record in found.items():
        # The measurement is the same for all, and what differs from the file's machine and versions is kept.
        said = {key: value for key, value in record.items() if key != "measure"}
        for key in ("machine", "versions"):
            if said.get(key) == shared.get(key):
                said.pop(key, None)
        if name in named.sweep.variants:
            runs.append({**said, "changes": dict(named.sweep.variants[name].changes)})
        elif name != COSTS:  # those are with each run
            first[name] = said
    return {
        "format": FORMAT,
        "sweep": named.name,
        "size": named.size,
        "title": named.title,
        "command": f"mtp-jax sweep {named.key}",
        "reference": dict(named.sweep.reference),
        "fields": named.sweep.fields,
        "measure": plain(named.sweep.measure),
        "machine": shared.get("machine", {}),
        "versions": shared.get("versions", {}),
        "first": first,
        "runs": runs,
    }


def machine(device: str) -> dict[str, Any]:
    """What the numbers of a record depend on: the accelerator by JAX's name, and the computer around it."""
    return {
        "device": device,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
