"""Claims of the paper (arXiv 2410.17765), each with the evidence of the results files and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments.claims.claim import MAIN_T, TOKENS_T, Claim, above, over_text, ratio_text, signed, undecided
from experiments.claims.data import RANK, Point, RankResults, above_one, differences, first_token_loss, rank_sweeps
from experiments.claims.rates import speed_ratio
from experiments.claims.speed import faster, low_overhead
from experiments.claims.verdict import LOSS, TOKENS, both, equal, holds, judge, negative
from mtp_jax.plots import markdown_table
from mtp_jax.sweep.compare import Metric, compare, decoding, estimate, joint_loss, over, tokens_per_forward
from mtp_jax.sweep.results import READINGS

WHOLE = 0.97  # of the steps, FLOPs or seconds that a reading is to be equal in
COLLAPSED = 1.5  # effective components
HELPS = {True: "balancing helps", False: "balancing does not help", None: "whether balancing helps is undecided"}


def claims(all_results: Sequence[RankResults]) -> list[Claim]:
    """All claims, in the order of the page."""
    makers: list[Callable[[Sequence[RankResults]], Claim]] = [
        lower_loss, more_acceptance, first_token, faster, low_overhead, sizes, lengths, both_ways, balance, two_drafts,
        conditioning,
    ]  # fmt: skip
    return [make(all_results) for make in makers]


def falls(results: RankResults, reading: str) -> bool | None:
    """Whether the joint loss falls."""
    return holds([negative(e) for e in differences(results, reading, joint_loss)], LOSS)


def rises(results: RankResults, reading: str) -> bool | None:
    """Whether tokens per forward rise."""
    return holds(differences(results, reading, TOKENS_T), TOKENS)


def _by_reading(found: Sequence[RankResults], metric: Metric, unit: str) -> str:
    """A table of differences to the reference: a row for each point, a column for each reading."""
    rows = []
    for results in found:
        for point in results.points:
            own = estimate(results, point, "steps", metric)
            if own is not None:
                cells = [_with_share(results, point, reading, metric) for reading in READINGS]
                rows.append([results.label, results.text(point), f"{own:.3f}", *cells, own.how])
    over_reference = (f"difference, {text}" for text in READINGS.values())
    return markdown_table(["sweep", "run", f"{unit}, equal steps", *over_reference, "interval over"], rows)


def _with_share(results: RankResults, point: Point, reading: str, metric: Metric) -> str:
    """The difference, and what part of its share the reading gives a run where the checkpoint is much earlier."""
    e = compare(results, point, reading, metric)
    if e is None or results.reference(point) == point:
        return over_text(results, point, e)
    share = results.share(point, reading)
    return signed(e) + (f" ({share:.0%} of it)" if share is not None and share < WHOLE else "")


def lower_loss(all_results: Sequence[RankResults]) -> Claim:
    """Rank lowers the joint loss."""
    title, found = "Rank above 1 lowers the joint loss", rank_sweeps(all_results)
    if not found:
        return undecided(title, "no sweep over rank on a frozen trunk")
    verdict = judge([falls(results, "seconds") for results in found])
    text = "Held-out loss of a whole window, in nats, against rank 1."
    return Claim(title, verdict, text, _by_reading(found, joint_loss, "joint loss"), found)


def more_acceptance(all_results: Sequence[RankResults]) -> Claim:
    """Rank raises acceptance."""
    title, found = "Rank above 1 raises acceptance", rank_sweeps(all_results)
    if not found:
        return undecided(title, "no sweep over rank on a frozen trunk")
    verdict = judge([rises(results, "seconds") for results in found])
    text = (
        f"Tokens per forward with W-1 drafts at T = {MAIN_T:g}, against rank 1 (the figure has T = 0 and 1 too; greedy "
        "text of small models is mostly repetition, so nothing is judged by it). A third party's reproduction on a "
        "frozen 1.8B model found a lower loss and no gain; its first draft was the head's own guess of the next token, "
        "and here it is the token that the target chose. Whether that is why has not been tested."
    )
    return Claim(title, verdict, text, _by_reading(found, TOKENS_T, "tokens per forward"), found)


def first_token(all_results: Sequence[RankResults]) -> Claim:
    """The first token's loss does not depend on rank."""
    title, found = "The loss of the first token does not depend on rank", rank_sweeps(all_results, frozen=False)
    constant = "On a frozen trunk with its own head it is the same for all ranks by construction"
    if not found:
        return undecided(title, f"no sweep over rank from scratch. {constant}")
    verdict = judge([equal(differences(results, "steps", first_token_loss), LOSS) for results in found])
    text = (
        f"From scratch, in nats; confirmed if no rank differs from rank 1 by {LOSS:g} at equal steps, with intervals "
        f"widened for the number of ranks. {constant}."
    )
    return Claim(title, verdict, text, _by_reading(found, first_token_loss, "first-token loss"), found)


