"""The claims of the paper (arXiv 2410.17765), each with the evidence of the results files and a verdict by one rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mtp_jax.report import markdown_table
from mtp_jax.results.compare import (
    Estimate,
    Metric,
    compare,
    decoding,
    estimate,
    first_token_loss,
    iteration_seconds,
    joint_loss,
    over_seeds,
    over_units,
    speed_ratio,
    speedup,
    tokens_per_forward,
)
from mtp_jax.results.load import RANK, READINGS, Results, Run

Verdict = Literal["confirmed", "not confirmed", "undecided"]
BAR, MAIN_T = 1.10, 0.7
RULE = (
    "Confirmed: on every data set given, an interval lies wholly on the claim's side. Not confirmed: on some data set "
    "none does. Undecided: there are no data, or too few to tell. Where ranks are compared, the best rank above 1 is "
    "asked for, at equal wall-clock of training."
)


@dataclass
class Claim:
    """A claim, what was found and where it was found."""

    title: str
    verdict: Verdict
    text: str
    table: str = ""
    sources: list[str] = field(default_factory=list)


def claims(all_results: Sequence[Results]) -> list[Claim]:
    """All claims, in the order of the page."""
    makers: list[Callable[[Sequence[Results]], Claim]] = [
        lower_loss, more_acceptance, first_token, faster, low_overhead, sizes, lengths, both_ways, balance, two_drafts,
        conditioning,
    ]  # fmt: skip
    return [make(all_results) for make in makers]


def rank_sweeps(all_results: Sequence[Results], frozen: bool | None = None) -> list[Results]:
    """Those in which rank varies and is compared with rank 1, on a frozen trunk or from scratch."""
    found = [r for r in all_results if r.varies(RANK) and r.raw["reference"].get(RANK) == 1]
    return [r for r in found if frozen is None or r.frozen == frozen]


def above_one(results: Results) -> list[tuple[Any, ...]]:
    """The points that are not their own reference."""
    return [
        point for point in results.points if results.reference(point) != point and results.of(results.reference(point))
    ]


def _undecided(title: str, what: str) -> Claim:
    return Claim(title, "undecided", f"There are no data: {what.rstrip('.')}.")


def _judge(good: Sequence[bool | None]) -> Verdict:
    """By data set: whether the claim holds there; None where there is too little to tell."""
    known = [value for value in good if value is not None]
    if not known or len(known) < len(good):
        return "undecided"
    return "confirmed" if all(known) else "not confirmed"


def _best(
    results: Results, reading: str, metric: Metric, lower: bool, **how: Any
) -> tuple[tuple[Any, ...], Estimate] | None:
    """The point of the best difference to its reference."""
    found = [(point, e) for point in above_one(results) if (e := compare(results, point, reading, metric, **how))]
    if not found:
        return None
    return min(found, key=lambda at: at[1].mean) if lower else max(found, key=lambda at: at[1].mean)


def _some(results: Results, reading: str, metric: Metric, lower: bool) -> bool | None:
    """Whether a point's interval lies wholly on one side of 0."""
    found = [e for point in above_one(results) if (e := compare(results, point, reading, metric))]
    if not found or all(math.isnan(e.low) for e in found):
        return None
    return any(e.high < 0 if lower else e.low > 0 for e in found)


def _by_reading(all_results: Sequence[Results], metric: Metric, unit: str) -> str:
    """A table of differences to the reference: a row for each point, a column for each reading."""
    rows = []
    for results in all_results:
        for point in results.points:
            own = estimate(results, point, "steps", metric)
            cells = [compare(results, point, reading, metric) for reading in READINGS]
            if own is None:
                continue
            same = results.reference(point) == point
            texts = ["reference" if same else "-" if e is None else e.signed for e in cells]
            rows.append([results.label, results.text(point), str(own), *texts, own.how])
    header = [
        "sweep",
        "run",
        f"{unit}, equal steps",
        *(f"difference, {text}" for text in READINGS.values()),
        "interval over",
    ]
    return markdown_table(header, rows)


def _sources(all_results: Sequence[Results]) -> list[str]:
    return [f"`{results.raw['command']}`" for results in all_results]


