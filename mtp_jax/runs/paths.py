"""Paths of runs on a local disk or in a bucket (`gs://bucket/run`), where `etils.epath` leaves a choice."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec.config
from etils import epath

from mtp_jax.validate import require

# TensorStore and other processes write past this one's gcsfs: what that remembers of a folder is soon wrong, and a step
# or a file of it would not be seen.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

LOCK = ".mtp_jax.lock"
"""How the names of a run's lock begin (`mtp_jax.runs.lock`), which is no content of the run."""


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is on a disk, which has folders, appends and renames."""
    return "://" not in str(path)


def full_path(path: epath.PathLike) -> epath.Path:
    """The path of a run from the root, or its URL.

    Raises `ConfigError` for another URL than `gs://BUCKET/...`, or if the package that opens those is missing.
    """
    given = str(path)
    if is_local(given):
        return epath.Path(path).expanduser().resolve()
    require(
        given.startswith("gs://"),
        f"The run directory is {given}; it must be a local path or gs://BUCKET/..., which are all that Orbax writes.",
    )
    require(
        any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")),
        f"The run directory is {given}, and gcsfs, which opens gs://, is not installed: pip install 'mtp_jax[gcs]'.",
    )
    return epath.Path(given)  # `resolve` would make it a folder below the working directory


def given_path(path: epath.PathLike) -> epath.Path:
    """The path as it was given, or its URL. Raises `ConfigError` as `full_path` does."""
    return epath.Path(path) if is_local(path) else full_path(path)


def children(folder: epath.Path) -> list[epath.Path]:
    """What lies in a folder but a lock; nothing if it is none, or not there, as an empty one never is in a bucket."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(LOCK)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def plain_path(path: epath.Path) -> epath.Path:
    """A path of the same place for Orbax: it merges files of a save by a glob, and its storage wants UTF-8 and takes
    a backslash for a slash.

    Where a path has any of that, it is a link in the directory of temporary files, the same for all
    processes of a machine.
    """
    text = str(path)
    if not is_local(path) or not any(c in "[]*?\\" or "\ud800" <= c <= "\udfff" for c in text):
        return path
    links = Path(tempfile.gettempdir(), f"mtp_jax-{os.getuid()}")
    links.mkdir(mode=0o700, exist_ok=True)
    link = links / hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
    with contextlib.suppress(FileExistsError):
        link.symlink_to(text)
    return epath.Path(link)


def make_folder(path: epath.Path) -> list[epath.Path]:
    """Make a folder and those above it, behind a link too, and return those that were made, the deepest first."""
    if not is_local(path):
        path.mkdir(parents=True, exist_ok=True)
        return []
    path = epath.Path(os.path.realpath(path))
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def is_link(path: epath.Path) -> bool:
    """Whether a path is a link, whose place is somebody's own."""
    return is_local(path) and os.path.islink(path)


def check_writable(path: epath.Path, way_out: str, *, folder: bool = False) -> None:
    """Raise `ConfigError`, before any work, where a file or a folder cannot be written: a run may be somebody else's.

    Folders above it that are not there are to be made.
    """
    if not is_local(path):
        return
    at = path
    while not at.exists() and at != at.parent:
        at = at.parent
    fits = at.is_dir() if folder or at != path else not at.is_dir()
    require(fits and os.access(at, os.W_OK), f"{path} would be written and cannot be. {way_out}")


def write_page(path: epath.Path, text: str) -> None:
    """Write a text in which names may have bytes that are no UTF-8."""
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def replace_file(path: epath.Path, data: str | bytes) -> None:
    """Write a file in one go, so that a kill right here leaves the old one; object stores do nothing else."""
    aside = path.with_name(f"{path.name}.partial") if is_local(path) else path
    aside.write_bytes(data.encode() if isinstance(data, str) else data)
    if aside != path:
        aside.replace(path)


def write_json(path: epath.Path, values: Any) -> None:
    """Write a JSON file, and its folder where there is none, in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(values, indent=1) + "\n")