def sizes(all_results: Sequence[RankResults]) -> Claim:
    """It holds across model sizes."""
    title = "What rank gives holds across model sizes"
    by_rank: dict[Any, dict[int, tuple[RankResults, Point]]] = {}
    alike: dict[Any, set[int]] = {}
    for results in all_results:
        for point in above_one(results) if results.frozen and results.raw["reference"] == {RANK: 1} else []:
            config = results.of(point)[0].raw["config"]
            head, width = config["head"], config["model"]["d_model"]
            like = (
                *(config["data"][name] for name in ("source", "seq_len", "batch_size")),
                *(head[name] for name in ("window", "factors", "balance", "balance_weight")),
                *(config["steps"], config["optimizer"]["learning_rate"]),
            )
            by_rank.setdefault((*like, head["rank"]), {}).setdefault(width, (results, point))
            alike.setdefault(like, set()).add(width)
    # Ranks that differ from rank 1 in all sizes of otherwise the same runs.
    cells = [
        (width, key[-1], *where)
        for key, of in by_rank.items()
        if len(of) > 1 and of.keys() == alike[key[:-1]]
        for width, where in of.items()
    ]
    if not cells:
        return undecided(title, "no ranks on frozen trunks of two sizes, all else being equal")
    rows, good = [], []
    for width, rank, results, point in sorted(cells, key=lambda cell: cell[:2]):
        loss, kept = (compare(results, point, "seconds", metric) for metric in (joint_loss, TOKENS_T))
        layers = results.of(point)[0].raw["config"]["model"]["num_layers"]
        speed = speed_ratio(results, point, "seconds", MAIN_T)
        rows.append([results.label, f"{layers} x {width}", f"{rank}", signed(loss), signed(kept), ratio_text(speed)])
        good.append(both(holds([negative(loss)], LOSS), holds([kept], TOKENS)))  # all must hold
    units = "joint loss", "tokens per forward", "tokens per second"
    header = ["sweep", "layers x width", "R", *(f"{unit} over rank 1" for unit in units)]
    text = (
        f"At T = {MAIN_T:g}, the ranks that every size has, each against rank 1 on the machine of its own sweep; "
        "confirmed for these sizes if all gain in loss and acceptance. Speeds are each at its best k; they depend on "
        "the machine and on the factors, and nothing is judged by them here."
    )
    return Claim(title, judge(good), text, markdown_table(header, rows), _unique(cell[2] for cell in cells))


def lengths(all_results: Sequence[RankResults]) -> Claim:
    """It holds as training goes on."""
    title, readings = "What rank gives holds as training goes on", ("quarter", "half", "steps")
    found = [r for r in rank_sweeps(all_results) if any("quarter" in run.raw["readings"] for run in r.runs)]
    if not found:
        return undecided(title, "no sweep over rank with readings after a quarter and a half of the steps")
    verdict = judge([both(falls(results, r), rises(results, r)) for results in found for r in readings])
    rows = [
        [
            results.label,
            results.text(point),
            *(signed(compare(results, point, r, m)) for m in (joint_loss, TOKENS_T) for r in readings),
        ]
        for results in found
        for point in above_one(results)
    ]
    header = [
        f"{unit}, {part}" for unit in ("joint loss", "tokens per forward") for part in ("quarter", "half", "whole")
    ]
    text = "Differences to rank 1 after a quarter, a half and all of the steps; confirmed if both hold at each length."
    return Claim(title, verdict, text, markdown_table(["sweep", "run", *header], rows), found)


def both_ways(all_results: Sequence[RankResults]) -> Claim:
    """It works from scratch and with heads on a frozen trunk."""
    title = "It works from scratch and with heads on a frozen trunk"
    kinds = {"frozen trunk": rank_sweeps(all_results), "from scratch": rank_sweeps(all_results, frozen=False)}
    if not all(kinds.values()):
        missing = " and ".join(kind for kind, found in kinds.items() if not found)
        return undecided(title, f"no sweep over rank, {missing}")
    words, rows, good = {True: "holds", False: "fails", None: "undecided"}, [], []
    for kind, found in kinds.items():
        for results in found:
            loss, kept = falls(results, "steps"), rises(results, "steps")
            good.append(both(loss, kept))
            rows.append([results.label, kind, words[loss], words[kept]])
    text = "Some rank above 1 against rank 1, at equal steps. From scratch each rank has a law of its own."
    table = markdown_table(["sweep", "trunk", "the joint loss falls", "tokens per forward rise"], rows)
    return Claim(title, judge(good), text, table, [results for found in kinds.values() for results in found])