def lower_loss(all_results: Sequence[Results]) -> Claim:
    """Rank lowers the joint loss."""
    title, found = "Rank above 1 lowers the joint loss", rank_sweeps(all_results)
    if not found:
        return _undecided(title, "no sweep over head.rank")
    parts = []
    for results in found:
        for reading in ("steps", "seconds"):
            best = _best(results, reading, joint_loss, True)
            if best:
                parts.append(
                    f"{results.label}, {READINGS[reading]}: {best[1].signed} nats with {results.text(best[0])}"
                )
    verdict = _judge([_some(results, "seconds", joint_loss, True) for results in found])
    text = "Held-out loss of a whole window, the best rank against rank 1. " + "; ".join(parts) + "."
    return Claim(title, verdict, text, _by_reading(found, joint_loss, "joint loss"), _sources(found))


def more_acceptance(all_results: Sequence[Results]) -> Claim:
    """Rank raises acceptance."""
    title, found = "Rank above 1 raises acceptance", rank_sweeps(all_results)
    if not found:
        return _undecided(title, "no sweep over head.rank")
    metric, parts = tokens_per_forward(MAIN_T), []
    for results in found:
        for temperature in (0.0, MAIN_T, 1.0):
            best = _best(results, "steps", tokens_per_forward(temperature), False)
            if best:
                own = estimate(results, best[0], "steps", tokens_per_forward(temperature))
                parts.append(
                    f"{results.label}, T = {temperature:g}: {own} with {results.text(best[0])}, {best[1].signed}"
                )
    verdict = _judge([_some(results, "seconds", metric, False) for results in found])
    text = (
        "Tokens per forward with W-1 drafts, the best rank and its difference to rank 1 at equal steps: "
        f"{'; '.join(parts)}. "
        f"The table has T = {MAIN_T:g} in all three readings. A third party's reproduction on a frozen 1.8B model "
        "found a "
        "lower loss and no gain; there the drafts' first token competed with the model's own head, and here it is the "
        "model's own token that the head is conditioned on."
    )
    return Claim(title, verdict, text, _by_reading(found, metric, "tokens per forward"), _sources(found))


def first_token(all_results: Sequence[Results]) -> Claim:
    """The first token's loss does not depend on rank."""
    title, found = "The loss of the first token does not depend on rank", rank_sweeps(all_results, frozen=False)
    constant = "On a frozen trunk with its own head it is the same for all ranks by construction."
    if not found:
        return _undecided(title, f"no sweep over head.rank from scratch. {constant}")
    parts, same = [], []
    for results in found:
        points = above_one(results)
        differences = [e for point in points if (e := compare(results, point, "steps", first_token_loss))]
        parts += [f"{results.text(point)} {e.signed}" for point, e in zip(points, differences, strict=False)]
        same.append(all(e.low <= 0 <= e.high for e in differences) if differences else None)
    text = f"From scratch, against rank 1 at equal steps, in nats: {'; '.join(parts)}. {constant}"
    return Claim(title, _judge(same), text, _by_reading(found, first_token_loss, "first-token loss"), _sources(found))


