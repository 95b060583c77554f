"""Paths of runs, on a local disk or in an object store (`gs://bucket/run`), where `etils.epath` leaves a choice."""

from __future__ import annotations

import fsspec.config
from etils import epath

# TensorStore writes the arrays past gcsfs: what that remembers of a folder is soon wrong, and a manifest made from it
# would lack them.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is on a disk, which has folders, appends and renames."""
    return "://" not in str(path)


def full_path(path: epath.PathLike) -> epath.Path:
    """The path from the root, or the URL as it is: `epath` would resolve it to a folder below this one."""
    path = epath.Path(path).expanduser()
    return path.resolve() if is_local(path) else path


def children(folder: epath.Path) -> list[epath.Path]:
    """What lies in a folder; nothing if it does not exist, as an empty one never does in an object store."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
