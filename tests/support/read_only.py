"""What belongs to somebody else: a directory in which nothing can be written, whoever runs the tests."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10  # of Linux: FS_IOC_GETFLAGS and so on


@contextlib.contextmanager
def read_only(*roots: Path) -> Iterator[None]:
    """A context in which nothing below `roots` is written. The superuser, whom no mode binds, is held by the file
    system; where that is not possible the test is skipped."""
    paths = [path for root in roots for path in (root, *root.rglob("*")) if not path.is_symlink()]
    modes = {path: path.stat().st_mode for path in paths}
    marked: list[Path] = []
    try:
        for path in paths:
            path.chmod(modes[path] & ~0o222)
        for path in paths if os.access(roots[0], os.W_OK) else ():
            try:
                _mark(path, True)
            except OSError as error:
                pytest.skip(f"nothing here makes a directory read-only for this user ({error})")
            marked.append(path)
        assert not any(os.access(path, os.W_OK) for path in paths)
        yield
    finally:
        for path in marked:
            _mark(path, False)
        for path, mode in modes.items():
            path.chmod(mode)


def _mark(path: Path, immutable: bool) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        flags = array.array("l", [0])
        fcntl.ioctl(handle, GET_FLAGS, flags, True)
        flags[0] = flags[0] | IMMUTABLE if immutable else flags[0] & ~IMMUTABLE
        fcntl.ioctl(handle, SET_FLAGS, flags, False)
    finally:
        os.close(handle)