def faster(all_results: Sequence[Results]) -> Claim:
    """Generation is faster than with rank 1."""
    title, found = "Rank above 1 speeds up the generation of text and code", rank_sweeps(all_results)
    if not found:
        return _undecided(title, "no sweep over head.rank")
    rows, good, parts = [], [], []
    for results in found:
        best: tuple[float, str] | None = None
        sure: list[bool] = []
        for point in results.points:
            own = [s for run in results.of(point) if (s := speedup(run, "seconds", MAIN_T))]
            ratios = [speed_ratio(results, point, reading, MAIN_T) for reading in READINGS]
            if not own:
                continue
            at_clock = ratios[list(READINGS).index("seconds")]
            if at_clock and results.reference(point) != point:
                if not math.isnan(at_clock.low):  # of one seed there is no interval
                    sure.append(at_clock.low > 1)
                best = max(best or (0.0, ""), (at_clock.mean, f"{_ratio(at_clock)} with {results.text(point)}"))
            rows.append([
                results.label, results.text(point), f"{np.mean([s for s, _ in own]):.2f}x", f"{own[0][1]}",
                *("reference" if results.reference(point) == point else _ratio(e) for e in ratios),
            ])  # fmt: skip
        good.append(any(sure) if sure else None)
        if best:
            parts.append(f"{results.label}: {best[1]}")
            if results.frozen and "code" in results.raw["sweep"]:
                met = "is met" if best[0] >= BAR else "is not met"
                parts[-1] += f" (the project's own bar, {BAR:.2f}x on code, {met})"
    text = (
        f"Tokens/s at T = {MAIN_T:g}, batch 1, each rank at its best k, over rank 1 at its best k: the tokens per "
        "iteration of each run, over what an iteration takes, which is measured for all ranks in one process, in turn. "
        f"At equal wall-clock: {'; '.join(parts)}."
    )
    header = [
        "sweep",
        "run",
        "over plain decoding, equal wall-clock",
        "best k",
        *(f"over rank 1, {t}" for t in READINGS.values()),
    ]
    return Claim(title, _judge(good), text, markdown_table(header, rows), _sources(found))


def _ratio(e: Estimate | None) -> str:
    if e is None:
        return "-"
    return f"{e.mean:.3f}x" + ("" if math.isnan(e.low) else f" [{e.low:.3f}, {e.high:.3f}]")


def low_overhead(all_results: Sequence[Results]) -> Claim:
    """Training and decoding cost little more."""
    title, found = "The overhead of rank is low", rank_sweeps(all_results)
    if not found:
        return _undecided(title, "no sweep over head.rank")
    rows, good = [], []
    for results in found:
        steps = []
        for point in results.points:
            cost, seconds = results.of(point)[0].raw["cost"], iteration_seconds(results.of(point)[0], MAIN_T)
            plain, other = cost["over_next_token"], cost["over_reference"]
            if results.reference(point) != point:
                steps.append(other["measured"])
            rows.append([
                results.label, results.text(point), f"{plain['predicted']:.2f}", f"{plain['measured']:.2f}",
                f"{other['predicted']:.2f}", f"{other['measured']:.2f}", f"{cost['peak_bytes'] / 2**20:,.0f}",
                f"{seconds[max(seconds)] / seconds[0]:.2f}" if seconds else "-",
            ])  # fmt: skip
        good.append(min(steps) <= 1.25 if steps else None)
    over = "step / next-token step, predicted", "measured", "step / rank-1 step, predicted", "measured"
    header = ["sweep", "run", *over, "peak MiB", f"verify cost, k = W-1, T = {MAIN_T:g}"]
    text = (
        "Low is taken to mean that some rank above 1 costs at most a quarter more per training step than rank 1; it "
        "grows "
        "with rank, as the table says. Predictions are in FLOPs. The next-token step trains the whole trunk, so a "
        "frozen "
        "one is cheaper than it."
    )
    return Claim(title, _judge(good), text, markdown_table(header, rows), _sources(found))


def sizes(all_results: Sequence[Results]) -> Claim:
    """It holds across model sizes."""
    title = "What rank gives holds across model sizes"
    metric, rows, good, used = tokens_per_forward(MAIN_T), [], [], []
    by_data: dict[str, set[int]] = {}
    for results in rank_sweeps(all_results, frozen=True):
        data = results.runs[0].raw["config"]["data"]
        by_data.setdefault(data["source"], set()).update(run.raw["config"]["model"]["d_model"] for run in results.runs)
    for results in rank_sweeps(all_results, frozen=True):
        if len(by_data[results.runs[0].raw["config"]["data"]["source"]]) < 2:
            continue
        used.append(results)
        for point in above_one(results):
            model = results.of(point)[0].raw["config"]["model"]
            loss, kept = (compare(results, point, "seconds", m) for m in (joint_loss, metric))
            if loss and kept:
                rank = results.of(point)[0].head["rank"]
                size = f"{model['num_layers']} x {model['d_model']}"
                rows.append((model["d_model"], rank, [results.label, size, f"{rank}", loss.signed, kept.signed]))
                good.append((rank, loss.high < 0 and kept.low > 0))
    if not rows:
        return _undecided(title, "no ranks on frozen trunks of two sizes over the same data")
    # The ranks that every size has.
    shared = set.intersection(*({rank for d, rank, _ in rows if d == size} for size in {d for d, _, _ in rows}))
    table = markdown_table(
        ["sweep", "layers x width", "R", "joint loss over rank 1", "tokens per forward over rank 1"],
        [cells for d, rank, cells in sorted(rows, key=lambda row: row[:2]) if rank in shared],
    )
    verdict = _judge([ok for rank, ok in good if rank in shared] or [None])
    text = f"At equal wall-clock, T = {MAIN_T:g}, ranks that every size has; confirmed if all gain in both columns."
    return Claim(title, verdict, text, table, _sources(used))


