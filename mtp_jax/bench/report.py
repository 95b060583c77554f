"""Report of a decoding benchmark: `report.md` with its figures, `report.json`, and the table for the terminal.

A `bench` is the object that `mtp-jax bench` returns: a list of `rows`, one for each setting of (batch, temperature,
k, verifier, dtype), of which k = 0 is plain decoding, and what all rows share (prompts, device, versions, ...).
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from mtp_jax.heads.config import HeadConfig
from mtp_jax.plots import MARKERS, PALETTE, legend, markdown_table, panels
from mtp_jax.runs.paths import check_writable, full_path, write_page
from mtp_jax.train.loggers import METRICS_FILE, read_metrics, series
from mtp_jax.validate import from_dict, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]
FIGURES = ("loss", "acceptance", "speed")
NEXT_TOKEN = " (next-token table)"
NEXT_TOKEN_NOTE = """The target is the head's own marginal, so k = 0 computes the whole mixture for each token.
*Next-token table* is plain decoding of the same trunk with one ordinary table of V x D in place of the head, random
where the run has none: its texts mean nothing, its time is that of an ordinary model. *Over next-token* is the speed-up
over it."""
CATEGORIES = """### By category

The prompts of each category for themselves, against k = 0 on the same ones; in the mean each category counts once."""


def _identical(row: Row) -> str:
    if row["identical_to_plain"] is None:
        return "-"
    gap = "" if row["logit_gap"] is None else f" by {row['logit_gap']:.2g}"
    return "yes" if row["identical_to_plain"] else f"{row['rows_that_differ']} rows differ{gap}"


COLUMNS: Columns = {
    "batch": lambda row: f"{row['batch']}",
    "dtype": lambda row: row["dtype"],
    "plain in": lambda row: row["plain_dtype"],
    "T": lambda row: f"{row['temperature']:g}",
    "verifier": lambda row: row["verifier"],
    "k": lambda row: f"{row['k']}{' (auto)' * row.get('auto', False)}{NEXT_TOKEN * row.get('next_token', False)}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "speed-up": lambda row: f"{row['speedup']:.2f}x",
    "over next-token": lambda row: f"{row['speedup_next_token']:.2f}x",
    "tokens per forward": lambda row: f"{row['block_efficiency']:.2f}",
    "acceptance": lambda row: " ".join(f"{share:.2f}" for share in row["acceptance"]) or "-",
    "verify cost": lambda row: "-" if row.get("verify_cost") is None else f"{row['verify_cost']:.2f}",
    "identical": _identical,
}
HF_COLUMNS: Columns = {
    "decoder": lambda row: row["name"] if row["k"] is None else f"{row['name']}, k = {row['k']}",
    "dtype": COLUMNS["dtype"],
    "tokens/s": COLUMNS["tokens/s"],
    "prompts that differ": lambda row: f"{row['rows_that_differ']}",
}
CATEGORY_COLUMNS: Columns = {
    "category": lambda row: row["category"] or "mean of categories",
    "prompts": lambda row: f"{row['prompts']}",
    **{name: cell for name, cell in COLUMNS.items() if name not in ("verify cost", "identical")},
}


def check_reportable(run_dir: epath.PathLike, out: epath.PathLike = "") -> None:
    """Raise `ConfigError` if the run has no metrics to report, or a file of the report cannot be written."""
    path = full_path(run_dir) / METRICS_FILE
    require(path.exists(), f"A report shows the run's metrics, and there is no {path}. Leave --report out.")
    for name in ("report.md", "report.json", *(f"plots/{name}.png" for name in FIGURES)):
        check_writable(full_path(out or run_dir) / name, "Give another directory with --out.")


def write_report(
    run_dir: epath.PathLike, bench: dict[str, Any], config: dict[str, Any], out: epath.PathLike = ""
) -> epath.Path:
    """Write `report.md`, `report.json` and `plots/*.png` into `out`, by default `run_dir`; returns that of `report.md`.

    `config` is the run's `TrainConfig` as a dictionary. Raises `FileNotFoundError` if `run_dir` has no metrics.jsonl.
    """
    run_dir, out = full_path(run_dir), full_path(out or run_dir)
    records = read_metrics(run_dir)
    train, evals = ([record for record in records if record["kind"] == kind] for kind in ("train", "eval"))
    rows = [row for row in bench["rows"] if not row.get("auto")]
    figures = (plot_loss(train, evals), plot_acceptance(rows), plot_speed(rows))
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, figure in zip(FIGURES, figures, strict=True):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        (out / "plots" / f"{name}.png").write_bytes(png.getvalue())
    (out / "report.json").write_text(json.dumps(bench, indent=2) + "\n")
    report = out / "report.md"
    text = _markdown(run_dir.name or "Report", train, evals, bench, config)
    if (out / "completions.html").exists():
        text += "\n[Completions of held-out documents](completions.html), accepted drafts in colour.\n"
    write_page(report, text)
    return report


def decode_table(bench: dict[str, Any]) -> Table:
    """The decode measurements as a table for the terminal."""
    rows = _with_next_token(bench)
    return _table(_decode_setting(bench), _columns(rows), rows)


def category_table(bench: dict[str, Any]) -> Table:
    """Those of a suite by category, as a table for the terminal."""
    rows = _by_category(bench)
    return _table(f"By category of {_suite(bench)}", _columns(rows, CATEGORY_COLUMNS), rows)


def decode_markdown(bench: dict[str, Any]) -> str:
    """The decode measurements as a Markdown table."""
    rows = _with_next_token(bench)
    return _markdown_rows(_columns(rows), rows)


def category_markdown(bench: dict[str, Any]) -> str:
    """Those of a suite by category, as a Markdown table."""
    rows = _by_category(bench)
    return _markdown_rows(_columns(rows, CATEGORY_COLUMNS), rows)


def hf_table(bench: dict[str, Any]) -> Table:
    """What `--compare hf` found, as a table for the terminal."""
    return _table(_hf_title(bench), HF_COLUMNS, bench["hf"]["rows"])


def _hf_title(bench: dict[str, Any]) -> str:
    hf = bench["hf"]
    return (
        f"Greedy decoding beside transformers {hf['versions']['transformers']} on {hf['device']} "
        f"({hf['threads']} threads), prefill included; our fastest is {hf['ratio']:.2f}x of its fastest"
    )


def plot_loss(train: Sequence[Row], evals: Sequence[Row]) -> Figure:
    """Loss by offset against the step: thin lines for training, marked lines for validation."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    window = max((len(series(record, "loss_offset_")) for record in (*train, *evals)), default=0)
    shades = colormaps["viridis"]([0.88 * s / max(1, window - 1) for s in range(window)])
    styles: dict[str, Any] = {"training": {"lw": 1, "alpha": 0.45}, "validation": {"lw": 1.8, "marker": "o", "ms": 4}}
    figure, (axes,) = panels(["Loss by offset"], "step", "loss (nats per token)")
    for records, style in zip((train, evals), styles.values(), strict=True):
        for s, shade in enumerate(shades, 1):
            points = [(record["step"], record[name]) for record in records if (name := f"loss_offset_{s}") in record]
            axes.plot(*zip(*points, strict=True), color=shade, **style)
    lines = [Line2D([], [], color=shades[s - 1], lw=3, label=f"offset {s}") for s in range(window, 0, -1)]
    lines += [Line2D([], [], color="0.3", label=label, **style) for label, style in styles.items()]
    legend(figure, lines)
    axes.set_xlim(left=0)
    return figure


