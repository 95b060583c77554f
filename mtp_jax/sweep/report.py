"""Report of sweeps: a table of every variant against its reference, with intervals, and a figure."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_jax.plots import MARKERS, PALETTE, legend, markdown_table, panels
from mtp_jax.sweep.compare import Metric, compare, decoding, estimate, joint_loss, tokens_per_forward
from mtp_jax.sweep.config import CASE, SEED
from mtp_jax.sweep.results import OVER, READINGS, Results, load_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, FIGURE = "report.md", "differences.png"
Point = tuple[Any, ...]
HOW = """Every variant is compared with the run of the same seed that its sweep names as the reference, whose own values
stand in its row. Intervals are of 95%: Student's over the paired differences of the seeds, and the bootstrap over the
held-out documents that the seeds share, added as variances; of one seed they say nothing of other seeds. They are not
widened for the number of variants: the best of many looks better than it is. Losses are in nats per window, by offset
given the ones before; tokens per forward are with W-1 drafts; tokens/s at batch 1 are the tokens of a forward with k
drafts over the median time of such an iteration, at the k that is best and in the dtype that is fastest for it, and
over plain decoding is the ratio to those of k = 0. Iterations are timed in one process, those of heads for target `ntp`
each beside plain decoding, of which they are multiples; speeds have no interval. With a suite, tokens per forward are
those that the verifier `token` is expected to give on texts of the base's, whose prompts are the documents, and
iterations are of that verifier; documents of conversations are rows. The share is what a run had of its part, where
that is less: it has no more steps, or no checkpoint nearer."""
_MACHINE = {"cores": "{} cores", "processor": "{}", "device": "{}"}
CAPTION = "Differences to the reference, with intervals of 95%. Hollow: of one seed."


def write_report(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    looks: int = 1,
    reference: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.md` and `differences.png` into the directory `out`, and return the path of the page.

    `paths` are results files of `mtp-jax sweep`. `looks`: how often they were looked at, with more seeds run while they
    decided nothing: the level is divided by it. `reference`: what to compare with, in place of the sweeps' own.

    Raises:
      ConfigError: a file is not one of results or has no such reference, or `looks` is less than 1.
    """
    all_results, directory = load_results(paths, looks, reference), Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    _figure(all_results).savefig(directory / FIGURE, dpi=150)
    again = f" --looks {looks}" * (looks > 1)
    again += "".join(f" --reference {name}={value}" for name, value in (reference or {}).items())
    said = f"They hold for all {looks} looks together." if looks > 1 else "They are for one look at the data."
    sections = ["# Sweeps", f"![{CAPTION}]({FIGURE})\n\n*{CAPTION}*", *map(_section, all_results)]
    sections += ["## How it was measured", f"{HOW} {said}"]
    sections.append(f"Written by `mtp-jax report {' '.join(map(str, paths))} --out {out}{again}`.")
    (directory / PAGE).write_text("\n\n".join(sections) + "\n")
    return directory / PAGE


def readings_of(results: Results) -> dict[str, str]:
    """The readings that differ, in words: those with the same checkpoints of all runs are one."""
    same: dict[tuple[Any, ...], dict[str, str]] = {}
    for name in dict.fromkeys([*READINGS, *(name for run in results.runs for name in run.raw["readings"])]):
        steps = tuple(run.raw["readings"].get(name) for run in results.runs)
        if any(steps):
            same.setdefault(steps, {})[name] = READINGS.get(name, f"`{name}`")
    return {next(iter(words)): ", ".join(words.values()) for words in same.values()}


