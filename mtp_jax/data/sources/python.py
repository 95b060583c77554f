"""Sources `stdlib` and `packages`: the Python source code that comes with the running interpreter.

Real code on every machine, with nothing to download: the standard library has about 600 documents and 10 MB, the
packages of a working environment often ten times that.
"""

from __future__ import annotations

import difflib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources.base import Part
from mtp_jax.data.sources.files import Files
from mtp_jax.validate import require

# Other people's packages, and tests, which are repetitive and as large as the rest.
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})
# Not code but tables of characters, each much like the next, and the manual as one string of 750 kB.
SKIPPED_OF_STDLIB = SKIPPED_DIRECTORIES | {"encodings", "pydoc_data"}


class PythonCode:
    """Files of Python code, through a TFDS data set: one for each interpreter and state of the files."""

    def __init__(self, files: Files):
        """The documents are `files`, by name."""
        self.files = files

    def fingerprint(self) -> dict[str, Any]:
        """The interpreter, and a hash of the names and sizes of its files."""
        python = f"{sys.implementation.name}-{platform.python_version()}"
        return {"python": python, "listing": self.files.listing(times=False)}

    def parts(self, data_dir: Path) -> list[Part]:
        """Ranges of files. Their data set is made in `data_dir`."""
        self._prepared(data_dir)
        return self.files.parts(data_dir)

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The files of a part: name (relative, with `/`) and bytes."""
        # Here, because TFDS takes 1.5 s to import and a store that is already made does not need it.
        from mtp_jax.data.sources.builder import read_fields

        where, examples = self._prepared(data_dir)
        for name, text in read_fields(examples, part.begin, part.end, ("name", "text"), f"{where} (delete it)"):
            yield name.decode("utf-8", "surrogateescape"), text

    def _prepared(self, data_dir: Path) -> tuple[Path, Any]:
        """The directory of the data set, and its examples."""
        from mtp_jax.data.sources.builder import prepared

        path = data_dir / "-".join(self.fingerprint().values())
        return path, prepared(self.files, path)


class Stdlib(PythonCode):
    """Every `.py` file of the standard library outside `SKIPPED_OF_STDLIB`."""

    def __init__(self, config: SourceConfig):
        """Raises `ConfigError` if the library has no `.py` file."""
        root = Path(sysconfig.get_path("stdlib"))
        super().__init__(Files(root, tuple(sorted(_python_files(root, [root], SKIPPED_OF_STDLIB)))))
        require(
            bool(self.files.names),
            f"DataConfig.source is {config.source} and there is no .py file in {root} (this interpreter keeps its "
            "library elsewhere, in a zip file perhaps). Use --data.source text --data.files '<glob>'.",
        )


class Packages(PythonCode):
    """Every `.py` file of the installed packages outside `SKIPPED_DIRECTORIES`, or of some packages only.

    `DataConfig.files` may list them, by the name of their directory or module: `numpy,jax,six`. Packages that are
    installed in editable mode lie elsewhere and are not among them.
    """

    def __init__(self, config: SourceConfig):
        """Raises `ConfigError` if there is no such package, or none that has a `.py` file."""
        homes = sorted({Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")})
        top = {
            path.name.removesuffix(".py"): path
            for home in homes
            if home.is_dir()
            for path in sorted(home.iterdir())
            if path.name.endswith(".py") or (path.is_dir() and path.name not in SKIPPED_DIRECTORIES)
        }
        chosen = [name.strip() for name in config.files.split(",") if name.strip()]
        for name in chosen:
            near = difflib.get_close_matches(name, top, n=1)
            require(
                name in top,
                f"DataConfig.files is {config.files!r} and no package {name!r} is installed in "
                f"{', '.join(map(str, homes))}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + " Give names of packages as they are imported, separated by commas, or none for all.",
            )
        # Where there are two homes, the part of the path that differs keeps the names apart.
        root = Path(os.path.commonpath(homes))
        paths = [top[name] for name in chosen or top]
        super().__init__(Files(root, tuple(sorted(set(_python_files(root, paths, SKIPPED_DIRECTORIES))))))
        require(
            bool(self.files.names),
            f"DataConfig.source is {config.source} and there is no .py file of {', '.join(chosen) or 'a package'} in "
            f"{', '.join(map(str, homes))}. Install packages, or change DataConfig.files.",
        )


def _python_files(root: Path, paths: Iterable[Path], skipped: frozenset[str]) -> Iterator[str]:
    """The names, relative to `root`, of the `.py` files that `paths` are or hold."""
    for path in paths:
        if path.is_file():
            yield path.relative_to(root).as_posix()
        for directory, children, files in os.walk(path):
            children[:] = [child for child in children if child not in skipped]
            for file in files:
                if file.endswith(".py"):
                    yield (Path(directory) / file).relative_to(root).as_posix()