def balance(all_results: Sequence[RankResults]) -> Claim:
    """Load balancing is needed."""
    title = "Without load balancing the components collapse, and balancing helps"
    found = [results for results in all_results if results.over_balance]
    if not found:
        return undecided(title, "no sweep over head.balance")
    rows, good, where = [], [], []
    for results in found:
        effective = {
            point: float(np.mean([f["gate"]["effective"] for run in results.of(point) if (f := run.at("steps"))]))
            for point in results.points
        }
        plain = [point for point in results.points if results.of(point)[0].head["balance"] == "none"]
        collapsed = any(effective[point] < COLLAPSED for point in plain)
        tests = len(above_one(results))
        helps = [
            both(
                holds([negative(compare(results, point, "steps", joint_loss))], LOSS, tests),
                holds([compare(results, point, "steps", TOKENS_T)], TOKENS, tests),
            )
            for point in above_one(results)
        ]
        helped = True if True in helps else False if helps and set(helps) == {False} else None
        good.append(both(collapsed, helped))
        collapse = "collapse" if collapsed else "do not collapse"
        where.append(f"In {results.label} the components {collapse} without balancing, and {HELPS[helped]}.")
        for point in results.points:
            cells = (over_text(results, point, compare(results, point, "steps", m)) for m in (joint_loss, TOKENS_T))
            rank = results.of(point)[0].head["rank"]
            loss = estimate(results, point, "steps", joint_loss)
            own = f"{loss:.3f}" if loss else "-"
            rows.append([results.label, results.text(point), f"{effective[point]:.2f} of {rank}", own, *cells])
    header = ["sweep", "run", "effective components", "joint loss", "over none", "tokens per forward over none"]
    text = (
        f"Equal steps, T = {MAIN_T:g}. Confirmed if fewer than {COLLAPSED:g} components are in effect without "
        "balancing and some balancing lowers the loss and raises tokens per forward; a component that is used is not "
        f"yet of use. {' '.join(where)}"
    )
    return Claim(title, judge(good), text, markdown_table(header, rows), found)


def two_drafts(all_results: Sequence[RankResults]) -> Claim:
    """About two drafts are accepted in code."""
    title = "About two drafts are accepted on average in code generation"
    found = [results for results in rank_sweeps(all_results) if results.is_code]
    if not found:
        return undecided(title, "no sweep over rank on code")
    rows, good = [], []
    for results in found:
        kept = {point: estimate(results, point, "steps", TOKENS_T) for point in results.points}
        good.append(holds([above(e, 3) for e in kept.values() if e], 0))
        for point in results.points:
            window = results.of(point)[0].head["window"]
            cells = [estimate(results, point, "steps", tokens_per_forward(t)) for t in (0.0, MAIN_T, 1.0)]
            accepted = ("-" if e is None else f"{e.mean - 1:.2f}" for e in cells)
            rows.append([results.label, results.text(point), f"{window - 1}", *accepted])
    header = ["sweep", "run", "drafts", "accepted, T = 0", f"T = {MAIN_T:g}", "T = 1"]
    text = (
        f"Drafts accepted per forward at equal steps; judged at T = {MAIN_T:g}. The paper's figure is known "
        "second-hand, from its reviews."
    )
    return Claim(title, judge(good), text, markdown_table(header, rows), found)


def conditioning(all_results: Sequence[RankResults]) -> Claim:
    """Conditioning on the target's token raises acceptance: not the paper's claim, ours."""
    title = "Conditioning the head on the token that the target chose raises acceptance (this project's addition)"
    rows, good, used = [], [], []
    for results in rank_sweeps(all_results):
        gains = []
        for point in results.points:
            runs = [run for run in results.of(point) if decoding(run, "steps", MAIN_T, "unconditioned")]
            units: list[Any] = [
                tuple(tokens_per_forward(MAIN_T, draft)(run, "steps") for draft in ("joint", "unconditioned"))
                for run in runs
            ]
            if units:
                e = over(units, lambda own, other: own - other, results.looks)
                means = [np.mean([a.sum() / b.sum() for a, b in of]) for of in zip(*units, strict=True)]
                rows.append(
                    [results.label, results.text(point), *(f"{mean:.3f}" for mean in means), f"{e:+.3f}", e.how]
                )
                gains += [e] if results.reference(point) != point else []
        if gains:
            used.append(results)
            good.append(holds(gains, TOKENS))
    if not rows:
        return undecided(title, "no acceptance with drafts of both kinds")
    header = ["sweep", "run", "conditioned", "unconditioned", "difference", "interval over"]
    text = f"Tokens per forward at T = {MAIN_T:g}, equal steps, of the same heads; rank 1 has nothing to condition."
    return Claim(title, judge(good), text, markdown_table(header, rows), used)


def _unique(found: Iterable[RankResults]) -> list[RankResults]:
    return list({results.path: results for results in found}.values())