def plot_acceptance(rows: Sequence[Row]) -> Figure:
    """Acceptance by offset, one line per (temperature, verifier), at the largest k and the smallest batch."""
    setting = k, batch, dtype = max(row["k"] for row in rows), min(row["batch"] for row in rows), rows[0]["dtype"]
    title = f"Acceptance by offset, k = {k}, batch {batch}, {dtype}"
    figure, (axes,) = panels([title], "offset of the draft", "share of drafts accepted")
    for group, style in _lines([row for row in rows if (row["k"], row["batch"], row["dtype"]) == setting]):
        axes.plot(range(1, k + 1), group[0]["acceptance"], **style)
    axes.set(ylim=(0, 1.02), xticks=range(1, k + 1))
    legend(figure)
    return figure


def plot_speed(rows: Sequence[Row]) -> Figure:
    """Tokens per second by k, one panel per batch size, in the dtype of its fastest row; dashed lines are what the
    speed-ups are against."""
    fastest = {row["batch"]: row["dtype"] for row in sorted(rows[::-1], key=lambda row: row["tokens_per_second"])}
    dtypes = dict(sorted(fastest.items()))
    titles = [f"Decoding speed, batch {batch}, {dtype}" for batch, dtype in dtypes.items()]
    figure, parts = panels(titles, "drafts per forward, k", "tokens/s")
    for (batch, dtype), axes in zip(dtypes.items(), parts, strict=True):
        of_batch = [row for row in rows if row["batch"] == batch]
        for points, style in _lines([row for row in of_batch if row["dtype"] == dtype]):
            axes.plot([row["k"] for row in points], [row["tokens_per_second"] for row in points], **style)
        for row in of_batch:
            if row["k"] == 0 and row["dtype"] == row["plain_dtype"]:
                dashes = (4, 3) if row["dtype"] == dtype else (1, 2)
                dashed: dict[str, Any] = {"color": "0.4", "ls": (0, dashes), "lw": 1.0, "zorder": 1.9}
                axes.axhline(row["tokens_per_second"], label=f"k = 0, plain decoding in {row['dtype']}", **dashed)
        axes.set(ylim=(0, 1.06 * axes.dataLim.ymax), xticks=sorted({row["k"] for row in rows}))
    legend(figure)
    return figure