def lengths(all_results: Sequence[Results]) -> Claim:
    """It holds as training goes on."""
    title, metric = "What rank gives holds as training goes on", tokens_per_forward(MAIN_T)
    found = [r for r in rank_sweeps(all_results) if any("quarter" in run.raw["readings"] for run in r.runs)]
    if not found:
        return _undecided(title, "no sweep with readings after a quarter and a half of the steps")
    rows, good = [], []
    for results in found:
        for point in above_one(results):
            cells = [compare(results, point, reading, metric) for reading in ("quarter", "half", "steps")]
            losses = [compare(results, point, reading, joint_loss) for reading in ("quarter", "half", "steps")]
            if all(cells) and all(losses):
                rows.append([results.label, results.text(point), *(e.signed for e in losses + cells if e)])
        last = [compare(results, point, "steps", metric) for point in above_one(results)]
        best = max((e for e in last if e), key=lambda e: e.mean, default=None)
        good.append(None if best is None else best.low > 0)
    header = ["sweep", "run", *(f"joint loss, {n}" for n in ("quarter", "half", "whole")),
              *(f"tokens per forward, {n}" for n in ("quarter", "half", "whole"))]  # fmt: skip
    text = "Differences to rank 1 after a quarter, a half and all of the steps, at a constant learning rate."
    return Claim(title, _judge(good), text, markdown_table(header, rows), _sources(found))


def both_ways(all_results: Sequence[Results]) -> Claim:
    """It works from scratch and with heads on a frozen trunk."""
    title, metric = "It works from scratch and with heads on a frozen trunk", tokens_per_forward(MAIN_T)
    kinds = {
        "frozen trunk": rank_sweeps(all_results, frozen=True),
        "from scratch": rank_sweeps(all_results, frozen=False),
    }
    if not all(kinds.values()):
        missing = " and ".join(kind for kind, found in kinds.items() if not found)
        return _undecided(title, f"no sweep over head.rank, {missing}")
    good, parts = [], []
    for kind, found in kinds.items():
        for results in found:
            loss, kept = _some(results, "steps", joint_loss, True), _some(results, "steps", metric, False)
            good.append(None if None in (loss, kept) else bool(loss and kept))
            parts.append(f"{results.label}, {kind}: the joint loss {'falls' if loss else 'does not surely fall'} and "
                         f"tokens per forward {'rise' if kept else 'do not surely rise'}")  # fmt: skip
    text = (
        "At equal steps, some rank above 1 against rank 1. "
        + "; ".join(parts)
        + ". From scratch each rank has a law of its own."
    )
    return Claim(title, _judge(good), text, "", _sources([r for found in kinds.values() for r in found]))


