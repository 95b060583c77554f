"""Runner of a sweep: its runs one after another, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mtp_jax.config import TrainConfig
from mtp_jax.processes import ENDS_WITH_INPUT
from mtp_jax.runs.checkpoints import CheckpointError
from mtp_jax.sweep.config import NamedSweep
from mtp_jax.sweep.records import Place
from mtp_jax.train.signals import INTERRUPTED
from mtp_jax.validate import PREEMPTED, REFUSED, ConfigError, PreemptedError

POLL_SECONDS = 1.0
State = Literal["done", "failed", "running", "waiting"]


@dataclass
class Row:
    """A run, as the table shows it. `seconds` are those it took, and `work` what it is expected to take of all."""

    name: str
    state: State
    work: float
    seconds: float | None = None
    error: str = ""


class SweepProgress:
    """The states of all runs and the time that is left."""

    def __init__(self, named: NamedSweep, place: Place, work: Callable[[Any], float]):
        self.rows: dict[str, Row] = {}
        self.begun: float | None = None
        for name in named.runs:
            self.rows[name] = row = Row(name, "waiting", work(_resolved(named, name, place)))
            record = place.read(named, name)
            if record and record["state"] == "done":
                row.state, row.seconds = "done", sum(record["seconds"].values())
            elif record:
                row.state, row.error = "failed", record["error"]

    def seconds_left(self, now: float) -> float | None:
        """From how long the finished runs took for their work; None before there is one."""
        done = [row for row in self.rows.values() if row.state == "done" and row.seconds]
        if not done:
            return None
        pace = sum(row.seconds or 0.0 for row in done) / sum(row.work for row in done)
        spent = now - self.begun if self.begun is not None else 0.0
        running = sum(max(0.0, pace * row.work - spent) for row in self.rows.values() if row.state == "running")
        return running + pace * sum(row.work for row in self.rows.values() if row.state == "waiting")


def _resolved(named: NamedSweep, name: str, place: Place) -> TrainConfig:
    """The config that a run's work is told from: with what its base says, if nothing is wrong with that, which the run
    will say."""
    try:
        return place.config(named, name)
    except (ConfigError, CheckpointError):
        return named.config(name, place.directory)


def run_all(
    named: NamedSweep,
    place: Place,
    progress: SweepProgress,
    show: Callable[[], None],
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Run what is not done. Returns the names of the runs that failed; the others are not held up by them, but for
    those that begin from one.

    `show` is called when a state changes and once in a second; `stop` is asked as often: if it says so, the run that
    goes on is told to save.

    Raises:
      PreemptedError: after `stop`, or a run was preempted or interrupted, so this process is about to be. The same call
        goes on.
    """
    for row in progress.rows.values():
        if row.state == "failed":
            row.state = "waiting"  # tried again
    for name, row in progress.rows.items():
        if row.state == "done":
            continue
        place.forget(named, name)
        row.state, progress.begun = "running", time.monotonic()
        show()
        status = _run_in_process(named, name, place, show, stop)
        row.seconds = time.monotonic() - progress.begun
        record = place.read(named, name)
        if status == 0 and record and record["state"] == "done":
            row.state, row.error = "done", ""
        elif status in (PREEMPTED, INTERRUPTED) or stop():
            raise PreemptedError(f"The run {name} was stopped. Start the same command again: it goes on.")
        else:
            row.state, row.error = "failed", _reason(named, name, place, status)
        show()
        if stop():
            raise PreemptedError("The sweep was told to end. Start the same command again: it goes on.")
    return [name for name, row in progress.rows.items() if row.state == "failed"]


def _run_in_process(
    named: NamedSweep, name: str, place: Place, show: Callable[[], None], stop: Callable[[], bool]
) -> int:
    log = place.log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mtp_jax", "sweep", named.key, "--only", name, "--dir", str(place.directory)]
    # It has a pipe whose other end is this process's: see `processes.end_with_input`.
    pipe, env = subprocess.PIPE, {**os.environ, ENDS_WITH_INPUT: "1"}
    with (
        log.open("ab") as out,
        subprocess.Popen(command, stdin=pipe, stdout=out, stderr=subprocess.STDOUT, env=env) as process,
    ):
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                show()
            except KeyboardInterrupt:
                process.terminate()  # the terminal may have told it too: it saves
                process.wait()
                raise
            if stop():
                process.terminate()
                process.wait()
                return PREEMPTED


def _reason(named: NamedSweep, name: str, place: Place, status: int) -> str:
    """The last line that a failed run has printed, also put in its record if it was killed before it could."""
    record = place.read(named, name)
    if record and record["state"] == "failed":
        return record["error"]
    lines = place.log(name).read_text(errors="replace").strip().splitlines()
    error = f"status {status}: {lines[-1] if lines else 'it printed nothing'}"
    if status != REFUSED:  # which is no result: somebody else trains it, say
        place.fail(named, name, error)
    return error
