"""`mtp-jax report RESULTS.json ... --out DIR`: what sweeps have found, as one page with a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mtp_jax.commands import parse


@dataclass(frozen=True)
class Report:
    """Write report.md and differences.png from results files of `mtp-jax sweep`: every variant against its reference,
    with intervals."""

    results: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The results files."""
    out: str
    """The directory of the page; files of the same names there are replaced."""
    looks: int = 1
    """How often these results were looked at, as 2 where more seeds were run because the first decided nothing.
    Intervals are widened for it."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    options = parse(Report, args, "report")
    from etils import epath

    from mtp_jax.runs.paths import check_writable
    from mtp_jax.sweep.report import write_report

    check_writable(epath.Path(options.out), "Give another --out.", folder=True)
    print(f"Wrote {write_report(options.results, options.out, options.looks)}")
