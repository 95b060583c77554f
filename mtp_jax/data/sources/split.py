"""Separators: a stream of bytes is cut at one, with no more of it in memory than one piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 2**20  # bytes per read


def pieces(file: BinaryIO, separator: bytes, begin: int = 0, end: int = -1) -> Iterator[tuple[int, bytes]]:
    """The pieces of `file` from byte `begin` to `end` (-1: to its end), as `bytes.split` gives them: (offset, piece).

    Raises `EOFError` if the file ends before `end`.
    """
    if begin:
        file.seek(begin)
    pending, offset, unread, searched = bytearray(), begin, end - begin, 0
    while unread and (chunk := file.read(CHUNK if end < 0 else min(CHUNK, unread))):
        unread -= len(chunk)
        pending += chunk
        done = 0
        while (at := pending.find(separator, max(done, searched))) >= 0:
            yield offset + done, bytes(pending[done:at])
            done = at + len(separator)
        del pending[:done]
        offset += done
        searched = max(0, len(pending) - len(separator) + 1)  # a separator may go on in the next chunk
    if end >= 0 and unread:
        raise EOFError(f"it ends {unread} bytes early: it has changed since it was listed")
    yield offset, bytes(pending)


def boundary(file: BinaryIO, separator: bytes, least: int) -> int | None:
    """Where to cut `file`: the end of a separator that begins at byte `least` or later; None if there is none.

    It is one at which `pieces` cuts the whole file. Occurrences may overlap (of a blank line among several, say), and
    which of them count depends on all that overlap before: only one that overlaps none before is sure to count.
    """
    width = len(separator)
    offset = max(0, least - width + 1)
    search = least - offset
    file.seek(offset)
    pending = bytearray()
    while chunk := file.read(CHUNK):
        pending += chunk
        while (at := pending.find(separator, search)) >= 0:
            if pending.find(separator, max(0, at - width + 1), at + width - 1) < 0:
                return offset + at + width
            search = at + 1
        search = max(search, len(pending) - width + 1)
        done = max(0, len(pending) - 2 * width)
        del pending[:done]
        offset, search = offset + done, search - done
    return None
