"""The figures of the page. Each function returns None where the results have not what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_jax.report import MARKERS, PALETTE, legend, panels
from mtp_jax.results.claims import MAIN_T, rank_sweeps
from mtp_jax.results.compare import (
    Estimate,
    compare,
    decoding,
    estimate,
    joint_loss,
    speed_ratio,
    tokens_per_forward,
)
from mtp_jax.results.load import READINGS, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPERATURES = (0.0, MAIN_T, 1.0)


def loss_by_rank(all_results: Sequence[Results]) -> Figure | None:
    """The joint loss of each rank over that of rank 1."""
    found = list(_lines(all_results))
    if not found:
        return None
    figure, parts = panels([title for title, _, _ in found], "rank R", "joint loss over rank 1 (nats per window)")
    for axes, (_, results, points) in zip(parts, found, strict=True):
        for shift, (reading, text) in enumerate(READINGS.items()):
            cells = [compare(results, point, reading, joint_loss) for point in points]
            _errorbars(axes, _ranks(results, points, shift), cells, shift, text)
        _rank_axis(axes, results, points)
        axes.axhline(0, color="0.4", lw=1)
    legend(figure, [handle for axes in parts for handle in axes.get_legend_handles_labels()[0]])
    return figure


def acceptance_by_rank(all_results: Sequence[Results]) -> Figure | None:
    """Tokens per forward of each rank, by temperature, at equal steps."""
    found = list(_lines(all_results))
    if not found:
        return None
    figure, parts = panels([title for title, _, _ in found], "rank R", "tokens per forward, k = W-1")
    for axes, (_, results, points) in zip(parts, found, strict=True):
        for shift, temperature in enumerate(TEMPERATURES):
            cells = [estimate(results, point, "steps", tokens_per_forward(temperature)) for point in points]
            _errorbars(axes, _ranks(results, points, shift), cells, shift, f"T = {temperature:g}")
        _rank_axis(axes, results, points)
    legend(figure, [handle for axes in parts for handle in axes.get_legend_handles_labels()[0]])
    return figure


def acceptance_by_offset(all_results: Sequence[Results]) -> Figure | None:
    """The share of forwards in which each draft was kept, by rank."""
    found = list(_lines(all_results))
    if not found:
        return None
    figure, parts = panels([title for title, _, _ in found], "offset of the draft", f"share kept, T = {MAIN_T:g}")
    for axes, (_, results, points) in zip(parts, found, strict=True):
        shades = _shades(len(points))
        for point, shade in zip(points, shades, strict=True):
            rows = [row for run in results.of(point) if (row := decoding(run, "steps", MAIN_T))]
            if rows:
                kept = np.mean([[e["mean"] for e in row["acceptance"]] for row in rows], axis=0)
                axes.plot(
                    range(1, len(kept) + 1), kept, color=shade, marker="o", ms=4, lw=1.8, label=results.text(point)
                )
                axes.set_xticks(range(1, len(kept) + 1))
        axes.set_ylim(0, 1.02)
    legend(figure, [handle for axes in parts for handle in axes.get_legend_handles_labels()[0]])
    return figure


def speed_by_k(all_results: Sequence[Results]) -> Figure | None:
    """Tokens/s over plain decoding by the number of drafts, as measured of one run of each rank."""
    found = []
    for title, results, points in _lines(all_results):
        rows = {point: speeds for point in points if (speeds := _speeds(results, point))}
        if rows:
            found.append((title, results, rows))
    if not found:
        return None
    titles = [title for title, _, _ in found]
    figure, parts = panels(titles, "drafts per forward, k", f"tokens/s over plain decoding, T = {MAIN_T:g}")
    for axes, (_, results, rows) in zip(parts, found, strict=True):
        for (point, speeds), shade in zip(rows.items(), _shades(len(rows)), strict=True):
            ks = sorted(speeds)
            axes.plot(ks, [speeds[k] for k in ks], color=shade, marker="o", ms=4, lw=1.8, label=results.text(point))
            axes.set_xticks(ks)
        axes.axhline(1, color="0.4", lw=1, ls=(0, (4, 3)))
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    legend(figure, [handle for axes in parts for handle in axes.get_legend_handles_labels()[0]])
    return figure


def frontier(all_results: Sequence[Results]) -> Figure | None:
    """What a rank costs in training against what it gives in decoding."""
    found = [
        (title, results, points)
        for title, results, points in _lines(all_results)
        if any(speed_ratio(results, point, "steps", MAIN_T) for point in points)
    ]
    if not found:
        return None
    titles = [title for title, _, _ in found]
    figure, parts = panels(titles, "training step over that of rank 1", f"tokens/s over rank 1, T = {MAIN_T:g}")
    for axes, (_, results, points) in zip(parts, found, strict=True):
        steps = {p: results.of(p)[0].raw["cost"]["over_reference"]["measured"] for p in points}
        apart = 0.012 * (max(steps.values()) - min(steps.values()))  # so that the intervals do not hide each other
        for index, reading in enumerate(("steps", "seconds")):
            ratios = [speed_ratio(results, point, reading, MAIN_T) for point in points]
            xs = [x + index * apart for x in steps.values()]
            _errorbars(axes, xs, ratios, index, READINGS[reading])
            for x, ratio, point in zip(xs, ratios, points, strict=True):
                if ratio and index == 1:
                    # Below its interval; the reference, which has none, beside it.
                    alone = results.reference(point) == point
                    xytext, place = ((-5, 3), ("right", "bottom")) if alone else ((0, -4), ("center", "top"))
                    axes.annotate(
                        results.text(point), (x, ratio.interval()[0]), xytext=xytext, textcoords="offset points",
                        ha=place[0], va=place[1], size="small", color="0.3",
                    )  # fmt: skip
        axes.axhline(1, color="0.4", lw=1)
        axes.margins(x=0.15, y=0.12)
    legend(figure, [handle for axes in parts for handle in axes.get_legend_handles_labels()[0]])
    return figure


def components(all_results: Sequence[Results]) -> Figure | None:
    """How much of the windows each component is responsible for, by rank."""
    found = []
    for title, results, points in _lines(all_results):
        shares = {point: [c["share"] for c in parts] for point in points if (parts := component_rows(results, point))}
        if any(len(of) > 1 for of in shares.values()):
            found.append((title, results, shares))
    if not found:
        return None
    figure, parts = panels([title for title, _, _ in found], "rank R", "share of the windows, by posterior")
    for axes, (_, results, shares) in zip(parts, found, strict=True):
        for x, of in enumerate(shares.values()):
            bottom = 0.0
            for index, share in enumerate(sorted(of, reverse=True)):
                axes.bar(
                    x,
                    share,
                    0.7,
                    bottom=bottom,
                    color=_shades(max(map(len, shares.values())))[index],
                    ec="white",
                    lw=0.6,
                )
                bottom += share
        axes.set_xticks(range(len(shares)), [str(results.rank(point)) for point in shares])
        axes.set(ylim=(0, 1), axisbelow=True)
    return figure


def balancing(all_results: Sequence[Results]) -> Figure | None:
    """Loss, acceptance and components in use by kind and weight of balancing."""
    found = [r for r in all_results if len({(run.head["balance"], run.head["balance_weight"]) for run in r.runs}) > 1]
    if not found:
        return None
    results = found[0]
    titles = ["Joint loss", f"Tokens per forward, T = {MAIN_T:g}", "Effective components"]
    figure, parts = panels(titles, "", "")
    names = [results.text(point).partition(",")[0] for point in results.points]
    for axes, metric in zip(parts, (joint_loss, tokens_per_forward(MAIN_T), None), strict=True):
        for y, point in enumerate(results.points):
            if metric is None:
                gate = [f["gate"]["effective"] for run in results.of(point) if (f := run.at("steps"))]
                axes.plot(np.mean(gate), y, "o", color=PALETTE[0])
            elif e := estimate(results, point, "steps", metric):
                error = [[abs(bound - e.mean)] for bound in e.interval()]
                axes.errorbar(e.mean, y, xerr=error, fmt="o", color=PALETTE[0], capsize=3)
        axes.set_yticks(range(len(names)), names if axes is parts[0] else [""] * len(names))
        axes.invert_yaxis()
    parts[0].set_xlabel("nats per window")
    parts[2].set_xlabel(f"of {results.runs[0].head['rank']}")
    return figure


FIGURES: dict[str, tuple[Callable[[Sequence[Results]], Any], str]] = {
    "loss_by_rank": (loss_by_rank, "Held-out joint loss against that of rank 1, in three readings of the same runs."),
    "acceptance_by_rank": (acceptance_by_rank, "Tokens per forward with all W-1 drafts, at equal steps."),
    "acceptance_by_offset": (
        acceptance_by_offset,
        "Share of forwards in which the draft at an offset, and all before it, were kept; at equal steps.",
    ),
    "speed_by_k": (
        speed_by_k,
        "Tokens per second over plain decoding of the same model, measured at batch 1 in one process per run, at "
        "equal wall-clock of training; one seed.",
    ),
    "frontier": (
        frontier,
        "What a rank costs, as the measured time of a training step, against what it gives, as tokens per second at "
        "the best k, both over rank 1, with intervals of 95%.",
    ),
    "components": (components, "Share of the held-out windows that each component is responsible for, sorted."),
    "balancing": (balancing, "Kinds and weights of load balancing, at equal steps."),
}


def component_rows(results: Results, point: tuple[Any, ...]) -> list[dict[str, Any]]:
    """What the components of a point are responsible for, of the run that it was measured of."""
    for run in results.of(point):
        for found in run.raw["measured"].values():
            if found["components"]:
                return found["components"]
    return []


def _lines(all_results: Sequence[Results]) -> Iterator[tuple[str, Results, list[tuple[Any, ...]]]]:
    """The sweeps over rank, a panel each: its title, and its points by rank."""
    for frozen in (True, False):
        for results in rank_sweeps(all_results, frozen):
            yield results.raw["sweep"], results, sorted(results.points, key=results.rank)


def _rank_axis(axes: Axes, results: Results, points: Sequence[tuple[Any, ...]]) -> None:
    ranks = [results.rank(point) for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlim(min(ranks) / 1.3, max(ranks) * 1.3)


def _ranks(results: Results, points: Sequence[tuple[Any, ...]], shift: int) -> list[float]:
    """Where the points are on the axis of ranks, the second of three series in the middle."""
    return [results.rank(point) * 1.04 ** (shift - 1) for point in points]


def _errorbars(axes: Axes, xs: Sequence[float], cells: Sequence[Estimate | None], index: int, label: str) -> None:
    shown = [(x, e) for x, e in zip(xs, cells, strict=True) if e is not None]
    if not shown:
        return
    xs, es = zip(*shown, strict=True)
    errors = [[abs(e.interval()[side] - e.mean) for e in es] for side in (0, 1)]
    axes.errorbar(
        xs, [e.mean for e in es], yerr=errors, color=PALETTE[index], marker=MARKERS[index], ms=5, lw=1.6, capsize=3,
        label=label,
    )  # fmt: skip


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.88, max(1, count))))


def _speeds(results: Results, point: tuple[Any, ...]) -> dict[int, float]:
    for run in results.of(point):
        for found in run.raw["measured"].values():
            rows = [row for row in found["speed"] if row["temperature"] == MAIN_T]
            if rows:  # in whichever dtype is faster
                return {k: max(row["speedup"] for row in rows if row["k"] == k) for k in {row["k"] for row in rows}}
    return {}
