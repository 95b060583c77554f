"""Source `jsonl`: local files with one JSON object per line, one document per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources.base import DataError, Part
from mtp_jax.data.sources.files import Files


class JsonLines:
    """The string in field `DataConfig.field` of each line; `meta.text` is the field `text` of the object in `meta`.

    Files whose name ends in `.gz` are decompressed. A document is called `file:offset` by the byte where its line
    begins (after decompression). Blank lines are skipped. A lone surrogate is kept, in three bytes that are not UTF-8.
    """

    def __init__(self, config: SourceConfig):
        """Raises `ConfigError` if no file matches."""
        self.files, self.field = Files.matching(config.files), config.field

    def fingerprint(self) -> dict[str, Any]:
        """That of the files, and the field."""
        return {**self.files.fingerprint(), "field": self.field}

    def parts(self, data_dir: Path) -> list[Part]:
        """Files, and ranges of lines of large ones."""
        return self.files.parts(data_dir, b"\n")

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The documents of a part. Raises `DataError` on a line that is no object with a string in that field."""
        path = self.field.split(".")
        for name, offset, line in self.files.pieces(part, b"\n"):
            if not line.strip():
                continue
            try:
                text = _string(json.loads(line.decode("utf-8", "surrogateescape")), path)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.files.root / name}, line at byte {offset}: {error}.") from error
            yield f"{name}:{offset}", _bytes(text)


def _bytes(text: str) -> bytes:
    """The bytes that the line had, UTF-8 or not; half a surrogate pair, which JSON can write, is not UTF-8 either."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _string(value: Any, path: list[str]) -> str:
    """The string at `path`. Raises `ValueError` with what there is instead."""
    for i, key in enumerate(path):
        where = f"field {'.'.join(path[:i])!r}" if i else "it"
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no JSON object but {type(value).__name__}")
        if key not in value:
            raise ValueError(
                f"there is no field {'.'.join(path[: i + 1])!r}; {where} has {', '.join(map(repr, value)) or 'none'} "
                "(DataConfig.field names the one to read)"
            )
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"field {'.'.join(path)!r} is no string but {type(value).__name__}")
    return value
