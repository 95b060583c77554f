"""What no page says by hand: the options of every command, what the sweeps found, and the notebooks."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
EXPERIMENT = "experiments/code_cpu.py"
COMMANDS = (
    f"train {EXPERIMENT}",
    "generate",
    "chat",
    "eval",
    "bench decode",
    "bench loss",
    f"bench train {EXPERIMENT}",
    "data prepare",
    "data show",
    "data regenerate",
    "data hidden",
    "tokenizer train",
    "import",
    "export",
    "sweep experiments/rank_code.py",
    "report",
    f"doctor {EXPERIMENT}",
)
WIDTH = "100"
RESULTS = Path("experiments/results")
DEFAULTS = "Commands with the name of a file have its values for defaults. Those of the config are in [Python](api.md)."


def write() -> None:
    """Write all of it beside the pages, where git ignores it."""
    sys.path.insert(0, str(ROOT))
    with contextlib.chdir(ROOT):
        _put(DOCS / "cli.md", command_line())
        _results()
    shutil.rmtree(DOCS / "notebooks", ignore_errors=True)
    for notebook in sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb")):
        _put(DOCS / "notebooks" / notebook.name, notebook.read_text())


def command_line() -> str:
    """The page of the command line, from what `--help` prints."""
    from mtp_jax import cli

    assert {command.split()[0] for command in COMMANDS} == set(cli.COMMANDS), "every command has its part"
    parts = ["# The command line", f"```text\n{cli.USAGE}\n```", DEFAULTS]
    parts += [f"## mtp-jax {command}\n\n```text\n{_help(command)}\n```" for command in COMMANDS]
    return "\n\n".join(parts) + "\n"


def _help(command: str) -> str:
    from mtp_jax.cli import main

    printed, width = io.StringIO(), mock.patch.dict(os.environ, COLUMNS=WIDTH)
    with width, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    assert printed.getvalue().strip(), command
    return printed.getvalue().strip()


def _results() -> None:
    """The pages of what rank gives and of heads compared, from the committed results."""
    from experiments.claims.page import write_page
    from mtp_jax.sweep.report import write_report

    of_heads = sorted(map(str, RESULTS.glob("heads-*.json")))
    of_rank = sorted({*map(str, RESULTS.glob("*-cpu.json"))} - {*of_heads})
    scratch = DOCS / "_build" / "results"
    shutil.rmtree(scratch, ignore_errors=True)
    _page("rank.md", Path(write_page(of_rank, str(scratch / "claims"))))
    _page("heads.md", write_report(of_heads, scratch / "heads"), "# Heads compared")


def _page(name: str, made: Path, title: str = "") -> None:
    """A page of results that was made elsewhere, and its figures; with a title of its own if one is given."""
    lines = made.read_text().replace(str(made.parent), f"reports/{made.parent.name}").splitlines(keepends=True)
    _put(DOCS / "results" / name, "".join([f"{title}\n", *lines[1:]] if title else lines))
    for figure in made.parent.glob("**/*.png"):
        target = DOCS / "results" / figure.relative_to(made.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figure, target)


def _put(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
