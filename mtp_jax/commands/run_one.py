"""Run of a sweep, in this process: train, measure, leave a record."""

from __future__ import annotations

import time
from typing import Any

import jax

from mtp_jax.commands import train
from mtp_jax.config import TrainConfig
from mtp_jax.runs.layout import read_config, versions
from mtp_jax.sweep.config import COSTS, NamedSweep
from mtp_jax.sweep.costs import costs
from mtp_jax.sweep.measure import Steps, measure
from mtp_jax.sweep.records import Place, machine
from mtp_jax.train.checks import as_learnt
from mtp_jax.train.loggers import read_metrics, series
from mtp_jax.train.signals import STOPS, leave, listening
from mtp_jax.validate import BusyError, ConfigError, PreemptedError, differences, require

SAVING_SECONDS = 60.0  # how long a run is waited for that somebody else has: it may be told to end, and save


def run_one(named: NamedSweep, name: str, place: Place) -> None:
    """Train the run `name` from where it is to its end, measure it and write its record; nothing if it is done.

    A run that is done stays as it is. A failure leaves a record of it, and the next call goes on from there.

    Raises:
      ConfigError: what it begins from is not finished, or its directory has a run with another config.
      BusyError: another process trains it, which is no failure.
      PreemptedError: training was, which is no failure; a notice while it measures ends the process with 75.
    """
    with listening(leave, STOPS):
        _run_one(named, name, place)


def _run_one(named: NamedSweep, name: str, place: Place) -> None:
    if place.done(named, name):
        print(f"{name} is done: {place.record(name)}")
        return
    _check(named, name, place)
    seconds: dict[str, float] = {}
    say = lambda text: print(f"measuring: {text}", flush=True)  # noqa: E731
    try:
        if name == COSTS:
            begun = time.perf_counter()
            found: dict[str, Any] = {"costs": costs(named.sweep, _shapes(named, place), say)}
            seconds["measuring"] = time.perf_counter() - begun
        else:
            begun = time.perf_counter()
            _train(named, name, place)
            seconds["training"] = time.perf_counter() - begun
            found = {"curve": curve(place.run(name))}
        if name in named.sweep.variants:
            begun, variant = time.perf_counter(), named.sweep.variants[name]
            cost = (place.read(named, COSTS) or {})["costs"][variant.shape]
            each = {name: other.config.steps for name, other in named.sweep.variants.items()}
            steps = Steps(variant.config.steps, each[variant.reference], min(each.values()))
            found |= measure(place.run(name), variant, steps, cost, named.sweep.measure, say)
            seconds["measuring"] = time.perf_counter() - begun
    except (PreemptedError, BusyError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        place.fail(named, name, lines[-1] if lines else type(error).__name__)
        raise
    device = jax.devices()[0].device_kind
    place.write(
        named,
        name,
        {"state": "done", "seconds": seconds, "machine": machine(device), "versions": versions(), **found},
    )


def _shapes(named: NamedSweep, place: Place) -> dict[str, TrainConfig]:
    return {name: place.config(named, name) for name, variant in named.sweep.variants.items() if variant.whole}


def _train(named: NamedSweep, name: str, place: Place) -> None:
    config = named.config(name, place.directory)
    args = [f"{named.key}/{name}", "--run-dir", str(place.run(name)), "--auto-resume"]
    args += ["--init-from", config.init_from, "--base", config.base]
    until = time.monotonic() + SAVING_SECONDS
    while True:
        try:
            train.main(args)
            break
        except BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
    require(
        jax.process_count() == 1,
        f"The run {name} has {jax.process_count()} processes; what is measured of a run of a sweep is measured by one, "
        "with all its devices. Start one process for each run.",
    )


def curve(run_dir: Any) -> list[dict[str, Any]]:
    """The held-out metrics of a run by step."""
    names = ("step", "joint_loss", "loss_first_token", "gate_effective")
    return [
        {**{name: row[name] for name in names if name in row}, "loss_offset": series(row, "loss_offset_")}
        for row in read_metrics(run_dir)
        if row["kind"] == "eval"
    ]


def _check(named: NamedSweep, name: str, place: Place) -> None:
    config = place.config(named, name)
    try:
        saved = read_config(place.run(name))
    except ConfigError:
        saved = config  # there is none yet
    for field, here, there in differences(as_learnt(config, saved), saved):
        require(
            field in ("data.cache_dir", "model.num_tokens"),  # the run has the second from its tokenizer
            f"{place.run(name)} is a run with {field} {there!r}, and the sweep has {here!r}; delete it, or "
            "give another --dir.",
        )
    needed = [first for first in named.sweep.first if config.begins_from == str(place.run(first))]
    for other in [*needed, COSTS] if name in named.sweep.variants else []:
        require(
            place.done(named, other),
            f"{name} needs {other}, which is not finished in {place.directory}; give --only {other} first.",
        )
