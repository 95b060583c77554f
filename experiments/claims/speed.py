"""Claims about speed and cost: generation is faster, and the overhead is low."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.claims.claim import MAIN_T, Claim, above, over_text, ratio_text, undecided
from experiments.claims.data import RankResults, above_one, rank_sweeps
from experiments.claims.rates import fastest, speed, speed_ratio, speedup, timed
from experiments.claims.verdict import SPEED, both, holds, judge
from mtp_jax.plots import markdown_table
from mtp_jax.sweep.compare import Estimate
from mtp_jax.sweep.results import READINGS

BAR = 1.10
BUSY = 1.5  # threads that are ready, of each core: those of one process are about 1
CHEAP = 1.25  # of a training step, over rank 1
FASTER = {True: "some rank above 1 is faster", False: "none above 1 is faster", None: "it is undecided"}
BARS = {True: "is met", False: "is not met", None: "is undecided"}


def faster(all_results: Sequence[RankResults]) -> Claim:
    """Generation is faster than with rank 1."""
    title, found = "Rank above 1 speeds up the generation of text and code", rank_sweeps(all_results)
    rows, where = [], []
    gains: dict[bool, list[Estimate]] = {}
    for results in found:
        ratios = {point: e for point in above_one(results) if (e := speed_ratio(results, point, "seconds", MAIN_T))}
        gains.setdefault(results.is_code, []).extend(above(e, 1) for e in ratios.values())
        if ratios:
            is_faster = holds([above(e, 1) for e in ratios.values()], SPEED)
            bar = holds([above(e, BAR) for e in ratios.values()], 0)
            goal = f", and the project's own bar of {BAR:.2f}x on code {BARS[bar]}" if results.is_code else ""
            judged = ", ".join(results.text(p) for p, e in ratios.items() if e.seeds > 1) or "none has two seeds"
            where.append(f"In {results.label} {FASTER[is_faster]}{goal} (judged: {judged}).")
        for point in results.points:
            own = speed(results, point, "seconds", MAIN_T)
            if own:
                cells = [
                    over_text(results, point, speed_ratio(results, point, reading, MAIN_T), ratio_text)
                    for reading in READINGS
                ]
                direct = (
                    f"{max(row['speedup'] for row in at['speed'] if row['temperature'] == MAIN_T):.2f}x"
                    + " (busy)" * (at.get("load", 0) > BUSY)
                    for run in results.of(point)
                    for at in run.raw["measured"].values()
                    if at.get("speed")  # newer sweeps do not measure it
                )
                up = speedup(results, point, "seconds", MAIN_T)
                over_plain = [f"{up:.2f}x" if up else "-", next(direct, "-")]
                rows.append([results.label, results.text(point), f"{own.k}", *over_plain, *cells])
    if not rows:
        return undecided(title, "no sweep over rank on a frozen trunk with timed decoding")
    text = (
        f"Tokens per second at T = {MAIN_T:g} and batch 1 over those of rank 1, each with the number of drafts, k, "
        "that is best for it of those measured (all, or W-1 and 0 alone in older sweeps): the tokens of an iteration "
        "over its time, which is taken for all ranks in one process, in turn; intervals hold the rounds of that and "
        "the choice of k too (plain decoding of one trunk is one work: its time is the median over ranks). Each k is "
        "in the faster of the dtypes in which it was timed, and acceptance is that of the run's own. Beside it what "
        "one run of each rank gave at its best k in a process of its own, with whatever else the machine did then "
        "(busy: that was much; older sweeps do not say); where the two differ by more than the effect, neither tells. "
        "Sweeps of code are one data set here, and those of text: that one kind of head does not pay does not say that "
        "none does. "
        f"{' '.join(where)}"
    )
    header = ["sweep", "run", "k, equal wall-clock", "over plain, equal wall-clock", "the same, one run"]
    header += [f"over rank 1, {reading}" for reading in READINGS.values()]
    verdict = judge([holds(of, SPEED) for of in gains.values()])
    return Claim(title, verdict, text, markdown_table(header, rows), found)


def low_overhead(all_results: Sequence[RankResults]) -> Claim:
    """Training and decoding cost little more."""
    title, found = "The overhead of rank is low", rank_sweeps(all_results)
    if not found:
        return undecided(title, "no sweep over rank on a frozen trunk")
    rows, good, where = [], [], []
    for results in found:
        costs = {point: results.of(point)[0].raw["cost"] for point in results.points}
        cheap = {point: _cheap(costs[point]["over_reference"]) for point in above_one(results)}
        good.append(both(*cheap.values()) if cheap else None)
        low = ", ".join(results.text(point) for point, is_low in cheap.items() if is_low) or "none"
        where.append(f"In {results.label} it is low for {low}.")
        for point, cost in costs.items():
            run, others = results.of(point)[0], results.of(results.reference(point))
            ratios = [
                cost[over][kind] for over in ("over_next_token", "over_reference") for kind in ("predicted", "measured")
            ]
            cells = [f"{ratio:.2f}" for ratio in ratios]
            cells[-1] += f" +- {cost['over_reference']['error']:.2f}"
            for k in (0, run.head["window"] - 1):
                seconds, ones = (fastest(timed(of[0], MAIN_T, k)) if of else None for of in ([run], others))
                ratio = "" if seconds is None or ones is None else f" ({np.median(seconds / ones):.2f}x)"
                cells.append("-" if seconds is None else f"{1e3 * np.median(seconds):.2f}{ratio}")
            rows.append([results.label, results.text(point), *cells, f"{cost['peak_bytes'] / 2**20:,.0f}"])
    steps = "step / next-token step, predicted", "measured", "step / rank-1 step, predicted", "measured"
    header = ["sweep", "run", *steps, "plain iteration, ms (over rank 1)", "with W-1 drafts", "peak MiB of a step"]
    text = (
        f"Low is taken to mean at most {CHEAP:g} times a training step of rank 1: confirmed if all ranks of a sweep "
        "are surely below that, not confirmed if one is surely above it. Predictions are in FLOPs. The next-token step "
        "trains the whole trunk, so a frozen one is cheaper. With one target, the plain iteration is the same work for "
        "all ranks: its spread is the noise of the clock. After +- stands a standard error of the clock between "
        "rounds; what the order of the runs in a round does is in it where that changes, and in older sweeps it does "
        "not. The peak is the compiler's. "
        f"{' '.join(where)}"
    )
    return Claim(title, judge(good), text, markdown_table(header, rows), found)


def _cheap(over_reference: dict[str, float]) -> bool | None:
    apart = over_reference["measured"] - CHEAP
    return apart < 0 if abs(apart) > 1.96 * over_reference["error"] else None
