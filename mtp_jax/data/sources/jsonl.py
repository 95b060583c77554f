"""Source `jsonl`: local files with one JSON object per line, one document per line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources.base import DataError, Part, Record, Unreadable, to_bytes
from mtp_jax.data.sources.files import Files


class JsonLines:
    """The string in field `DataConfig.field` of each line; `meta.text` is the field `text` of the object in `meta`.

    A document is called `file:offset` by the byte where its line begins (after decompression), or, where a file is one
    array of objects, by its number. Blank lines are skipped. A lone surrogate is kept, in three bytes that are not
    UTF-8. With `fields` a document is the `Record` of those that a line has.
    """

    def __init__(self, config: SourceConfig, fields: Sequence[str] = ()):
        """Raises `ConfigError` if no file matches."""
        self.files, self.field, self.fields = Files.matching(config.files), config.field, tuple(fields)

    def fingerprint(self) -> dict[str, Any]:
        """That of the files, and the field."""
        return {**self.files.fingerprint(), "field": list(self.fields) or self.field}

    def parts(self, data_dir: Path) -> list[Part]:
        """Files, and ranges of lines of large ones. Raises `DataError` on a large array, and on what is no text."""
        self.files.check()
        parts = self.files.parts(data_dir, b"\n")
        for name in dict.fromkeys(part.name for part in parts if part.name):
            if self._is_array(name):
                raise DataError(f"{self.files.root / name} is one large array; write it as JSON lines (jq -c '.[]').")
        return parts

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The documents of a part. What is no object with a string in that field is `Unreadable`."""
        if part.name:
            yield from self._lines(part)
            return
        for name in self.files.names[part.begin : part.end]:
            if not self._is_array(name):
                yield from self._lines(Part(name))
                continue
            try:
                values = self._loads(self.files.content(name).removeprefix(codecs.BOM_UTF8))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.files.root / name} is not JSON: {error}.") from error
            for number, value in enumerate(values):
                yield f"{name}:{number}", self._text(f"{name}, element {number}", value)

    def _is_array(self, name: str) -> bool:
        with self.files.opened(name) as file:
            return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["

    def _lines(self, part: Part) -> Iterator[tuple[str, bytes]]:
        for name, offset, line in self.files.pieces(part, b"\n"):
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{name}, line at byte {offset}"
            try:
                value = self._loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{name}:{offset}", Unreadable.because(f"{self.files.root / where}: {error}")
                continue
            yield f"{name}:{offset}", self._text(where, value)

    def _text(self, where: str, value: Any) -> bytes:
        try:
            if self.fields:
                return Record.having(self.fields, value, str(self.files.root / where))
            return to_bytes(_string(value, self.field.split(".")))
        except (ValueError, RecursionError) as error:
            return Unreadable.because(f"{self.files.root / where}: {error}")

    def _loads(self, data: bytes) -> Any:
        # A number of thousands of digits, which Python refuses, is not in the field of a text: it may be infinite.
        return json.loads(data.decode("utf-8", "surrogateescape"), parse_int=None if self.fields else float)


def _string(value: Any, path: list[str]) -> str:
    """The string at `path`. Raises `ValueError` with what there is instead."""
    for i, key in enumerate(path):
        where = f"field {'.'.join(path[:i])!r}" if i else "it"
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no JSON object but {type(value).__name__}")
        if key not in value:
            chat = "; data prepare --chat reads conversations" * ("messages" in value or "conversations" in value)
            raise ValueError(
                f"there is no field {'.'.join(path[: i + 1])!r}; {where} has {', '.join(map(repr, value)) or 'none'} "
                f"(DataConfig.field names the one to read{chat})"
            )
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"field {'.'.join(path)!r} is no string but {type(value).__name__}")
    return value
