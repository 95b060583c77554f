"""`mtp-jax bench decode RUN`: time decoding with k drafts against none."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from mtp_jax.commands import parse, use_compilation_cache
from mtp_jax.config import BenchConfig, ConfigError

BENCHES = ("decode",)


@dataclass(frozen=True)
class Decode:
    """Compare k = 0 with k = 1..W-1 on held-out prompts, in one process, interleaved.

    Prints a table, and as the last line one JSON object.
    """

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    config: Annotated[BenchConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=BenchConfig)
    step: int | None = None
    """Which checkpoint; the latest by default."""
    report: bool = False
    """Also write report.md, report.json and plots/ into the run directory."""


def main(args: list[str]) -> None:
    """See the module."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: mtp-jax bench {{{','.join(BENCHES)}}} RUN [options]")
        return
    if args[0] not in BENCHES:
        near = difflib.get_close_matches(args[0], BENCHES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(BENCHES)}."
        raise ConfigError(f"there is no benchmark {args[0]!r}; {hint}")
    options = parse(Decode, args[1:], "bench decode")
    use_compilation_cache()

    from rich.console import Console

    from mtp_jax.bench import bench_decode
    from mtp_jax.checkpoint import load
    from mtp_jax.config import to_dict
    from mtp_jax.report import check_reportable, decode_table, write_report

    if options.report:
        check_reportable(options.run)
    run = load(options.run, options.step)
    console = Console()
    with console.status("loading") as status:
        bench = bench_decode(run, options.config, status.update)
    console.print(decode_table(bench))
    try:
        if options.report:
            print(f"Wrote {write_report(options.run, bench, to_dict(run.config))}")
    finally:  # what was measured is printed, whatever becomes of the report
        print(json.dumps(bench))
