"""Manifest of a directory: size and SHA-256 of each of its files. What is read later is what was written.

It is written last: a directory without one was not finished. It carries a hash of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from mtp_jax.runs.paths import children, is_local, replace_file

MANIFEST = "manifest.json"
BLOCK = 2**22
THREADS = 8

Entry = tuple[int, str]  # bytes, SHA-256 in hexadecimal


class DamagedError(RuntimeError):
    """A file that is not what was sealed. The message names it and says what is wrong with it."""

    def __init__(self, path: epath.Path, problem: str):
        super().__init__(f"{path} {problem}")


def seal(directory: epath.Path) -> None:
    """Write the manifest of all files under `directory`. On a local disk they have reached it before the manifest."""
    files = sorted(_files(directory))
    entries = _parallel(lambda file: _measure(directory / file, sync=is_local(directory)), files)
    if is_local(directory):
        for folder in {directory, *((directory / file).parent for file in files)}:
            _sync_folder(folder)
    replace_file(directory / MANIFEST, _to_json(dict(zip(files, entries, strict=True))))
    if is_local(directory):
        _sync_folder(directory)


def unseal(directory: epath.Path) -> None:
    """Remove a directory, its manifest first: a kill on the way leaves one that was not finished."""
    (directory / MANIFEST).unlink(missing_ok=True)
    directory.rmtree()


def is_sealed(directory: epath.Path) -> bool:
    """Whether a directory was finished."""
    return (directory / MANIFEST).exists()


def check(directory: epath.Path, folders: Iterable[str] | None = None, shard: tuple[int, int] = (0, 1)) -> None:
    """Read the files of `folders` and those outside of folders, or all, and compare them with the manifest.

    Of `shard` (index, count) processes that share the work, this one reads every count-th file. Files that the
    manifest does not have are left alone.

    Raises:
      DamagedError: a file is missing, or is not the one that was sealed; or the manifest itself is.
    """
    entries = _entries(directory)
    wanted = [name for name in entries if folders is None or "/" not in name or name.split("/")[0] in folders]
    index, count = shard
    _parallel(lambda name: _compare(directory / name, entries[name]), sorted(wanted)[index::count])


def digest(directory: epath.Path, folder: str) -> str:
    """A hash of what was sealed in `folder` of a directory, from the manifest alone. Raises `DamagedError`."""
    entries = {name: entry for name, entry in _entries(directory).items() if name.startswith(f"{folder}/")}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _files(directory: epath.Path, prefix: str = "") -> list[str]:
    found = []
    for path in directory.iterdir():
        if path.is_dir():
            found += _files(path, f"{prefix}{path.name}/")
        elif prefix + path.name != MANIFEST:
            found.append(prefix + path.name)
    return found


def _parallel(function: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, names))


def _measure(path: epath.Path, sync: bool = False) -> Entry:
    """Size and hash of a file, read in blocks."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return size, sha.hexdigest()


def _compare(path: epath.Path, entry: Entry) -> None:
    try:
        found = _measure(path)
    except FileNotFoundError as error:
        raise DamagedError(path, "is missing.") from error
    except OSError as error:
        raise DamagedError(path, f"cannot be read ({error}).") from error
    if found[0] != entry[0]:
        raise DamagedError(path, f"has {found[0]:,} bytes and was written with {entry[0]:,}.")
    if found[1] != entry[1]:
        raise DamagedError(path, f"has other bytes than were written (sha256 {found[1][:12]}, not {entry[1][:12]}).")


def _entries(directory: epath.Path) -> dict[str, Entry]:
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode()
        entries = json.loads(text)["files"]
        if text != _to_json(entries):
            raise ValueError("its hash is another")
        return {name: (size, sha) for name, (size, sha) in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(path, f"is no manifest, or not the one that was written ({error}).") from error


def _to_json(entries: dict[str, Entry]) -> str:
    sha = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": sha}, indent=1, sort_keys=True) + "\n"


def _sync_folder(folder: epath.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed_steps(root: epath.Path) -> list[int]:
    """The steps below `root` that have their manifest, in order."""
    return sorted(int(path.name) for path in children(root) if path.name.isdigit() and is_sealed(path))


def unsealed_steps(root: epath.Path) -> list[int]:
    """The steps below `root` that Orbax has finished and that lack their manifest, in order.

    Their arrays are all there, and nobody knows whether they are what was written.
    """
    from orbax.checkpoint.utils import is_checkpoint_finalized

    unsealed = [path for path in children(root) if path.name.isdigit() and not is_sealed(path)]
    return sorted(int(path.name) for path in unsealed if is_checkpoint_finalized(path))


def how_to_seal(root: epath.Path) -> str:
    """What may be done about the unsealed steps below `root`, as a sentence; nothing if there are none."""
    found = unsealed_steps(root)
    if not found:
        return ""
    return (
        f" Steps {found} have no {MANIFEST}: they were not finished, or were saved by a version without. "
        f"`mtp_jax.runs.manifest.seal(etils.epath.Path({str(root / str(found[-1]))!r}))` makes the last one complete "
        "as it is."
    )
