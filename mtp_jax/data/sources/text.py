"""Source `text`: local files chosen by a glob, one document per file."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.config import DataConfig, require


class Text:
    """The files that `DataConfig.files` matches (`**` crosses directories), bytes as they are, in order of name.

    A document's name is its path below the part of the glob without wildcards, so a corpus that moves as a whole keeps
    its split. The files are read where they lie; a copy of them as a TFDS data set would only take their space again.
    """

    def __init__(self, config: DataConfig):
        """Raises `ConfigError` if no file matches."""
        self.root, pattern = _split_pattern(config.files)
        matches = glob.glob(pattern, root_dir=self.root, recursive=True)
        self.names = sorted({Path(match).as_posix() for match in matches if (self.root / match).is_file()})
        require(
            bool(self.names),
            f"DataConfig.files is {config.files!r} and no file matches it in {Path.cwd()}. Give the path of a file or "
            "a glob, in quotes, such as --data.files 'stories/**/*.txt'.",
        )

    def fingerprint(self) -> dict[str, Any]:
        """Where the files are, and a hash of their names, sizes and times of change."""
        listing = hashlib.sha256()
        for name in self.names:
            stat = (self.root / name).stat()
            listing.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return {"root": str(self.root.resolve()), "listing": listing.hexdigest()[:16]}

    def documents(self, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The files by name. Nothing is kept in `data_dir`."""
        for name in self.names:
            yield name, (self.root / name).read_bytes()


def _split_pattern(pattern: str) -> tuple[Path, str]:
    """The directory before the first wildcard of `pattern`, and the rest of it."""
    parts = Path(pattern).expanduser().parts
    wild = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts) - 1)
    return Path(*parts[:wild]), str(Path(*parts[wild:]))