def balance(all_results: Sequence[Results]) -> Claim:
    """Load balancing is needed."""
    title, metric = "Without load balancing the components collapse, and balancing helps", tokens_per_forward(MAIN_T)
    found = [r for r in all_results if len({(run.head["balance"], run.head["balance_weight"]) for run in r.runs}) > 1]
    if not found:
        return _undecided(title, "no sweep over head.balance")
    rows, good = [], []
    for results in found:
        collapsed, helped = False, []
        for point in results.points:
            runs = results.of(point)
            gate = [f["gate"]["effective"] for run in runs if (f := run.at("steps"))]
            loss, kept = (compare(results, point, "steps", m) for m in (joint_loss, metric))
            head = runs[0].head
            if head["balance"] == "none":
                collapsed |= float(np.mean(gate)) < 1.5
            elif loss and kept:
                helped.append(loss.high < 0 and kept.low > 0)
            same = results.reference(point) == point
            rows.append([
                results.label, results.text(point), f"{np.mean(gate):.2f} of {head['rank']}",
                str(estimate(results, point, "steps", joint_loss)), "reference" if same or not loss else loss.signed,
                "reference" if same or not kept else kept.signed,
            ])  # fmt: skip
        good.append((collapsed and any(helped)) if helped else None)
    header = ["sweep", "run", "effective components", "joint loss", "over none", "tokens per forward over none"]
    text = (
        f"Equal steps, T = {MAIN_T:g}. Confirmed if the effective number of components without balancing is below "
        "1.5 and "
        "some balancing lowers the loss and raises tokens per forward; a component that is used is not yet of use."
    )
    return Claim(title, _judge(good), text, markdown_table(header, rows), _sources(found))


def two_drafts(all_results: Sequence[Results]) -> Claim:
    """About two drafts are accepted in code."""
    title = "About two drafts are accepted on average in code generation"
    found = [r for r in rank_sweeps(all_results) if "code" in r.raw["sweep"]]
    if not found:
        return _undecided(title, "no sweep over head.rank on code")
    rows, good = [], []
    for results in found:
        most = []
        for point in results.points:
            window = results.of(point)[0].head["window"]
            cells = [estimate(results, point, "steps", tokens_per_forward(t)) for t in (0.0, MAIN_T, 1.0)]
            rows.append(
                [
                    results.label,
                    results.text(point),
                    f"{window - 1}",
                    *("-" if e is None else f"{e.mean - 1:.2f}" for e in cells),
                ]
            )
            most += [e.high - 1 for e in cells if e]
        good.append(max(most) >= 2 if most else None)
    header = ["sweep", "run", "drafts", "accepted, T = 0", f"T = {MAIN_T:g}", "T = 1"]
    text = "Drafts accepted per forward at equal steps (second-hand: the paper's figure is known from its reviews)."
    return Claim(title, _judge(good), text, markdown_table(header, rows), _sources(found))


def conditioning(all_results: Sequence[Results]) -> Claim:
    """Conditioning on the target's token raises acceptance: not the paper's claim, ours."""
    title = "Conditioning the head on the token that the target chose raises acceptance (this project's addition)"
    rows: list[list[str]] = []
    good: list[bool | None] = []
    used: list[Results] = []
    for results in rank_sweeps(all_results):
        differences = []
        for point in results.points:
            runs = [run for run in results.of(point) if decoding(run, "steps", MAIN_T, "unconditioned")]
            if not runs:
                continue
            pairs = [tuple(decoding(run, "steps", MAIN_T, d)["tokens_per_forward"]["mean"]  # type: ignore[index]
                           for d in ("joint", "unconditioned")) for run in runs]  # fmt: skip
            gains = [a - b for a, b in pairs]
            e = _gain(runs, gains)
            rows.append(
                [results.label, results.text(point), *(f"{np.mean(v):.3f}" for v in zip(*pairs, strict=True)), e.signed]
            )
            if results.reference(point) != point:
                differences.append(e.low > 0)
        if differences:
            used.append(results)
            good.append(any(differences))
    if not rows:
        return _undecided(title, "no acceptance with drafts of both kinds")
    header = ["sweep", "run", "conditioned", "unconditioned", "difference"]
    text = f"Tokens per forward at T = {MAIN_T:g}, equal steps, of the same heads; rank 1 has nothing to condition."
    return Claim(title, _judge(good), text, markdown_table(header, rows), _sources(used))


def _gain(runs: Sequence[Run], gains: Sequence[float]) -> Estimate:
    if len(gains) > 1:
        return over_seeds(list(gains))
    units = [tokens_per_forward(MAIN_T, draft)(runs[0], "steps") for draft in ("joint", "unconditioned")]
    return over_units(units[0], units[1], lambda own, other: own - other)  # type: ignore[arg-type]
