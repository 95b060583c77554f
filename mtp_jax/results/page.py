"""The page: verdicts, claims with their evidence, figures with the commands that make them, a recommendation."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_jax.report import markdown_table
from mtp_jax.results.claims import MAIN_T, RULE, Claim, claims, rank_sweeps
from mtp_jax.results.compare import speed_ratio
from mtp_jax.results.figures import FIGURES, component_rows
from mtp_jax.results.load import Results, load_results

PAGE = "report.md"
SHOWN = 4  # windows of each component


def write_page(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write `report.md` and `figures/*.png` into the directory `out`, and return the path of the page.

    Raises `ConfigError` if a file is not one of results.
    """
    all_results, directory = load_results(paths), Path(out)
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (draw, caption) in FIGURES.items():
        figure = draw(all_results)
        if figure is not None:
            figure.savefig(directory / "figures" / f"{name}.png", dpi=150)
            drawn[name] = caption
    command = f"mtp-jax report {' '.join(str(path) for path in paths)} --out {out}"
    page = directory / PAGE
    page.write_text(markdown(all_results, drawn, command))
    return page


def markdown(all_results: Sequence[Results], drawn: dict[str, str], command: str) -> str:
    """The text of the page; `drawn` are the figures that there are, with their captions."""
    found = claims(all_results)
    sections = [
        "# What rank gives",
        _setting(all_results, command),
        "## Verdicts",
        markdown_table(["claim", "verdict"], ([claim.title, f"**{claim.verdict}**"] for claim in found)),
        RULE,
        "## Recommendation",
        recommendation(all_results),
        "## Claim by claim",
        *(_claim(claim) for claim in found),
        "## Figures",
        *(_figure(name, caption, all_results, command) for name, caption in drawn.items()),
        *_examples(all_results),
        *_failed(all_results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _setting(all_results: Sequence[Results], command: str) -> str:
    rows = []
    for results in all_results:
        config, raw = results.runs[0].raw["config"], results.raw
        model = config["model"]
        steps = [
            row["verification_steps"]
            for run in results.runs
            for found in run.raw["measured"].values()
            for row in found["decoding"]
        ]
        machine, versions = raw["machine"], raw["versions"]
        rows.append([
            results.label, raw["title"], f"{model['num_layers']} x {model['d_model']}, V = {model['vocab_size']:,}",
            f"{config['data']['source']}, {config['data']['tokenizer']}".replace("|", "\\|"),
            f"{len(results.runs)}, seeds {', '.join(map(str, results.seeds))}",
            f"{min(steps):,} to {max(steps):,}" if steps else "-",
            f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('device')}",
            f"mtp_jax {versions.get('commit', versions.get('mtp_jax'))}, jax {versions.get('jax')}",
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
        "All figures are of held-out documents. Runs are compared with the run of the same seed that the sweep names "
        "as its "
        "reference, at equal steps, at equal training FLOPs and at equal wall-clock of training, which are three "
        "checkpoints "
        "of one run at a constant learning rate: the last one that gives no run more than the reference had. With "
        "several "
        "seeds an interval is Student's, over the seeds' paired differences; with one it is the paired bootstrap over "
        "documents (of losses, over sequences), and says nothing of other seeds. All are of 95%. Where the target is "
        "the "
        "frozen trunk's own head, all heads are asked to predict the same text; from scratch each run has its own.",
        markdown_table(header, rows),
        f"Written by `{command}`.",
    ])  # fmt: skip


def _claim(claim: Claim) -> str:
    parts = [f"### {claim.title}: {claim.verdict}", claim.text, claim.table]
    if claim.sources:
        parts.append(f"Runs: {', '.join(dict.fromkeys(claim.sources))}.")
    return "\n\n".join(part for part in parts if part)


def _figure(name: str, caption: str, all_results: Sequence[Results], command: str) -> str:
    data = ", ".join(dict.fromkeys(f"`{results.raw['command']}`" for results in all_results))
    return f"![{caption}](figures/{name}.png)\n\n*{caption}* Data: {data}; drawn by `{command}`."


def recommendation(all_results: Sequence[Results]) -> str:
    """The rank that decodes fastest at equal wall-clock of training, by data set, and whether rank 1 is excluded."""
    lines = []
    for results in rank_sweeps(all_results):
        ratios = {point: e for point in results.points if (e := speed_ratio(results, point, "seconds", MAIN_T))}
        better = {point: e for point, e in ratios.items() if results.reference(point) != point}
        if not better:
            continue
        point, e = max(better.items(), key=lambda at: at[1].mean)
        head = results.of(point)[0].head
        interval = "" if math.isnan(e.low) else f" [{e.low:.3f}, {e.high:.3f}]"
        surely = "which excludes rank 1" if e.low > 1 else "which does not exclude rank 1"
        lines.append(
            f"* {results.label}: {results.text(point)} (W = {head['window']}, `{head['factors']}`, target "
            f"`{head['target']}`"
            f", balance `{head['balance']}`), {e.mean:.3f}x{interval} the tokens/s of rank 1, {surely}."
        )
    if not lines:
        return "No sweep over head.rank has speeds; there is nothing to recommend yet."
    return f"The rank that decodes fastest at T = {MAIN_T:g} for the same wall-clock of training:\n\n" + "\n".join(
        lines
    )


def _examples(all_results: Sequence[Results]) -> list[str]:
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


def _windows(windows: Sequence[Any]) -> str:
    return " ".join(f"{_code(text)} {lift:.1f}x" for text, lift in windows[:SHOWN])


def _code(text: str) -> str:
    shown = text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5").replace("|", "\\|")
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def _failed(all_results: Sequence[Results]) -> list[str]:
    rows = [[results.label, name, error] for results in all_results for name, error in results.failed.items()]
    return ["## Runs that failed", markdown_table(["sweep", "run", "error"], rows)] if rows else []
