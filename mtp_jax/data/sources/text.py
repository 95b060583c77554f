"""Source `text`: local files chosen by a glob, one document per file or per piece between separators."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources.base import Part
from mtp_jax.data.sources.files import Files
from mtp_jax.validate import unescape


class Text:
    r"""The files that `DataConfig.files` matches, in order of name; with a `separator` what lies between them.

    A document is a file, bytes as they are, and is called as it is below the part of the glob without wildcards. With
    `DataConfig.separator`, in which `\n` and `\t` stand for a newline (CRLF or LF) and a tab, a
    file is cut at each occurrence: a document is what lies between, without newlines at its beginning and end, and is
    called `file@offset` by the byte where it begins (behind the separator). Documents of newlines alone are left out.
    """

    def __init__(self, config: SourceConfig):
        """Raises `ConfigError` if no file matches."""
        self.files = Files.matching(config.files)
        self.separator = unescape(config.separator).encode("utf-8", "surrogateescape")

    def fingerprint(self) -> dict[str, Any]:
        """That of the files, and the separator if there is one."""
        return self.files.fingerprint() | ({"separator": repr(self.separator)} if self.separator else {})

    def parts(self, data_dir: Path) -> list[Part]:
        """Files, or with a separator also ranges of bytes of large ones. Raises `DataError` on what is no text."""
        self.files.check()
        return self.files.parts(data_dir, self.separator)

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The documents of a part. Nothing is kept in `data_dir`."""
        if not self.separator:
            for name, text in self.files.read(part, data_dir):
                yield name, text.removeprefix(codecs.BOM_UTF8)
            return
        for name, offset, piece in self.files.pieces(part, self.separator):
            if text := piece.strip(b"\r\n"):
                yield f"{name}@{offset}", text.removeprefix(codecs.BOM_UTF8)
