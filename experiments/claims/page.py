"""Page of the claims: verdicts, evidence claim by claim, figures with the commands that make them, a recommendation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims.claim import MAIN_T, TOKENS_T, Claim, ratio_text, signed
from experiments.claims.claims import WHOLE, claims
from experiments.claims.data import LOOKED_AGAIN, RankResults, above_one, all_rank_sweeps, load, rank_sweeps
from experiments.claims.figures import FIGURES, TEMPERATURES, component_rows
from experiments.claims.rates import speed_ratio, speedup
from experiments.claims.verdict import RULE
from mtp_jax.plots import markdown_table
from mtp_jax.sweep.compare import compare, decoding, joint_loss

PAGE = "report.md"
SHOWN = 4  # windows of each component


def write_page(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write `report.md` and `figures/*.png` into the directory `out`, and return the path of the page.

    Raises `ConfigError` if a file is not one of results.
    """
    all_results, directory = load(paths), Path(out)
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, drawing in FIGURES.items():
        if found := drawing.of(all_results):
            drawing.draw(found).savefig(directory / "figures" / f"{name}.png", dpi=150)
            drawn[name] = found
    command = f"python -m experiments.claims {' '.join(str(path) for path in paths)} --out {out}"
    page = directory / PAGE
    page.write_text(markdown(all_results, drawn, command))
    return page


