"""`mtp-jax report RESULTS.json ... --out DIR`: what sweeps have found, as one page with a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mtp_jax.commands import parse
from mtp_jax.validate import require


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
    reference: tuple[str, ...] = ()
    """The runs to compare with in place of the sweep's own, as case=medusa or head.rank=1; which is equal at equal cost
    stays as it is."""

    def __post_init__(self) -> None:
        bad = [given for given in self.reference if not all(given.partition("="))]
        require(not bad, f"--reference is {' '.join(bad)}; give a field and a value, such as head.rank=1.")


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    options = parse(Report, args, "report")
    from etils import epath

    from mtp_jax.runs.paths import check_writable
    from mtp_jax.sweep.report import write_report

    check_writable(epath.Path(options.out), "Give another --out.", folder=True)
    reference = dict(given.split("=", 1) for given in options.reference)
    print(f"Wrote {write_report(options.results, options.out, options.looks, reference)}")
