"""`mtp-jax bench decode RUN`: time decoding with k drafts against none."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from mtp_jax.commands import parse, use_compilation_cache
from mtp_jax.config import ConfigError

BENCHES = ("decode",)


@dataclass(frozen=True)
class Decode:
    """Compare k = 0 with k = 1..W-1 on held-out prompts, in one process, interleaved.

    Prints a table, and as the last line one JSON object.
    """

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    prompts: int = 24
    """Held-out documents, chosen by `seed`."""
    prompt_tokens: int = 96
    new_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.7)
    """0 is verified greedily, the others with coupled noise."""
    repetitions: int = 1
    """Repetitions of the whole; figures are medians over them."""
    seed: int = 0
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

    from mtp_jax.bench import BenchConfig, bench_decode
    from mtp_jax.checkpoint import load
    from mtp_jax.config import to_dict
    from mtp_jax.report import decode_table, write_report

    fields = BenchConfig.__dataclass_fields__
    config = BenchConfig(**{name: getattr(options, name) for name in fields})
    run = load(options.run, options.step)
    console = Console()
    with console.status("loading") as status:
        bench = bench_decode(run, config, status.update)
    console.print(decode_table(bench))
    if options.report:
        print(f"Wrote {write_report(options.run, bench, to_dict(run.config))}")
    print(json.dumps(bench))
