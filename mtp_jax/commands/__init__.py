"""Commands of `mtp-jax`, a file for each: its options as a dataclass, and `main(args)`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from mtp_jax.runs.loading import LoadedRun

T = TypeVar("T")
TEXTS = ("--prompt", "--stop", "--separator", "--data.separator", "--system")
"""Options whose value is any text."""
PLACES = ("--run-dir", "--out", "--dir", "--base")
"""Options whose value is a path, which may begin with one dash."""


@dataclass(frozen=True)
class RunOptions:
    """Which run, and which of its weights."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    step: int | Literal["latest", "best"] = "latest"
    """Which checkpoint; best is the one with the lowest held-out loss, or on a base the most expected tokens."""
    weights: Literal["params", "ema"] = "params"
    """The parameters, or their average over the last steps, where the run kept it (ema_decay)."""
    base: str | None = None
    """Of a head on a base: where that is, if it was moved."""

    def load(self, **more: Any) -> LoadedRun:
        """The run with these weights, and what more `mtp_jax.load` is told. Raises what that does."""
        from mtp_jax.runs.loading import load

        return load(self.run, self.step, weights=self.weights, base=self.base, **more)


@dataclass(frozen=True)
class DraftingOptions(RunOptions):
    """A run that drafts, and how."""

    draft_temperature: float | None = None
    """Drafts are sampled at this share of the temperature, in place of the run's own. The text's law is the same."""

    def load(self, **more: Any) -> LoadedRun:
        """As `RunOptions`."""
        return super().load(draft_temperature=self.draft_temperature, **more)


def parse(cls: type[T], args: Sequence[str], name: str, default: T | None = None) -> T:
    """The options in `args` as a `cls`. Unknown options are answered with the nearest, and end the process."""
    return tyro.cli(cls, prog=f"mtp-jax {name}", args=joined(args), default=default)  # type: ignore[arg-type]


def joined(args: Sequence[str]) -> list[str]:
    """The arguments with `--prompt TEXT` as one, and so on: a text or the name of a run may begin with a dash."""
    found: list[str] = []
    for arg in args:
        last = found[-1] if found else ""
        named = len(arg) > 1 and arg[0] == "-" and arg[1] != "-" and arg != "-h"
        if last in TEXTS or (last in PLACES and named):
            found[-1] = f"{last}={arg}"
        else:
            found.append(f"./{arg}" if named and os.path.lexists(arg) else arg)
    return found


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 120))


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table in the terminal: names on the left, numbers on the right of their columns."""
    from rich.markup import escape  # a name may have brackets
    from rich.table import Table

    table = Table(title=escape(title), box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(escape(name), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def use_compilation_cache() -> None:
    """Keep compiled functions between processes, in `$JAX_COMPILATION_CACHE_DIR` or `~/.cache/mtp_jax/xla`."""
    import jax

    with contextlib.suppress(RuntimeError):  # a user without a home has no cache
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "mtp_jax" / "xla"))
