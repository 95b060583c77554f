"""Report of sweeps: a table of every variant against its reference, with intervals, and a figure."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_jax.plots import MARKERS, PALETTE, legend, markdown_table, panels
from mtp_jax.sweep.compare import (
    Metric,
    compare,
    decoding,
    estimate,
    joint_loss,
    tokens_per_forward,
)
from mtp_jax.sweep.config import SEED
from mtp_jax.sweep.results import READINGS, Results, Run, load_results, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, FIGURE = "report.md", "differences.png"
Point = tuple[Any, ...]
HOW = """Every variant is compared with the run of the same seed that its sweep names as the reference, whose own values
stand in its row. Intervals are of 95%: Student's over the paired differences of the seeds, and the bootstrap over the
held-out documents that the seeds share, added as variances; of one seed they say nothing of other seeds. They are not
widened for the number of variants: the best of many looks better than it is. Losses are in nats per window, by offset
given the ones before; tokens per forward are with W-1 drafts; tokens/s are what one run of a variant gave at batch 1,
in a process of its own, at the number of drafts that was best for it: they have no interval."""


def write_report(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], looks: int = 1) -> Path:
    """Write `report.md` and `differences.png` into the directory `out`, and return the path of the page.

    `paths` are results files of `mtp-jax sweep`. `looks`: how often they were looked at, with more seeds run while they
    decided nothing: the level is divided by it.

    Raises:
      ConfigError: a file is not one of results, or `looks` is less than 1.
    """
    all_results, directory = load_results(paths, looks), Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    _figure(all_results).savefig(directory / FIGURE, dpi=150)
    again = f" --looks {looks}" * (looks > 1)
    said = f"They hold for all {looks} looks together." if looks > 1 else "They are for one look at the data."
    caption = "Differences to the reference, with intervals of 95%. Hollow: of one seed."
    sections = [
        "# Sweeps",
        f"{HOW} {said}",
        f"![{caption}]({FIGURE})\n\n*{caption}*",
        *(_section(results) for results in all_results),
        f"Written by `mtp-jax report {' '.join(map(str, paths))} --out {out}{again}`.",
    ]
    (directory / PAGE).write_text("\n\n".join(sections) + "\n")
    return directory / PAGE


def readings_of(results: Results) -> dict[str, str]:
    """The readings that differ, in words: those with the same checkpoints of all runs are one."""
    same: dict[tuple[Any, ...], list[str]] = {}
    for name in dict.fromkeys([*READINGS, *(name for run in results.runs for name in run.raw["readings"])]):
        same.setdefault(tuple(run.raw["readings"].get(name) for run in results.runs), []).append(name)
    return {
        names[0]: ", ".join(READINGS.get(name, f"`{name}`") for name in names)
        for steps, names in same.items()
        if set(steps) != {None}
    }


def _section(results: Results) -> str:
    raw = results.raw
    reference = ", ".join(f"`{field}` {value}" for field, value in raw["reference"].items()) or "none"
    machine = ", ".join(str(raw["machine"][name]) for name in ("processor", "device") if name in raw["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in raw["versions"].items())
    runs = f"{len(results.runs)} runs of `{raw['command']}`; reference: {reference}"
    parts = [f"## {results.label}", f"{raw['title']} {runs}; {machine}; {versions}."]
    for reading, words in readings_of(results).items():
        parts += [f"At {words}:", _table(results, reading)]
    if results.failed:
        parts += ["Runs that failed:", markdown_table(["run", "error"], map(list, results.failed.items()))]
    return "\n\n".join(parts)


def _table(results: Results, reading: str) -> str:
    """A row for each variant; columns in which nothing is known are left out."""
    settings = _settings(results)
    rows = [{**settings[point], **_row(results, point, reading)} for point in results.points]
    known = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    return markdown_table(known, ([row[name] for name in known] for row in rows))


def _row(results: Results, point: Point, reading: str) -> dict[str, str]:
    is_reference, runs, t = results.reference(point) == point, results.of(point), _temperature(results)
    ends = [at for run in runs if (at := run.at(reading))]
    drafted = [row for run in runs if (row := decoding(run, reading, t))]
    timed = [row for run in runs if (row := fastest(run, reading, t))]
    cost = runs[0].raw["cost"]  # which does not depend on the seed
    over = cost["over_reference"]

    def cell(metric: Metric, own: object) -> str:
        e = compare(results, point, reading, metric)
        return str(own or "-") if is_reference else "-" if e is None else e.signed

    own_loss, own_tokens = (estimate(results, point, reading, of) for of in (joint_loss, tokens_per_forward(t)))
    step = f"{1e3 * cost['seconds']:.0f} ms" if is_reference else f"{over['measured']:.2f}x +- {over['error']:.2f}"
    return {
        "seeds": f"{len(runs)}" + ", **reference**" * is_reference,
        "joint loss": cell(joint_loss, own_loss),
        "loss by offset": _means([[e["mean"] for e in at["loss"]["offsets"]] for at in ends]),
        f"tokens per forward, T = {t:g}": cell(tokens_per_forward(t), own_tokens),
        "kept by offset": _means([[e["mean"] for e in row["acceptance"]] for row in drafted]),
        f"tokens/s, T = {t:g}": ", ".join(f"{row['tokens_per_second']:,.0f} (k = {row['k']})" for row in timed) or "-",
        "over plain decoding": _means([row["speedup"] for row in timed]),
        "training step": step,
        "components in effect": _means([at["gate"]["effective"] for at in ends if "gate" in at]),
    }


def _settings(results: Results) -> dict[Point, dict[str, str]]:
    """Of each variant the fields in which variants differ, and its case by name."""
    first = {point: results.of(point)[0] for point in results.points}
    names = dict.fromkeys([*results.fields, *(name for run in first.values() for name in run.raw["changes"])])
    differ = [name for name in names if name != SEED and len({str(run.setting(name)) for run in first.values()}) > 1]
    last = [short(name) for name in differ]
    labels = {name: name if last.count(short(name)) > 1 else short(name) for name in differ}
    return {point: {labels[name]: str(run.setting(name)) for name in differ} for point, run in first.items()}


def _temperature(results: Results) -> float:
    """The temperature at which every checkpoint is measured."""
    return results.raw["measure"]["temperatures"][0]


def fastest(run: Run, reading: str, temperature: float) -> Mapping[str, Any] | None:
    """The row of a run's own speeds with the most tokens per second; None if they were not measured."""
    rows = [row for row in (run.at(reading) or {}).get("speed", []) if row["temperature"] == temperature]
    return max(rows, key=lambda row: row["tokens_per_second"], default=None)