def _lines(rows: Sequence[Row]) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """The rows of each (temperature, verifier), by k, and the style of their line."""
    rows = sorted(rows, key=lambda row: row["k"])
    temperatures, verifiers = (sorted({row[name] for row in rows}) for name in ("temperature", "verifier"))
    for (i, temperature), (j, verifier) in itertools.product(enumerate(temperatures), enumerate(verifiers)):
        group = [row for row in rows if (row["temperature"], row["verifier"]) == (temperature, verifier)]
        if group:
            style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[j % len(MARKERS)], "ms": 5, "lw": 1.8}
            yield group, {**style, "label": f"T = {temperature:g}, {verifier}"}


def _table(title: str, columns: Columns, rows: Sequence[Row]) -> Table:
    from rich.markup import escape  # a name may have brackets
    from rich.table import Table

    table = Table(title=escape(title), box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        justify = "left" if name in ("category", "dtype", "plain in", "verifier", "acceptance") else "right"
        least = 14 if name == "acceptance" else None  # of three drafts in one line
        table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=name != "acceptance", min_width=least)
    # What is long goes on in a line below, or a terminal of 120 columns would cut numbers.
    broken = {"k": " ", "identical": " by "}
    for row in rows:
        cells = {name: text(row) for name, text in columns.items()}
        cells |= {name: cells[name].replace(at, f"\n{at.lstrip()}") for name, at in broken.items() if name in cells}
        table.add_row(*map(escape, cells.values()))
    return table


def _markdown_rows(columns: Columns, rows: Sequence[Row]) -> str:
    return markdown_table(columns, ([text(row).replace("|", "\\|") for text in columns.values()] for row in rows))


def _with_next_token(bench: dict[str, Any]) -> list[Row]:
    """The rows, and before those of a setting that of the next-token table in it, if there is one."""
    left, rows = [{**row, "next_token": True} for row in bench["next_token"]], []
    for row in bench["rows"]:
        setting = [row[name] for name in ("batch", "temperature", "verifier", "dtype")]
        first = [
            own for own in left if [own[name] for name in ("batch", "temperature", "verifier", "dtype")] == setting
        ]
        left = [own for own in left if own not in first]
        rows += [*first, row]
    return rows


def _by_category(bench: dict[str, Any]) -> list[Row]:
    """The rows of one category after the other, and last the means."""
    names = list(dict.fromkeys(row["category"] for row in bench["by_category"]))
    return sorted(bench["by_category"], key=lambda row: names.index(row["category"]))


def _columns(rows: Sequence[Row], columns: Columns = COLUMNS) -> Columns:
    """The columns to show: all, but batch and dtypes where they vary, and speed-ups over what was measured."""
    same = {"batch"} if len({row["batch"] for row in rows}) == 1 else set()
    same |= {"over next-token"} if any(row["speedup_next_token"] is None for row in rows) else set()
    if len({row[name] for row in rows for name in ("dtype", "plain_dtype")}) == 1:
        same |= {"dtype", "plain in"}
    return {name: text for name, text in columns.items() if name not in same}


def _suite(bench: dict[str, Any]) -> str:
    return epath.Path(bench["suite"]).name


