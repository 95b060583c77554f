"""A figure of laws: rows of them by offset, each by its most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_jax.look.text import Vocabulary, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = tuple[str, str, np.ndarray]
"""A name, a colour, and the laws of all offsets, `[W, V]`."""


def plot_laws(
    prompt: str, rows: Sequence[Row], titles: Sequence[str], vocabulary: Vocabulary, top: int
) -> tuple[Figure, Any]:
    """The `top` most likely tokens of each law, and the grid of axes, a row for each of `rows`."""
    from matplotlib.figure import Figure

    lines = max(title.count("\n") for title in titles)
    height = 0.25 + 0.19 * top
    figure = Figure(figsize=(1.6 + 2.2 * len(titles), 0.9 + 0.2 * lines + height * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(titles), sharex=True, squeeze=False)
    for (name, colour, law_WV), line in zip(rows, grid, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", weight="bold", color=colour, labelpad=34)
        for axes, law_V in zip(line, law_WV, strict=True):
            best = np.argsort(-law_V, kind="stable")[:top]
            axes.barh(range(len(best)), law_V[best], color=colour, height=0.7)
            labels = [vocabulary[int(token)] for token in best]
            axes.set_yticks(range(len(best)), labels, family="monospace", size="medium", parse_math=False)
            axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(len(best) - 0.5, -0.5))
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right"]].set_visible(False)
    for top_axes, bottom, title in zip(grid[0], grid[-1], titles, strict=True):
        top_axes.set_title(title, size="medium", weight="bold", parse_math=False)
        bottom.set_xlabel("probability")
    shown = "".join(map(drawn, prompt))
    shown = shown if len(shown) <= 60 else f"...{shown[-60:]}"
    figure.suptitle(f"After {shown}", x=0.01, ha="left", weight="bold", parse_math=False)
    return figure, grid
