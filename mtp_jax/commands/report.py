"""`mtp-jax report RESULTS.json ... --out DIR`: what sweeps have found, as one page with figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mtp_jax.commands import parse


@dataclass(frozen=True)
class Report:
    """Write report.md and its figures from results files of `mtp-jax sweep`: the claims of the paper, each confirmed,
    not confirmed or undecided, with the evidence."""

    results: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The results files."""
    out: str
    """The directory of the page; files of the same names there are replaced."""


def main(args: list[str]) -> None:
    """See the module."""
    options = parse(Report, args, "report")
    from mtp_jax.results.page import write_page

    print(f"Wrote {write_page(options.results, options.out)}")
