"""Source `stdlib`: the Python source code of the standard library of the running interpreter.

Real code on every machine, with nothing to download: about 600 documents and 10 MB.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.config import DataConfig, require

SKIPPED_DIRECTORIES = frozenset(
    # Other people's packages, and tests, which are repetitive and as large as the rest.
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    # Not code but tables of characters, each much like the next, and the manual as one string of 750 kB.
    | {"encodings", "pydoc_data"}
)


class Stdlib:
    """Every `.py` file of the library outside `SKIPPED_DIRECTORIES`, through the TFDS builder `PythonFiles`."""

    def __init__(self, config: DataConfig):
        """Raises `ConfigError` if the library has no `.py` file."""
        self.root = Path(sysconfig.get_path("stdlib"))
        self.names = sorted(_python_files(self.root))
        require(
            bool(self.names),
            f"DataConfig.source is {config.source} and there is no .py file in {self.root} (this interpreter keeps its "
            "library elsewhere, in a zip file perhaps). Use --data.source text --data.files '<glob>'.",
        )

    def fingerprint(self) -> dict[str, Any]:
        """The interpreter, and a hash of the names and sizes of its files."""
        listing = [f"{name} {(self.root / name).stat().st_size}" for name in self.names]
        return {
            "python": f"{sys.implementation.name}-{platform.python_version()}",
            "listing": hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16],
        }

    def documents(self, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The files by name (relative, with `/`). Their TFDS data set stays in `data_dir`, one for each interpreter."""
        # Here, because TFDS takes 1.5 s to import and a store that is already made does not need it.
        from mtp_jax.data.sources.python_files import prepared

        for example in prepared(self.root, self.names, data_dir / "-".join(self.fingerprint().values())):
            yield example["name"].decode(), example["text"]


def _python_files(root: Path) -> Iterator[str]:
    for directory, children, files in os.walk(root):
        children[:] = [child for child in children if child not in SKIPPED_DIRECTORIES]
        for file in files:
            if file.endswith(".py"):
                yield (Path(directory) / file).relative_to(root).as_posix()