def _means(values: Sequence[Any]) -> str:
    """The mean over seeds of numbers, or of lists of them, entry by entry."""
    return " ".join(f"{mean:.2f}" for mean in np.atleast_1d(np.mean(values, axis=0))) if len(values) else "-"


def _figure(all_results: Sequence[Results]) -> Figure:
    """For each sweep two panels: differences of loss and of tokens per forward."""
    kinds = "joint loss, nats", "tokens per forward"
    titles = [title for results in all_results for title in (results.label, "")]
    figure, parts = panels(titles, "", "")
    for axes, (results, kind) in zip(parts, itertools.product(all_results, kinds), strict=True):
        points, known = results.points, readings_of(results)
        metric = dict(zip(kinds, (joint_loss, tokens_per_forward(_temperature(results))), strict=True))[kind]
        for index, (reading, words) in enumerate(READINGS.items()):
            for y, point in enumerate(points if reading in known else []):
                e = compare(results, point, reading, metric)
                if e and results.reference(point) != point:
                    style: dict[str, Any] = {"color": PALETTE[index], "fmt": MARKERS[index], "ms": 5, "capsize": 3}
                    style |= {"label": words, "mfc": None if e.seeds > 1 else "white"}
                    error = [[abs(bound - e.mean)] for bound in e.interval()]
                    axes.errorbar(e.mean, y + 0.2 * (index - 1), xerr=error, **style)
        marks = [" (ref.)" * (results.reference(point) == point) for point in points]
        names = [results.text(point) + mark for point, mark in zip(points, marks, strict=True)]
        axes.set_yticks(range(len(points)), names if kind == kinds[0] else [""] * len(points))
        axes.set(ylim=(len(points) - 0.5, -0.5), xlabel=f"{kind}, over the reference")
        axes.axvline(0, color="0.4", lw=1)
    legend(figure)
    return figure