def _section(results: Results) -> str:
    raw = results.raw
    reference = ", ".join(f"`{n}` {value}" for n, value in (results.against or raw["reference"]).items()) or "none"
    machine = ", ".join(_MACHINE[name].format(raw["machine"][name]) for name in _MACHINE if name in raw["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in raw["versions"].items())
    runs = f"{len(results.runs)} runs of `{raw['command']}`; reference: {reference}"
    parts = [
        f"## {results.label}",
        f"{raw['title']} {runs}; {machine}; {versions}.",
        *_first(results),
        *_cases(results),
    ]
    for reading, words in readings_of(results).items():
        parts += [f"### At {words}", _table([_row(results, point, reading) for point in results.points])]
        parts += ["By offset:", _table([_by_offset(results, point, reading) for point in results.points])]
    if results.failed:
        parts += ["Runs that failed:", markdown_table(["run", "error"], results.failed.items())]
    return "\n\n".join(parts)


def _first(results: Results) -> list[str]:
    """Which variants come first, at equal wall-clock of training if the runs were read there."""
    t = _temperature(results)
    reading = "seconds" if any("seconds" in run.raw["readings"] for run in results.runs) else "steps"
    gains = {point: compare(results, point, reading, tokens_per_forward(t)) for point in results.points}
    gains = {point: e for point, e in gains.items() if e and results.reference(point) != point}
    rates = {point: found for point in results.points if (found := speeds(results, point, reading, t))}
    said = []
    if gains:
        most = max(gains, key=lambda point: gains[point].mean)
        gained = f"{gains[most]:+.3f} over the reference ({gains[most].how})"
        said.append(f"most tokens per forward: {results.text(most)}, {gained}")
    if rates:
        fastest = max(rates, key=lambda point: max(rates[point].values()))
        k = max(rates[fastest], key=rates[fastest].__getitem__)
        gain = f"{rates[fastest][k] / rates[fastest][0]:.2f} times plain decoding"
        none = "none is faster than plain decoding"
        said.append(f"fastest: {results.text(fastest)} with k = {k}, {gain}" if k else none)
    return [f"At {READINGS[reading]}, T = {t:g}: {'; '.join(said)}."] if said else []


def _cases(results: Results) -> list[str]:
    """A table of what each case changes, if there are cases. Rows of runs have their names."""
    if CASE not in results.fields:
        return []
    of = {run.raw["changes"][CASE]: run.raw["changes"] for run in results.runs}
    own = {case: changes.keys() - {*results.fields, SEED} for case, changes in of.items()}
    rows = ((case, _values(of[case], (n for n in of[case] if n in own[case])) or "-") for case in of)
    return [markdown_table([CASE, "changes"], rows)]


def _values(changes: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(str(changes[name]) if name == CASE else f"{name} = {changes[name]}" for name in names)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells by column, without the columns of which nothing is known."""
    known = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    return markdown_table(known, ([row[name] for name in known] for row in rows))


def _row(results: Results, point: Point, reading: str) -> dict[str, str]:
    """The cells of a variant by column, "-" where nothing is known."""
    is_reference, runs = results.reference(point) == point, results.of(point)
    cost = runs[0].raw["cost"]
    over, steps = cost["over_reference"], [step for run in runs if (step := run.raw["readings"].get(reading))]

    def cell(metric: Metric) -> str:
        e = (estimate if is_reference else compare)(results, point, reading, metric)
        return "-" if e is None else f"{e:.3f}" if is_reference else f"{e:+.3f}"

    def tempered(t: float) -> dict[str, str]:
        rates = speeds(results, point, reading, t)
        k = max(rates, key=rates.__getitem__, default=0)
        return {
            f"tokens per forward, T = {t:g}": cell(tokens_per_forward(t)),
            f"tokens/s, T = {t:g}": f"{rates[k]:,.0f} (k = {k})" if rates else "-",
            f"over plain decoding, T = {t:g}": f"{rates[k] / rates[0]:.2f}" if rates else "-",
        }

    share = results.share(point, reading) if reading in OVER else None
    step = f"{1e3 * cost['seconds']:.0f} ms" if is_reference else f"{over['measured']:.2f}x +- {over['error']:.2f}"
    by_temperature = {name: text for t in _temperatures(results) for name, text in tempered(t).items()}
    return {
        "run": _name(results, point),
        "seeds": f"{len(runs)}" + ", **reference**" * is_reference,
        "joint loss": cell(joint_loss),
        **by_temperature,
        "head": f"{cost['head_parameters'] / 1e6:.1f}M" if "head_parameters" in cost else "-",
        "training step": step,
        "share": f"{share:.2f}" if share is not None and share < 0.97 else "-",
        "training": f"{np.mean(steps) * cost['seconds']:,.0f} s" if steps else "-",
    }


def _by_offset(results: Results, point: Point, reading: str) -> dict[str, str]:
    """What is known of a variant offset by offset, and of its components."""
    runs = results.of(point)
    ends = [at for run in runs if (at := run.at(reading))]

    def kept(t: float) -> str:
        drafted = [found for run in runs if (found := decoding(run, reading, t))]
        return _means([[e["mean"] for e in found["acceptance"]] for found in drafted])

    return {
        "run": _name(results, point),
        "loss": _means([[e["mean"] for e in at["loss"]["offsets"]] for at in ends]),
        **{f"drafts kept, T = {t:g}": kept(t) for t in _temperatures(results)},
        "components in effect": _means([at["gate"]["effective"] for at in ends if "gate" in at]),
    }


def _name(results: Results, point: Point) -> str:
    run = results.of(point)[0]
    return _values(run.raw["changes"], results.fields) or run.name


def speeds(results: Results, point: Point, reading: str, t: float) -> dict[int, float]:
    """Tokens per second at batch 1 and a temperature by k: tokens of a forward over the time of an iteration, in the
    faster dtype."""
    found: dict[int, float] = {}
    for row in results.of(point)[0].raw["cost"]["decoding"]:  # which does not depend on the seed
        tokens = estimate(results, point, reading, tokens_per_forward(t, k=row["k"]))
        if tokens and row["temperature"] == t:
            found[row["k"]] = max(found.get(row["k"], 0.0), tokens.mean / float(np.median(row["iteration_seconds"])))
    return found


def _temperature(results: Results) -> float:
    """The temperature at which every checkpoint is measured."""
    return results.raw["measure"]["temperatures"][0]


def _temperatures(results: Results) -> list[float]:
    """That one, and those at which iterations were timed."""
    timed = (row["temperature"] for point in results.points for row in results.of(point)[0].raw["cost"]["decoding"])
    return list(dict.fromkeys([_temperature(results), *timed]))


def _means(values: Sequence[Any]) -> str:
    """The mean over seeds of numbers, or of lists of them, entry by entry."""
    return " ".join(f"{mean:.2f}" for mean in np.atleast_1d(np.mean(values, axis=0))) if len(values) else "-"


def _figure(all_results: Sequence[Results]) -> Figure:
    """For each sweep two panels: differences of loss and of tokens per forward."""
    drawn: list[tuple[Results, str, str, Metric]] = []
    for results in all_results:
        drawn.append((results, results.label, "joint loss, nats", joint_loss))
        drawn.append((results, "", "tokens per forward", tokens_per_forward(_temperature(results))))
    figure, parts = panels([title for _, title, *_ in drawn], "", "")
    for axes, (results, _, name, metric) in zip(parts, drawn, strict=True):
        points, known = results.points, readings_of(results)
        for index, (reading, words) in enumerate(READINGS.items()):
            for y, point in enumerate(points if reading in known else []):
                e = compare(results, point, reading, metric)
                if e and results.reference(point) != point:
                    style: dict[str, Any] = {"color": PALETTE[index], "fmt": MARKERS[index], "ms": 5, "capsize": 3}
                    style |= {"label": words, "mfc": None if e.seeds > 1 else "white"}
                    error = [[abs(bound - e.mean)] for bound in e.interval()]
                    axes.errorbar(e.mean, y + 0.2 * (index - 1), xerr=error, **style)
        names = [results.text(point) + " (ref.)" * (results.reference(point) == point) for point in points]
        axes.set_yticks(range(len(points)), names if metric is joint_loss else [""] * len(points))
        axes.set(ylim=(len(points) - 0.5, -0.5), xlabel=f"{name}, over the reference")
        axes.axvline(0, color="0.4", lw=1)
    legend(figure)
    return figure