def markdown(all_results: Sequence[RankResults], drawn: dict[str, list[RankResults]], command: str) -> str:
    """The text of the page; `drawn` are the figures that there are, with what each is of."""
    found = claims(all_results)
    sections = [
        "# Does rank pay",
        markdown_table(["claim", "verdict"], ([claim.title, f"**{claim.verdict}**"] for claim in found)),
        RULE,
        "## Recommendation",
        recommendation(all_results),
        "## Setting",
        _setting(all_results, command),
        "## Claim by claim",
        *(_claim(claim) for claim in found),
        "## Figures",
        *(_figure(name, of, command) for name, of in drawn.items()),
        "## Sweep by sweep",
        *(_answer(results) for results in all_results),
        *_examples(all_results),
        *_failed(all_results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _setting(all_results: Sequence[RankResults], command: str) -> str:
    rows = []
    for results in all_results:
        config, raw = results.runs[0].raw["config"], results.raw
        models = [run.raw["config"]["model"] for run in results.runs]
        shapes = dict.fromkeys(f"{m['num_layers']} x {m['d_model']}, V = {m['vocab_size']:,}" for m in models)
        steps = [
            row["verification_steps"]
            for run in results.runs
            for found in run.raw["measured"].values()
            for row in found["decoding"]
        ]
        machine, own = raw["machine"], [run.raw.get("versions", raw["versions"]) for run in results.runs]
        versions = dict.fromkeys(f"mtp_jax {of.get('commit', of.get('mtp_jax'))}, jax {of.get('jax')}" for of in own)
        rows.append([
            results.label, raw["title"], "; ".join(shapes),
            f"{config['data']['source']}, {config['data']['tokenizer']}".replace("|", "\\|"),
            _runs(results),
            f"{min(steps):,} to {max(steps):,}" if steps else "-",
            f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('device')}",
            "; ".join(versions),
        ])  # fmt: skip
    header = [
        "sweep",
        "question",
        "layers x width",
        "data",
        "runs",
        "verification steps of a cell",
        "machine",
        "versions",
    ]
    return "\n\n".join([
        "All losses and texts are of held-out documents. Runs are compared with the run of the same seed that the "
        "sweep names as its reference, at equal steps, at equal training FLOPs and at equal wall-clock of training: "
        "three checkpoints of one run at a constant learning rate, each the last saved one that gives no run more "
        "than the reference had, but for a hundredth (the tables of losses and acceptance say in brackets how much of "
        f"it that was, where it is less than {WHOLE:.0%}). Intervals are of 95%: Student's over the seeds' paired "
        "differences, and the "
        "bootstrap over the documents that the seeds share, added as variances; of one seed they say nothing of other "
        "seeds. Where the target is the frozen trunk's own head, all heads are asked to predict the same text; from "
        "scratch each run has its own. Where a run averages its weights (`ema_decay`), the averages are measured.",
        markdown_table(header, rows),
        *(
            f"In {results.label} the reference has another {', '.join(f'`{name}`' for name in results.besides_rank)} "
            "too, so rank is not all that differs."
            for results in all_rank_sweeps(all_results)
            if results.besides_rank
        ),
        *(
            f"{results.label} was looked at {results.looks} times: {'; '.join(LOOKED_AGAIN[results.raw['sweep']])}."
            for results in all_results
            if results.looks > 1
        ),
        f"Written by `{command}`.",
    ])  # fmt: skip


def _runs(results: RankResults) -> str:
    """How many there are, and of what: points of fewer seeds than others are easily taken for as sure."""
    points: dict[int, list[str]] = {}
    for point in results.points:
        points.setdefault(len(results.of(point)), []).append(results.text(point))
    seeds = (f"{n} seed{'s' * (n > 1)} of {' / '.join(of)}" for n, of in sorted(points.items(), reverse=True))
    return f"{len(results.runs)}: {'; '.join(seeds)}"


def _claim(claim: Claim) -> str:
    parts = [f"### {claim.title}: {claim.verdict}", claim.text, claim.table]
    if claim.sources:
        commands = dict.fromkeys(f"`{results.raw['command']}`" for results in claim.sources)
        parts.append(f"Runs: {', '.join(commands)}.")
    return "\n\n".join(part for part in parts if part)


def _figure(name: str, found: list[RankResults], command: str) -> str:
    caption, data = FIGURES[name].caption, ", ".join(dict.fromkeys(f"`{results.raw['command']}`" for results in found))
    return f"![{caption}](figures/{name}.png)\n\n*{caption}* Data: {data}; drawn by `{command}`."


def recommendation(all_results: Sequence[RankResults]) -> str:
    """The rank that decodes fastest at equal wall-clock of training, by data set: rank 1, if none is surely faster."""
    lines = []
    for results in rank_sweeps(all_results):
        ratios = {point: e for point in above_one(results) if (e := speed_ratio(results, point, "seconds", MAIN_T))}
        if not ratios:
            continue
        tests = max(1, sum(e.seeds > 1 for e in ratios.values()))
        widened = {point: e.interval(tests) for point, e in ratios.items()}
        sure = {point: e for point, e in ratios.items() if e.seeds > 1 and widened[point][0] > 1}
        point, e = max((sure or ratios).items(), key=lambda at: at[1].mean)
        low, high = widened[point]
        best = point if sure else results.reference(point)
        found = f"{results.text(point)} has {e.mean:.3f}x [{low:.3f}, {high:.3f}] its tokens per second ({e.how})"
        reference = results.text(results.reference(point))
        lines.append(f"* {results.label}: {results.text(best)} ({_head(results, best)}). Beside {reference}, {found}.")
    if not lines:
        return "No sweep over rank has timed decoding; there is nothing to recommend yet."
    how = (
        f"The rank that decodes fastest at T = {MAIN_T:g} for the same wall-clock of training, and R = 1 where no "
        "other is surely faster (intervals widened for the number of ranks):"
    )
    return "\n".join([how, "", *lines])


def _head(results: RankResults, point: tuple[Any, ...]) -> str:
    head = results.of(point)[0].head
    width = ["factor_width"] if head["factors"] in ("lowrank", "lora") else []
    names = "window", "rank", "factors", *width, "target", "balance", "balance_weight", "init_noise"
    return ", ".join(f"`{name}` {head[name]}" for name in names if name in head)


def _answer(results: RankResults) -> str:
    """All that was measured of each point of a sweep at the end of its runs, as means over seeds."""
    rows = []
    for point in results.points:
        ends = [end for run in results.of(point) if (end := run.at("steps"))]
        kept = {t: [row for run in results.of(point) if (row := decoding(run, "steps", t))] for t in TEMPERATURES}
        over_plain = speedup(results, point, "steps", MAIN_T)
        rows.append([
            results.text(point),
            f"{len(ends)}",
            *(_mean([end["loss"][name]["mean"] for end in ends], 3) for name in ("joint", "first_token")),
            _mean([[e["mean"] for e in end["loss"]["offsets"]] for end in ends]),
            *(_mean([end["gate"][name] for end in ends if "gate" in end]) for name in ("effective", "entropy")),
            *(_mean([row["tokens_per_forward"]["mean"] for row in rows_T], 3) for rows_T in kept.values()),
            _mean([[e["mean"] for e in row["acceptance"]] for row in kept[MAIN_T]]),
            f"{over_plain:.2f}" if over_plain else "-",
            f"{1e3 * results.of(point)[0].raw['cost']['seconds']:.0f}",
        ])  # fmt: skip
    header = ["joint loss", "first token", "by offset", "components in effect", "gate entropy"]
    header += [f"tokens per forward, T = {t:g}" for t in TEMPERATURES]
    header += [f"kept by offset, T = {MAIN_T:g}", f"tokens/s over plain, T = {MAIN_T:g}", "step, ms"]
    text = f"{results.raw['title']} Means over the seeds of each run, at its end; speeds as in the claim about them."
    parts = [f"### {results.label}", text, markdown_table(["run", "seeds", *header], rows)]
    return "\n\n".join([*parts, *_over_reference(results), _by_offset(results)])


def _over_reference(results: RankResults) -> list[str]:
    """Differences to the reference, whatever the sweep asks."""
    rows = []
    for point in above_one(results):
        loss = compare(results, point, "steps", joint_loss)
        kept = [compare(results, point, reading, TOKENS_T) for reading in ("steps", "seconds")]
        ratio = speed_ratio(results, point, "seconds", MAIN_T)
        against = results.text(results.reference(point))
        rows.append(
            [results.text(point), against, *map(signed, (loss, *kept)), ratio_text(ratio), loss.how if loss else "-"]
        )
    header = ["run", "against", "joint loss", "tokens per forward", "at equal wall-clock", "tokens/s, equal wall-clock"]
    return [f"Against its reference, T = {MAIN_T:g}, at equal steps where nothing else is said:",
            markdown_table([*header, "interval over"], rows)] if rows else []  # fmt: skip


def _by_offset(results: RankResults) -> str:
    """Losses and kept drafts by offset, with their intervals."""
    rows = []
    for point in results.points:
        ends = [end for run in results.of(point) if (end := run.at("steps"))]
        rows.append([results.text(point), "loss", _intervals([end["loss"]["offsets"] for end in ends])])
        for t in TEMPERATURES:
            kept = [row["acceptance"] for run in results.of(point) if (row := decoding(run, "steps", t))]
            rows.append([results.text(point), f"kept, T = {t:g}", _intervals(kept)])
    text = (
        "Held-out loss in nats and share of drafts kept, offset by offset, at the end of the runs: means over the "
        "seeds, and intervals of 95% over the documents of one seed, on average."
    )
    return f"{text}\n\n{markdown_table(['run', 'what', 'by offset'], rows)}"


def _intervals(found: Sequence[Sequence[Mapping[str, float]]]) -> str:
    """Of lists of numbers with intervals, one for each seed, entry by entry."""
    means = [{key: np.mean([e[key] for e in of]) for key in ("mean", "low", "high")} for of in zip(*found, strict=True)]
    return ", ".join(f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in means) or "-"


def _mean(values: Sequence[Any], digits: int = 2) -> str:
    """Of numbers, or of lists of them, entry by entry."""
    if not len(values):
        return "-"
    return " ".join(f"{mean:.{digits}f}" for mean in np.atleast_1d(np.mean(values, axis=0)))


def _examples(all_results: Sequence[RankResults]) -> list[str]:
    """Windows of text that components are responsible for, of the highest rank of each sweep that has them."""
    found = []
    for results in rank_sweeps(all_results):
        rows = {point: of for point in results.points if len(of := component_rows(results, point)) > 1}
        if not rows:
            continue
        point = max((p for p in rows if len(rows[p]) <= 8), key=lambda p: len(rows[p]), default=next(iter(rows)))
        of = rows[point]
        table = [
            [
                str(index + 1),
                f"{part['share']:.2f}",
                " ".join(f"{_code(text)} {lift:.1f}x" for text, lift in part["windows"][:SHOWN]),
            ]
            for index, part in sorted(enumerate(of), key=lambda at: -at[1]["share"])
        ]
        found.append(
            f"## What the components of {results.label}, {results.text(point)}, specialise in\n\n"
            "The windows of held-out text that a component's posterior prefers, by mass times log lift: how much "
            "likelier the "
            "component is there than on average. Spaces are shown as \u2423, new lines as \u21b5.\n\n"
            + markdown_table(["component", "share", "windows"], table)
        )
    return found


def _code(text: str) -> str:
    shown = text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5").replace("|", "\\|")
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def _failed(all_results: Sequence[RankResults]) -> list[str]:
    rows = [[results.label, name, error] for results in all_results for name, error in results.failed.items()]
    return ["## Runs that failed", markdown_table(["sweep", "run", "error"], rows)] if rows else []
