"""Separators: a stream of bytes is cut at one, with no more of it in memory than one piece."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 2**20  # bytes per read


@functools.cache
def pattern(separator: bytes) -> tuple[re.Pattern[bytes], int]:
    r"""What `separator` is in a file, each `\n` of it CRLF or LF unless it says `\r\n`, and the most bytes that it has.

    A `\r` before the first of its bytes is left to the piece before.
    """
    lines = re.split(rb"(?<!^)(?<!\r)\n", separator)
    return re.compile(rb"\r?\n".join(map(re.escape, lines))), len(separator) + len(lines) - 1


def pieces(file: BinaryIO, separator: bytes, begin: int = 0, end: int = -1) -> Iterator[tuple[int, bytes]]:
    """The pieces of `file` from byte `begin` to `end` (-1: to its end), as `bytes.split` gives them: (offset, piece).

    Raises `EOFError` if the file ends before `end`.
    """
    if begin:
        file.seek(begin)
    found, width = pattern(separator)
    pending, offset, unread, searched = bytearray(), begin, end - begin, 0
    while unread and (chunk := file.read(CHUNK if end < 0 else min(CHUNK, unread))):
        unread -= len(chunk)
        pending += chunk
        done = 0
        while match := found.search(pending, max(done, searched)):
            yield offset + done, bytes(pending[done : match.start()])
            done = match.end()
        del match, pending[:done]  # a match holds on to what it was found in
        offset += done
        searched = max(0, len(pending) - width + 1)  # a separator may go on in the next chunk
    if end >= 0 and unread:
        raise EOFError(f"it ends {unread} bytes early: it has changed since it was listed")
    yield offset, bytes(pending)


def boundary(file: BinaryIO, separator: bytes, least: int) -> int | None:
    """Where to cut `file`: the end of a separator that begins at byte `least` or later; None if there is none.

    It is one at which `pieces` cuts the whole file. Occurrences may overlap (of a blank line among several, say), and
    which of them count depends on all that overlap before: only one that overlaps none before is sure to count.
    """
    found, width = pattern(separator)
    offset = max(0, least - width + 1)
    search = least - offset
    file.seek(offset)
    pending = b""
    while chunk := file.read(CHUNK):
        pending += chunk
        while match := found.search(pending, search):
            at = match.start()
            before = (found.match(pending, i) for i in range(max(0, at - width + 1), at))
            if all(other is None or other.end() <= at for other in before):
                return offset + match.end()
            search = at + 1
        search = max(search, len(pending) - width + 1)
        done = max(0, len(pending) - 2 * width)
        pending, offset, search = pending[done:], offset + done, search - done
    return None
