"""Figures of the page of claims, each drawn of the results that have what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.claims.claim import MAIN_T
from experiments.claims.data import RankResults, all_rank_sweeps
from experiments.claims.rates import iteration_seconds, speed_ratio, speeds
from mtp_jax.plots import MARKERS, PALETTE, legend, panels
from mtp_jax.sweep.compare import Estimate, compare, decoding, estimate, joint_loss, tokens_per_forward
from mtp_jax.sweep.results import READINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPERATURES = (0.0, MAIN_T, 1.0)


@dataclass(frozen=True)
class Drawing:
    """A figure: which of all results it is of, what draws those, and its caption. Of none there is no figure."""

    of: Callable[[Sequence[RankResults]], list[RankResults]]
    draw: Callable[[Sequence[RankResults]], Figure]
    caption: str


def loss_by_rank(found: Sequence[RankResults]) -> Figure:
    """The joint loss of each rank over that of rank 1."""
    figure, parts = panels(_titles(found), "rank R", "joint loss over rank 1 (nats per window)")
    for axes, results in zip(parts, found, strict=True):
        points = _by_rank(results)
        for shift, (reading, text) in enumerate(READINGS.items()):
            cells = [compare(results, point, reading, joint_loss) for point in points]
            _errorbars(axes, _ranks(results, points, shift), cells, shift, text)
        _rank_axis(axes, results, points)
        axes.axhline(0, color="0.4", lw=1)
    legend(figure)
    return figure


def acceptance_by_rank(found: Sequence[RankResults]) -> Figure:
    """Tokens per forward of each rank, by temperature, at equal steps."""
    figure, parts = panels(_titles(found), "rank R", "tokens per forward, k = W-1")
    for axes, results in zip(parts, found, strict=True):
        points = _by_rank(results)
        for shift, temperature in enumerate(TEMPERATURES):
            cells = [estimate(results, point, "steps", tokens_per_forward(temperature)) for point in points]
            _errorbars(axes, _ranks(results, points, shift), cells, shift, f"T = {temperature:g}")
        _rank_axis(axes, results, points)
    legend(figure)
    return figure


def acceptance_by_offset(found: Sequence[RankResults]) -> Figure:
    """The share of forwards in which each draft was kept, by rank."""
    figure, parts = panels(_titles(found), "offset of the draft", f"share kept, T = {MAIN_T:g}")
    for axes, results in zip(parts, found, strict=True):
        for point in _by_rank(results):
            rows = [row for run in results.of(point) if (row := decoding(run, "steps", MAIN_T))]
            if rows:
                kept = np.mean([[e["mean"] for e in row["acceptance"]] for row in rows], axis=0)
                axes.plot(range(1, len(kept) + 1), kept, **_line(results, point))
                axes.set_xticks(range(1, len(kept) + 1))
        axes.set_ylim(0, 1.02)
    legend(figure)
    return figure


def speed_by_k(found: Sequence[RankResults]) -> Figure:
    """Tokens/s over plain decoding by the number of drafts, each the tokens of an iteration over its time."""
    figure, parts = panels(_titles(found), "drafts per forward, k", f"tokens/s over plain decoding, T = {MAIN_T:g}")
    for axes, results in zip(parts, found, strict=True):
        for point in _by_rank(results):
            over_plain = _over_plain(results, point)
            axes.plot(*zip(*over_plain.items(), strict=True), **_line(results, point))
            axes.set_xticks(list(over_plain))
        axes.axhline(1, color="0.4", lw=1, ls=(0, (4, 3)))
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    legend(figure)
    return figure


def frontier(found: Sequence[RankResults]) -> Figure:
    """What a rank costs in training against what it gives in decoding."""
    figure, parts = panels(_titles(found), "training step over that of rank 1", f"tokens/s over rank 1, T = {MAIN_T:g}")
    for axes, results in zip(parts, found, strict=True):
        points = _by_rank(results)
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
    legend(figure)
    return figure


def components(found: Sequence[RankResults]) -> Figure:
    """How much of the windows each component is responsible for, by rank."""
    figure, parts = panels(_titles(found), "rank R", "share of the windows, by posterior")
    for axes, results in zip(parts, found, strict=True):
        shares = _shares(results)
        shades = _shades(max(map(len, shares.values())))
        for x, of in enumerate(shares.values()):
            bottom = 0.0
            for index, share in enumerate(sorted(of, reverse=True)):
                axes.bar(x, share, 0.7, bottom=bottom, color=shades[index], ec="white", lw=0.6)
                bottom += share
        axes.set_xticks(range(len(shares)), [str(results.rank(point)) for point in shares])
        axes.set(ylim=(0, 1), axisbelow=True)
    return figure


def balancing(found: Sequence[RankResults]) -> Figure:
    """What kinds and weights of balancing change of loss and acceptance, and the components in use."""
    (results,) = found
    titles = ["Joint loss", f"Tokens per forward, T = {MAIN_T:g}", "Effective components"]
    reference = results.text(results.reference(results.points[0])).partition(",")[0]
    figure, parts = panels(titles, "", "")
    names = [results.text(point).partition(",")[0] for point in results.points]
    for axes, metric in zip(parts, (joint_loss, tokens_per_forward(MAIN_T), None), strict=True):
        for y, point in enumerate(results.points):
            if metric is None:
                gate = [f["gate"]["effective"] for run in results.of(point) if (f := run.at("steps"))]
                axes.plot(np.mean(gate), y, "o", color=PALETTE[0])
            elif e := compare(results, point, "steps", metric):
                error = [[abs(bound - e.mean)] for bound in e.interval()]
                axes.errorbar(e.mean, y, xerr=error, fmt="o", color=PALETTE[0], mfc=_filling(e, PALETTE[0]), capsize=3)
        axes.set_yticks(range(len(names)), names if axes is parts[0] else [""] * len(names))
        axes.invert_yaxis()
    parts[0].set_xlabel(f"nats per window over {reference}")
    parts[1].set_xlabel(f"over {reference}")
    for axes in parts[:2]:
        axes.axvline(0, color="0.4", lw=1)
    parts[2].set_xlabel(f"of {results.runs[0].head['rank']}")
    return figure


def component_rows(results: RankResults, point: tuple[Any, ...]) -> list[dict[str, Any]]:
    """What the components of a point are responsible for, of the run that it was measured of."""
    for run in results.of(point):
        for found in run.raw["measured"].values():
            if found["components"]:
                return found["components"]
    return []


def _titles(found: Sequence[RankResults]) -> list[str]:
    return [results.raw["sweep"] for results in found]


def _by_rank(results: RankResults) -> list[tuple[Any, ...]]:
    return sorted(results.points, key=results.rank)


def _rank_axis(axes: Axes, results: RankResults, points: Sequence[tuple[Any, ...]]) -> None:
    ranks = [results.rank(point) for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlim(min(ranks) / 1.3, max(ranks) * 1.3)


def _ranks(results: RankResults, points: Sequence[tuple[Any, ...]], shift: int) -> list[float]:
    """Where the points are on the axis of ranks, the second of three series in the middle."""
    return [results.rank(point) * 1.04 ** (shift - 1) for point in points]


def _errorbars(axes: Axes, xs: Sequence[float], cells: Sequence[Estimate | None], index: int, label: str) -> None:
    shown = [(x, e) for x, e in zip(xs, cells, strict=True) if e is not None]
    if not shown:
        return
    xs, es = zip(*shown, strict=True)
    errors = [[abs(e.interval()[side] - e.mean) for e in es] for side in (0, 1)]
    style: dict[str, Any] = {"color": PALETTE[index], "marker": MARKERS[index], "ms": 5}
    axes.errorbar(xs, [e.mean for e in es], yerr=errors, lw=1.6, capsize=3, label=label, **style)
    for x, e in zip(xs, es, strict=True):
        axes.plot(x, e.mean, mfc=_filling(e, PALETTE[index]), zorder=3, **style)


def _filling(e: Estimate, color: str) -> str:
    """Of one seed a marker is hollow: its interval says nothing of other seeds."""
    return color if e.seeds > 1 else "white"


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.88, max(1, count))))


def _line(results: RankResults, point: tuple[Any, ...]) -> dict[str, Any]:
    """How a point is drawn: the colour is that of its rank in all panels, from 1, the darkest, to 32."""
    from matplotlib import colormaps

    shade = colormaps["viridis"](0.18 * min(5.0, np.log2(results.rank(point))))
    return {"color": shade, "marker": "o", "ms": 4, "lw": 1.8, "label": results.text(point)}


def _with_speed(all_results: Sequence[RankResults]) -> list[RankResults]:
    return [
        results
        for results in all_rank_sweeps(all_results)
        if all(len(_over_plain(results, point)) > 1 for point in results.points)
    ]


def _over_plain(results: RankResults, point: tuple[Any, ...]) -> dict[int, float]:
    """Tokens/s of each k over plain decoding, at equal wall-clock."""
    plain = iteration_seconds(results, point, MAIN_T).get(0)
    if plain is None:
        return {}
    found = {at.k: at.rate * float(np.median(plain)) for at in speeds(results, point, "seconds", MAIN_T)}
    return {0: 1.0, **dict(sorted(found.items()))}


def _with_cost(all_results: Sequence[RankResults]) -> list[RankResults]:
    return [
        results
        for results in all_rank_sweeps(all_results)
        if any(speed_ratio(results, point, "steps", MAIN_T) for point in results.points)
    ]


def _with_components(all_results: Sequence[RankResults]) -> list[RankResults]:
    return [results for results in all_rank_sweeps(all_results) if any(len(of) > 1 for of in _shares(results).values())]


def _shares(results: RankResults) -> dict[tuple[Any, ...], list[float]]:
    """Of each point the shares of the components, of the run that they were measured of."""
    rows = {point: component_rows(results, point) for point in _by_rank(results)}
    return {point: [component["share"] for component in of] for point, of in rows.items() if of}


def _balanced(all_results: Sequence[RankResults]) -> list[RankResults]:
    """The first sweep over load balancing."""
    return [results for results in all_results if results.over_balance][:1]


HOLLOW = "Hollow: of one seed."
FIGURES = {
    "loss_by_rank": Drawing(
        all_rank_sweeps,
        loss_by_rank,
        f"Held-out joint loss against that of rank 1, in three readings of the same runs. {HOLLOW}",
    ),
    "acceptance_by_rank": Drawing(
        all_rank_sweeps,
        acceptance_by_rank,
        f"Tokens per forward with all W-1 drafts, at equal steps. {HOLLOW}",
    ),
    "acceptance_by_offset": Drawing(
        all_rank_sweeps,
        acceptance_by_offset,
        "Share of forwards in which the draft at an offset, and all before it, were kept; at equal steps.",
    ),
    "speed_by_k": Drawing(
        _with_speed,
        speed_by_k,
        "Tokens per second over plain decoding of the same trunk at batch 1: the tokens of an iteration over its time, "
        "at equal wall-clock of training.",
    ),
    "frontier": Drawing(
        _with_cost,
        frontier,
        "What a rank costs, as the measured time of a training step, against what it gives, as tokens per second at "
        f"the best k, both over rank 1, with intervals of 95%. {HOLLOW}",
    ),
    "components": Drawing(
        _with_components,
        components,
        "Share of the held-out windows that each component is responsible for, sorted.",
    ),
    "balancing": Drawing(_balanced, balancing, f"Kinds and weights of load balancing, at equal steps. {HOLLOW}"),
}
