"""Standard output and error that cannot be written."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
from collections.abc import Iterator
from typing import TextIO


def full_disk() -> TextIO:
    """A log on a disk that is full."""
    return open("/dev/full", "w")


def no_reader() -> TextIO:
    """A pipe into a program that has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed_terminal() -> TextIO:
    """A terminal whose window is closed."""
    master, slave = pty.openpty()
    os.close(master)
    return open(slave, "w")


GONE = {made.__name__: made for made in (full_disk, no_reader, closed_terminal)}


@contextlib.contextmanager
def gone(kind: str) -> Iterator[TextIO]:
    """A context whose standard output and error are gone. They must be flushed in it, or dropped."""
    before = sys.stdout, sys.stderr
    with GONE[kind]() as stream:
        sys.stdout = sys.stderr = stream
        try:
            yield stream
        finally:
            sys.stdout, sys.stderr = before
