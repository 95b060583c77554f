"""Records of a sweep: a directory for each run, a record of what was measured of it, and one results file.

DIR/RUN/               a run directory, as `mtp-jax train` makes it
DIR/records/RUN.json   what was measured of the run, or why it failed
DIR/logs/RUN.log       what it printed, if `mtp-jax sweep` started it
DIR/texts/T.json       what a base wrote behind the prompts of a suite at temperature T

DIR may be in a bucket; logs grow, which files in a bucket do not, and are then in logs/BUCKET/... here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from mtp_jax.config import TrainConfig
from mtp_jax.runs.base import is_there, open_base
from mtp_jax.runs.layout import CHECKPOINTS_DIR
from mtp_jax.runs.manifest import MANIFEST, sealed_steps
from mtp_jax.runs.paths import is_local, write_json
from mtp_jax.sweep.config import COSTS, NamedSweep
from mtp_jax.sweep.results import FORMATS
from mtp_jax.validate import to_dict

FORMAT = FORMATS[-1]
VECTORS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}  # what decides how fast an x86 core is


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

    def config(self, named: NamedSweep, name: str) -> TrainConfig:
        """The config of a run as it is trained: with what its base says. One of the sweep's own that is not there yet
        says nothing.

        Raises `ConfigError` if its base is no run of the sweep, and is not there or does not fit.
        """
        config = named.config(name, self.directory)
        if not config.base or (self._own(named, config.base) and not is_there(config.base)):
            return config
        return open_base(config.base).resolve(config)

    def _own(self, named: NamedSweep, run_dir: str) -> bool:
        return run_dir in [str(self.run(first)) for first in named.sweep.first]

    def read(self, named: NamedSweep, name: str) -> dict[str, Any] | None:
        """The record of a run, if its `subject` is that of now."""
        path = self.record(name)
        record = json.loads(path.read_text()) if path.exists() else None
        return record if record and record.get("subject") == self.subject(named, name) else None

    def subject(self, named: NamedSweep, name: str) -> dict[str, Any]:
        """What a record is of. The costs are of all shapes and what each is compared with; a variant is of its config,
        of the trunk that it begins from and of the costs that it is read by, so that all are of one measurement."""
        sweep = named.sweep
        if name == COSTS:
            shapes = [variant for variant in sweep.variants.values() if variant.whole]
            found: dict[str, Any] = {shape.name: [plain(shape.config), shape.reference] for shape in shapes}
            others = {shape.config.base for shape in shapes} - {"", *sweep.first}
            found |= {"bases": {base: fingerprint(base) for base in sorted(others)}} if others else {}
        else:
            found = {"config": plain(named.config(name, self.directory))}
        if name in sweep.variants:
            begin = named.config(name, self.directory).begins_from
            found |= {"begins_from": fingerprint(begin) if begin else "", "costs": _sha256(self.record(COSTS))}
            found |= {"suite": _sha256(epath.Path(sweep.measure.suite))} if sweep.measure.suite else {}
        return {"format": FORMAT, **found, **({} if name in sweep.first else {"measure": plain(sweep.measure)})}

    def done(self, named: NamedSweep, name: str) -> bool:
        """Whether a run is trained and measured."""
        record = self.read(named, name)
        return record is not None and record["state"] == "done"

    def write(self, named: NamedSweep, name: str, values: dict[str, Any]) -> None:
        """Write the record of a run, in one go."""
        write_json(self.record(name), {"name": name, "subject": self.subject(named, name), **values})

    def fail(self, named: NamedSweep, name: str, error: str) -> None:
        """Write that a run failed. What was measured of something else, under the same name, stays."""
        if self.read(named, name) or not self.record(name).exists():
            self.write(named, name, {"state": "failed", "error": error})

    def forget(self, named: NamedSweep, name: str) -> None:
        """Forget that a run failed: it is tried again, and may end without a word."""
        if (self.read(named, name) or {}).get("state") == "failed":
            self.record(name).unlink()


def fingerprint(run_dir: epath.PathLike) -> str:
    """What tells a run's last step from that of any other: the hash of its manifest, which holds those of its files."""
    root = epath.Path(run_dir) / CHECKPOINTS_DIR
    return _sha256(root / str(max(sealed_steps(root), default=0)) / MANIFEST)


def _sha256(path: epath.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def plain(config: Any) -> Any:
    """A config as what JSON makes of it."""
    return json.loads(json.dumps(to_dict(config)))


def collect(named: NamedSweep, place: Place) -> dict[str, Any]:
    """The results file of a sweep, from the records that are there."""
    found = {name: record for name in named.runs if (record := place.read(named, name)) is not None}
    shared = found.get(COSTS, {})  # all times that are compared are of its machine
    first, runs = {}, []
    for name, record in found.items():
        said = {**record, "config": plain(named.config(name, place.directory))}
        said["begins_from"] = said.pop("subject").get("begins_from", "")
        for key in ("machine", "versions"):  # what differs from the file's is kept
            if said.get(key) == shared.get(key):
                said.pop(key, None)
        if name in named.sweep.variants:
            variant = named.sweep.variants[name]
            cost = {} if record["state"] == "failed" else {"cost": shared["costs"][variant.shape]}
            runs.append({**said, "changes": dict(variant.changes), **cost})
        elif name != COSTS:
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
        "processor": _cpuinfo("model name") or platform.processor(),
        "vectors": " ".join(sorted(VECTORS & set(_cpuinfo("flags").split()))),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpuinfo(field: str) -> str:
    """What Linux says of the first core."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
