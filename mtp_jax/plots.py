"""Plots and tables of all reports and figures, in one style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any kind of colour vision, and in print.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vX"


def panels(titles: Sequence[str], xlabel: str, ylabel: str) -> tuple[Figure, Sequence[Axes]]:
    """A figure with one panel for each title, up to three in a row, in the house style."""
    from matplotlib.figure import Figure

    # Not pyplot: a figure of its own needs no display and no global state, and is freed like any object.
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(2.6 + 4.6 * columns, 4.0 * rows), layout="constrained")
    parts = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in parts[len(titles) :]:
        axes.remove()
    for title, axes in zip(titles, parts, strict=False):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        dress(axes, title)
    return figure, list(parts[: len(titles)])


def dress(axes: Axes, title: str) -> None:
    """The house style: a bold title on the left, no box, a faint grid."""
    axes.set_title(title, loc="left", size="medium", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")


def legend(figure: Figure, handles: Iterable[Any] | None = None) -> None:
    """One legend for all panels, to their right: each label once. `handles` are all that the panels have, if None."""
    if handles is None:
        handles = (handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0])
    unique = {str(handle.get_label()): handle for handle in handles}
    figure.legend(unique.values(), unique.keys(), loc="outside right upper", frameon=False)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    header = list(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
