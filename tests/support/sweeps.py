"""Sweeps of a file, run and collected here."""

import contextlib
import io
import json
import types
from pathlib import Path

from mtp_jax.cli import main
from mtp_jax.sweep.records import Place


def go(file: Path, *names: str) -> types.SimpleNamespace:
    """These runs of the sweep `tiny` of a file, beside it, and the results of all that were run."""
    where = ["--dir", str(file.parent / "runs")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for name in names:
            main(["sweep", f"{file}@tiny", "--only", name, *where])
        main(["sweep", f"{file}@tiny", "--collect", *where])
    results = json.loads((file.parent / "results" / f"{file.stem}-tiny.json").read_text())
    return types.SimpleNamespace(file=file, place=Place(file.parent / "runs"), results=results, out=out.getvalue())