def _decode_setting(bench: dict[str, Any]) -> str:
    tokens = f"{bench['prompt_tokens']} tokens"
    if bench["suite"]:
        tokens = f"{_suite(bench)} ({' to '.join(map(str, bench['prompt_lengths']))} tokens)"
    share = bench["draft_temperature"]
    drafts = "" if share == 1 else f", drafts at {share:g} of the temperature"
    return (
        f"{bench['prompts']} prompts of {tokens}, {bench['new_tokens']} new tokens each, "
        f"{bench['repetitions']} repetitions{drafts}, on {bench['device']}"
    )


def _loss_table(evals: Sequence[Row]) -> str:
    if not evals:
        return "The run was not evaluated."
    first, last = evals[0], evals[-1]
    offsets = {f"loss_offset_{s}": f"offset {s}" for s, _ in enumerate(series(last, "loss_offset_"), 1)}
    names = {"loss_first_token": "first token", **offsets, "joint_loss": "joint"}
    names["gate_effective"] = f"effective components (of {len(series(last, 'gate_share_'))})"
    rows = (
        [label, f"{first[name]:.3f}", f"{last[name]:.3f}", f"{last[name] - first[name]:+.3f}"]
        for name, label in names.items()
        if name in first and name in last
    )
    return markdown_table(["", f"step {first['step']}", f"step {last['step']}", "change"], rows)


def _summary(train: Sequence[Row], bench: dict[str, Any], config: dict[str, Any]) -> str:
    model, head, data, sizes = config["model"], config["head"], config["data"], bench["parameters"]
    steps = train[-1]["step"] if train else 0
    dtypes, batches = (" and ".join(dict.fromkeys(str(row[n]) for row in bench["rows"])) for n in ("dtype", "batch"))
    versions = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    return (
        f"A trunk of {model['num_layers']} layers of width {model['d_model']} ({sizes['trunk']:,} parameters) with a "
        f"`{head['kind']}` head ({_described(head)}) and target `{head['target']}` ({sizes['head']:,} parameters), "
        f"trained for {steps:,} steps of "
        f"{data['batch_size']} x {data['seq_len']} tokens ({steps * data['batch_size'] * data['seq_len']:,} in all) of "
        f"`{data['source']}`, tokenizer `{data['tokenizer']}`. Decoded in {dtypes} at batch {batches}: "
        f"{_decode_setting(bench)}. Compiling ({bench['compile_seconds']:.1f} s) and prefill "
        f"({bench['prefill_seconds']:.2f} s) are not in the speeds. Versions: {versions}."
    )


def _described(head: dict[str, Any]) -> str:
    from mtp_jax.heads.registry import check_head  # JAX comes with it

    config = from_dict(HeadConfig, head)
    return check_head(config).describe(config)


def _markdown(title: str, train: Sequence[Row], evals: Sequence[Row], bench: dict[str, Any], config: dict) -> str:
    hf = f"\n{_hf_title(bench)}.\n\n{_markdown_rows(HF_COLUMNS, bench['hf']['rows'])}\n" if bench["hf"] else ""
    plain = f"\n{NEXT_TOKEN_NOTE}\n" if bench["next_token"] else ""
    categories = f"\n{CATEGORIES}\n\n{category_markdown(bench)}\n" if bench["by_category"] else ""
    return f"""# {title}

{_summary(train, bench, config)}

## Validation loss

Losses in nats on held-out documents: each offset is given the ones before it, *joint* is a whole window.

{_loss_table(evals)}

![Loss by offset](plots/loss.png)

*Loss by offset against the step: thin lines are training batches, marked lines held-out documents.*

## Decoding

k = 0 is plain decoding by the same code, and every speed-up is against it, in the dtype in which it is fastest. Tokens
per forward is what one forward pass of the network commits, acceptance the share of the drafts at each offset that were
kept, and verify cost the time of a cycle of drafting and verifying, in plain steps. Identical says whether the text
equals that of plain decoding, and if not, how many continuations differ and by how much, at most, the logits of the two
tokens differ where they part; verifiers that keep the law of the text but not the text itself have a dash.

{decode_markdown(bench)}
{plain}{hf}{categories}
![Acceptance by offset](plots/acceptance.png)

*Share of the drafts kept at each offset, for the longest draft that was measured.*

![Decoding speed](plots/speed.png)

*Tokens per second by the number of drafts in a forward pass; dashed lines are the plain decoding of the speed-ups.*
"""
