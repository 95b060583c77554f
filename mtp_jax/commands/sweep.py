"""`mtp-jax sweep FILE.py[@SIZE]`: run what an experiment file asks of several runs, and collect the results."""

from __future__ import annotations

import contextlib
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_jax.commands import console, parse, use_compilation_cache
from mtp_jax.commands.experiment import load_sweep, split_file
from mtp_jax.processes import end_with_input
from mtp_jax.runs.paths import check_writable, given_path, write_json
from mtp_jax.sweep.config import NamedSweep
from mtp_jax.sweep.records import Place, collect
from mtp_jax.train.signals import STOPS, leave, listening
from mtp_jax.validate import ConfigError, PreemptedError, require

if TYPE_CHECKING:
    from rich.table import Table

    from mtp_jax.sweep.runner import SweepProgress


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train and measure every run of a sweep, one after another, and write its results file. The same command goes on
    where it was stopped; a run that failed is tried again.

    Runs are processes of their own. To spread them over a cluster give each of its jobs one, with --only, and --collect
    when they have ended.
    """

    dir: str = ""
    """Where the runs go, here or gs://BUCKET/...; runs/FILE/SIZE by default."""
    out: str = ""
    """The results file; results/FILE-SIZE.json beside the experiment file by default."""
    only: str = ""
    """One run alone, in this process, if it is not done: its name, or its number in --list. No results file is
    written."""
    list: bool = False
    """Print the runs and how they stand, and do nothing. A program gets a line for each: number, first (those that
    others begin from) or run, name, and done, failed or waiting, with tabs between."""
    collect: bool = False
    """Write the results file of what is there, and do nothing else."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    if args in (["-h"], ["--help"]):
        print("usage: mtp-jax sweep EXPERIMENT.py[@SIZE] [options]\n")
        print("mtp-jax sweep EXPERIMENT.py --help lists the options.")
        return
    file, rest = split_file(args, "sweep", "experiments/rank_code.py")
    options = parse(SweepOptions, rest, f"sweep {file}")
    chosen = [name for name in ("only", "list", "collect") if getattr(options, name)]
    require(len(chosen) < 2, f"--{' and --'.join(chosen)} are given; choose one.")
    named = load_sweep(file)
    place = Place(given_path(options.dir or named.directory))
    if not (options.list or options.collect):
        check_writable(place.directory, "Give another --dir.", folder=True)
    if options.only:
        end_with_input()
        use_compilation_cache()
        from mtp_jax.commands.run_one import run_one

        run_one(named, _run_name(named, options.only), place)
        return
    if options.list and not sys.stdout.isatty():
        for number, name in enumerate(named.runs):
            kind = "run" if name in named.sweep.variants else "first"
            state = (place.read(named, name) or {"state": "waiting"})["state"]
            print(number, kind, name, state, sep="\t")
        return
    progress = _progress(named, place)
    console().print(f"{named.key}: {named.title}", highlight=False, markup=False)
    if options.list:
        console().print(_table(named, progress))
        return
    out = given_path(options.out or Path(named.file).parent / "results" / f"{named.name}-{named.size}.json")
    check_writable(out, "Give another --out.")
    if not options.collect:
        _run(named, place, progress)
    write_json(out, collect(named, place))
    print(f"Wrote {out}")
    failed = [row for row in progress.rows.values() if row.state == "failed"]
    if failed and not options.collect:
        lines = "".join(f"\n  {row.name}: {row.error} ({place.log(row.name)})" for row in failed)
        raise SweepError(f"{len(failed)} of {len(progress.rows)} runs failed; the others are done.{lines}")


class SweepError(RuntimeError):
    """Some runs of a sweep failed."""


def _run_name(named: NamedSweep, text: str) -> str:
    runs = named.runs
    if text.isdigit() and text not in runs:
        require(int(text) < len(runs), f"--only is {text} and the sweep has the runs 0 to {len(runs) - 1}.")
        return runs[int(text)]
    if text not in runs:
        raise ConfigError(f"--only is {text!r}, which is no run of {named.key}; mtp-jax sweep {named.key} --list.")
    return text


def _progress(named: NamedSweep, place: Place) -> SweepProgress:
    from mtp_jax.heads.registry import check_head
    from mtp_jax.sweep.runner import SweepProgress
    from mtp_jax.train.costs import training_flops

    for name in named.runs:
        check_head(named.config(name).head)

    def work(config) -> float:
        return sum(training_flops(config)) * config.steps * config.data.batch_size * config.data.seq_len

    return SweepProgress(named, place, work)


def _run(named: NamedSweep, place: Place, progress: SweepProgress) -> None:
    import time

    from rich.live import Live

    from mtp_jax.sweep.runner import run_all

    told: list[int] = []

    def hear(number: int) -> None:
        if number == signal.SIGINT in told:  # again: the run has heard it too
            leave(number)
        told.append(number)

    terminal = console()
    seen: dict[str, str] = {name: row.state for name, row in progress.rows.items()}

    def show() -> None:
        for name, row in progress.rows.items():
            if seen[name] != row.state:
                seen[name] = row.state
                left = _duration(progress.seconds_left(time.monotonic()))
                took = f" in {_duration(row.seconds)}" if row.state in ("done", "failed") else ""
                print(f"{name}: {row.state}{took} {row.error}".rstrip() + f"; {left} left", flush=True)

    table: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if terminal.is_terminal:
        table = Live(console=terminal, get_renderable=lambda: _table(named, progress), refresh_per_second=1)
        show = lambda: None  # noqa: E731
    try:
        with listening(hear, STOPS), table:
            run_all(named, place, progress, show, lambda: bool(told))
    except PreemptedError as error:
        if signal.SIGINT not in told:
            raise
        print(f"Interrupted. {error}", file=sys.stderr)
        raise KeyboardInterrupt from error


def _table(named: NamedSweep, progress: SweepProgress) -> Table:
    import time

    from rich.markup import escape
    from rich.table import Table

    left = progress.seconds_left(time.monotonic())
    caption = None if left is None else f"about {_duration(left)} left"
    table = Table(caption=caption, caption_justify="left", box=None, padding=(0, 2, 0, 0))
    for column, justify in (("", "right"), ("run", "left"), ("state", "left"), ("time", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    colours = {"done": "green", "failed": "red", "running": "bold", "waiting": "dim"}
    for number, row in enumerate(progress.rows.values()):
        state = f"[{colours[row.state]}]{row.state}[/]"
        took = "" if row.seconds is None else _duration(row.seconds)
        table.add_row(str(number), escape(row.name), state, took, escape(row.error))
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
