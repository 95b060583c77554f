"""Local files: which there are, and how they are cut into parts."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import hashlib
import itertools
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from mtp_jax.data.paths import matching, split_ending
from mtp_jax.data.sources import base
from mtp_jax.data.sources.base import DataError, Part
from mtp_jax.data.sources.split import boundary, pieces
from mtp_jax.validate import require


def _open_zst(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow, which decompresses .zst: pip install 'mtp_jax[parquet]'.") from error
    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
HEAD = 2**13  # bytes that tell whether a file is text
CONTROLS = re.compile(rb"[\0-\x07\x0e-\x1a\x1c-\x1f]")  # which no text has, in any encoding, but now and then


@dataclass(frozen=True)
class Files:
    """The files `names` (relative, with `/`, sorted) below `root`: a source with one document per file.

    A file whose name ends in `.gz`, `.bz2`, `.xz` or `.zst` is decompressed. A part is a range of `names`, or a range
    of bytes of the file that it names.
    """

    root: Path
    names: tuple[str, ...]

    @classmethod
    def matching(cls, pattern: str) -> Files:
        """What a path or a glob matches, below its part without wildcards: a corpus that moves as a whole keeps its
        names. Raises `ConfigError` if no file matches."""
        root, names = matching(pattern)
        require(
            bool(names),
            f"DataConfig.files is {pattern!r} and no file matches it in {Path.cwd()}. Give the path of a file or "
            "a glob, in quotes, such as --data.files 'stories/**/*.txt'.",
        )
        return cls(root, tuple(names))

    def __str__(self) -> str:
        return f"{', '.join(self.names[:3])}{', ...' * (len(self.names) > 3)} of {self.root}"

    def listing(self, times: bool) -> str:
        """A hash of the names and sizes, and with `times` of the times of change."""
        listing = hashlib.sha256()
        for name in self.names:
            stat = self._stat(name)
            line = f"{name} {stat.st_size} {stat.st_mtime_ns}\n" if times else f"{name} {stat.st_size}\n"
            listing.update(line.encode("utf-8", "surrogateescape"))
        return listing.hexdigest()[:16]

    def fingerprint(self) -> dict[str, Any]:
        """Where the files are, and a hash of their names, sizes and times of change."""
        return {"root": str(self.root.resolve()), "listing": self.listing(times=True)}

    def parts(self, data_dir: Path, separator: bytes = b"") -> list[Part]:
        """Small files together; a large one in ranges of bytes that end with a `separator`, if one is given."""
        sizes = [self._stat(name).st_size for name in self.names]
        require(any(sizes), f"The source has no documents: nothing is in {self}. Change DataConfig.files.")
        parts, begin = [], 0
        for i, (name, size) in enumerate(zip(self.names, sizes, strict=True)):
            if separator and size > base.PART_BYTES and not split_ending(name)[1]:
                parts += self._group(begin, i, sizes) + self._cut(name, size, separator)
                begin = i + 1
        return parts + self._group(begin, len(sizes), sizes)

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The files of a part, each one document."""
        for name in self.names[part.begin : part.end]:
            yield name, self.content(name)

    def content(self, name: str) -> bytes:
        """The bytes of a file."""
        with self.opened(name) as file:
            return file.read()

    def pieces(self, part: Part, separator: bytes) -> Iterator[tuple[str, int, bytes]]:
        """The pieces between the separators: the name of the file, the piece's place in it, and the piece."""
        whole = ((name, 0, -1) for name in self.names[part.begin : part.end])
        for name, begin, end in (part,) if part.name else whole:
            with self.opened(name) as file:
                for offset, piece in pieces(file, separator, begin, end):
                    yield name, offset, piece

    def check(self) -> None:
        """Raise `DataError` on a file that is no text, or cannot be opened."""
        for name in self.names:
            with self.opened(name):
                pass

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """The open file, decompressed. What goes wrong while it is read, and what is no text, is a `DataError` that
        names it."""
        path, opener = self.root / name, OPENERS[split_ending(name)[1]]
        try:
            with opener(path) as file:
                why = _no_text(file.read(HEAD))
            if why:
                raise DataError(f"{path} {why}")
            with opener(path) as file:
                yield cast(BinaryIO, file)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error

    def _stat(self, name: str) -> os.stat_result:
        try:
            return (self.root / name).stat()
        except OSError as error:
            raise DataError(f"Cannot read {self.root / name}: {error.strerror}.") from error

    def _group(self, begin: int, end: int, sizes: list[int]) -> list[Part]:
        return [Part("", begin + i, begin + j) for i, j in base.grouped(sizes[begin:end])]

    def _cut(self, name: str, size: int, separator: bytes) -> list[Part]:
        cuts = [0]
        with self.opened(name) as file:
            while cuts[-1] + base.PART_BYTES < size:
                cuts.append(boundary(file, separator, cuts[-1] + base.PART_BYTES) or size)
        if cuts[-1] < size:
            cuts.append(size)
        return [Part(name, *cut) for cut in itertools.pairwise(cuts)]


def _no_text(head: bytes) -> str | None:
    """What a file is that begins so, if it is no text in any encoding but UTF-16."""
    for magic, ending in MAGIC.items():
        if head.startswith(magic):
            return f"holds what {ending} has compressed; let its name end in {ending}, once."
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is UTF-16; make it UTF-8 (iconv -f UTF-16 -t UTF-8)."
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may go on behind it
        controls = 0
    except UnicodeDecodeError:
        controls = len(CONTROLS.findall(head))
    if b"\0" in head or controls > len(head) / 50:
        return f"is no text: its first {len(head):,} bytes have NUL or many other control characters. Leave it out."
    return None
