"""Source protocol: documents, and the parts in which they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# What one process reads at a time: large against the cost of starting on a part, small against what is read in all.
PART_BYTES = 2**25


class DataError(RuntimeError):
    """Documents that cannot be read. The message names the file or the data set and says what is wrong with it."""


class Unreadable(bytes):
    """What stands for a document that cannot be read: empty, and `why`. It is counted and left out."""

    why: str

    @classmethod
    def because(cls, why: str) -> Unreadable:
        """One for this reason."""
        found = cls()
        found.why = why
        return found


class Record(bytes):
    """A document that is not text but JSON, and `where` it is."""

    where: str

    @classmethod
    def of(cls, value: Any, where: str) -> Record:
        """That of a JSON value. What was not UTF-8 is kept as it was."""
        found = cls(to_bytes(json.dumps(value, ensure_ascii=False, default=str)))
        found.where = where
        return found

    @classmethod
    def having(cls, fields: Sequence[str], value: Any, where: str) -> Record | Unreadable:
        """That of those `fields` of an object that it has, and are not null."""
        if not isinstance(value, dict):
            return Unreadable.because(f"{where}: it is no JSON object but {type(value).__name__}")
        found = {name: value[name] for name in fields if value.get(name) is not None}
        if not found:
            listed = ", ".join(map(repr, value)) or "none"
            return Unreadable.because(f"{where}: it has none of the fields {', '.join(fields)}; it has {listed}")
        return cls.of(found, where)


def to_bytes(text: str) -> bytes:
    """The bytes that the text had, UTF-8 or not; half a surrogate pair, which JSON can write, is not UTF-8 either."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


class Part(NamedTuple):
    """A piece of a source, in terms that its source understands. It can be pickled, and is a list in JSON."""

    name: str
    begin: int = 0
    end: int = -1


class Source(Protocol):
    """Named documents in an order that does not change. Constructing one is cheap, and it can be pickled."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change whenever the documents do. Cheap: it is computed at every start."""
        ...

    def parts(self, data_dir: Path) -> list[Part]:
        """All documents once, in order, in parts of about `PART_BYTES`.

        How the source is cut changes neither the documents nor their names. `data_dir` may keep what is made on the
        way. Raises `ConfigError` if there is nothing to read, or not what the configuration says.
        """
        ...

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The documents of one of the parts: a name that no other document of the source has, and its bytes.

        Any number of processes may read at once. Raises `DataError` on what cannot be read.
        """
        ...


def documents(source: Source, data_dir: Path) -> Iterator[tuple[str, bytes]]:
    """Every document of `source`, in order: its name and its bytes."""
    for part in source.parts(data_dir):
        yield from source.read(part, data_dir)


def grouped(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive items that together have `PART_BYTES` or just more (the last one less); all items once."""
    begin = size = 0
    for i, more in enumerate(sizes):
        size += more
        if size >= PART_BYTES:
            yield begin, i + 1
            begin, size = i + 1, 0
    if begin < len(sizes):
        yield begin, len(sizes)
