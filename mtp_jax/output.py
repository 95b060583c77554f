"""Standard output and error whose reader may go: `head` has seen enough, a terminal is closed, a log fills its disk.

What is computed and stored does not depend on who reads of it: what cannot be printed is dropped.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Output:
    """A stream that raises nothing. `lost` is why something could not be printed, other than that nobody reads any
    more (a broken pipe), which `ends` the command where it has nothing else to do."""

    def __init__(self, stream: Any, ends: bool = False):
        # Python has none where it was closed.
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.lost: Exception | None = None
        self._ends = ends

    def write(self, text: str) -> int:
        """Write, or drop it. Characters that the stream does not have are escaped."""

        def write() -> None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

        self._try(write)
        return len(text)

    def flush(self) -> None:
        """Flush what can be."""
        self._try(self.stream.flush)

    def close_unread(self) -> None:
        """Flush, and let what cannot be go nowhere: Python would end with status 120 for it."""
        with contextlib.suppress(Exception):
            try:
                self.stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def _try(self, do: Callable[..., Any], *args: Any) -> None:
        try:
            do(*args)
        except BrokenPipeError as error:
            if self._ends:
                raise SystemExit(0) from error
        except Exception as error:  # a notebook's streams have errors of their own
            self.lost = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def safe_output(*, ends: bool = False) -> Iterator[Output]:
    """A context in which `sys.stdout`, which it yields, and `sys.stderr` are an `Output`. `ends`: that of the first."""
    before = {"stdout": (sys.stdout, ends), "stderr": (sys.stderr, False)}
    ours = {name: Output(*given) for name, given in before.items() if not isinstance(given[0], Output)}
    for name, output in ours.items():
        setattr(sys, name, output)
    try:
        yield sys.stdout  # type: ignore[misc]
    finally:
        for name, output in ours.items():
            if getattr(sys, name) is output:
                setattr(sys, name, output.stream)
            output.close_unread()


def open_standard_files() -> None:
    """Open what was closed (`>&-`): a file of a run would get its number, and with it what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
