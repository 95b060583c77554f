"""Cells of the decode benchmark: what was measured of one setting, and the row that it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_jax.bench.config import BenchConfig
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Generation
from mtp_jax.decode.verify import get_verifier


@dataclass
class Cell:
    """The measurements of one setting, by repetition and batch: the generations, and seconds without prefill.

    `auto`: k is what k = "auto" stands for. `next_token`: not of the run, but of its trunk under a plain next-token
    table. The tokens and forwards are the same in all repetitions.
    """

    temperature: float
    k: int
    verifier: str
    dtype: str
    batch: int = 1
    auto: bool = False
    next_token: bool = False
    generations: list[list[Generation]] = dataclasses.field(default_factory=list)
    batch_seconds: list[list[float]] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of each repetition."""
        return [sum(batches) for batches in self.batch_seconds]

    def of(self, batches: Sequence[int]) -> Cell:
        """The same measurements of these batches alone."""
        generations, seconds = (
            [[whole[i] for i in batches] for whole in by_repetition]
            for by_repetition in (self.generations, self.batch_seconds)
        )
        return dataclasses.replace(self, generations=generations, batch_seconds=seconds)

    @property
    def rows(self) -> list[np.ndarray]:
        """The new tokens of every prompt."""
        return [row for g in self.generations[0] for row in g.tokens]

    @property
    def emitted(self) -> int:
        """Tokens that forwards of the loop gave: the first of each row comes from prefill."""
        return sum(len(row) - 1 for row in self.rows)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.emitted / float(np.median(self.seconds))

    @property
    def rates(self) -> np.ndarray:
        """By repetition, tokens per second."""
        emitted = [sum(len(row) - 1 for g in batches for row in g.tokens) for batches in self.generations]
        return np.divide(emitted, self.seconds)

    @property
    def iteration_seconds(self) -> list[float]:
        """By repetition, the time of one pass of the loop, which goes on until the last row of a batch is done. NaN
        where every text ended before the first."""
        passes = [sum(int(g.forwards.max()) for g in batches) for batches in self.generations]
        return [seconds / n if n else float("nan") for seconds, n in zip(self.seconds, passes, strict=True)]

    def count(self, name: str) -> np.ndarray:
        """`forwards`, `drafted` or `accepted` of `Generation`, summed over rows and repetitions."""
        return np.sum([getattr(g, name).sum(0) for batches in self.generations for g in batches], 0)

    @property
    def setting(self) -> tuple[int, float, str]:
        """What plain decoding that it is measured against has in common with it."""
        return self.batch, self.temperature, self.verifier


Gap = Callable[[Cell, int, np.ndarray, int, int], float]
FIGURES = "tokens_per_second", "speedup", "speedup_next_token", "block_efficiency", "acceptance"
"""What a row says that has a mean over categories."""


def grid(config: BenchConfig, batch: int, dtype: str, ks: Iterable[int], next_token: bool = False) -> list[Cell]:
    """The cells of a batch size in one dtype: each temperature x verifier x k, one for k = "auto" if that is asked for,
    whose k is chosen later, and one of the `next_token` model."""
    each = [(k, False, False) for k in ks] + [(0, True, False)] * config.auto + [(0, False, True)] * next_token
    return [
        Cell(temperature, k, verifier, dtype, batch, auto, other)
        for temperature in config.temperatures
        for verifier in (config.verifiers if temperature and config.verifiers else [DecodeConfig(1, temperature).rule])
        for k, auto, other in each
    ]


def plain(cells: Iterable[Cell], cell: Cell) -> Cell:
    """k = 0 in the cell's own dtype: what its tokens are compared with."""
    return next(c for c in _plains(cells, cell) if c.dtype == cell.dtype)


def fastest(cells: Iterable[Cell], cell: Cell) -> Cell:
    """k = 0 in the dtype that is fastest for it: what its speed is compared with."""
    return max(_plains(cells, cell), key=lambda c: c.rate)


def ordinary(cells: Iterable[Cell], cell: Cell) -> Cell | None:
    """The next-token model in the dtype that is fastest for it, where that was measured."""
    return max((c for c in cells if c.setting == cell.setting and c.next_token), key=lambda c: c.rate, default=None)


def _plains(cells: Iterable[Cell], cell: Cell) -> list[Cell]:
    return [c for c in cells if c.setting == cell.setting and c.k == 0 and not (c.auto or c.next_token)]


def _no_gap(*_: Any) -> float:
    return float("nan")


def row(
    cell: Cell, plain: Cell | None, fastest: Cell, gap: Gap = _no_gap, next_token: Cell | None = None
) -> dict[str, Any]:
    """What is said of a cell, next to plain decoding in its own dtype, if texts are to be compared, and in the fastest
    for it; and next to the `next_token` model, if that was measured.

    `gap` gives by how much plain decoding prefers one of two tokens; its arguments are those of `Session.gap`.
    """
    with np.errstate(invalid="ignore"):  # all texts may end with their first token: NaN
        speedups = cell.rates / fastest.rates
        over = None if next_token is None else float(np.median(cell.rates / next_token.rates))
    return {
        "batch": cell.batch,
        "temperature": cell.temperature,
        "k": cell.k,
        "auto": cell.auto,
        "verifier": cell.verifier,
        "dtype": cell.dtype,
        "plain_dtype": fastest.dtype,
        "tokens_per_second": cell.rate,
        "speedup": float(np.median(speedups)),
        "speedups": speedups.tolist(),
        "speedup_next_token": over,
        "block_efficiency": len(cell.generations) * cell.emitted / (int(cell.count("forwards")) or float("nan")),
        "acceptance": (cell.count("accepted") / np.maximum(1, cell.count("drafted"))).tolist(),
        "verify_cost": float(np.median(np.divide(cell.iteration_seconds, fastest.iteration_seconds))),
        "iteration_seconds": cell.iteration_seconds,
        **_identity(cell, plain, gap),
    }


def category_rows(
    cell: Cell, fastest: Cell, batches: Mapping[str, Sequence[int]], next_token: Cell | None = None
) -> list[dict[str, Any]]:
    """What is said of a cell by category, next to plain decoding of the same prompts, and last the mean of all
    categories, whose `category` is None.

    `batches` are those of each category, by number.
    """
    setting, measured = ("batch", "temperature", "k", "auto", "verifier", "dtype", "plain_dtype"), FIGURES
    rows = []
    for category, of in batches.items():
        found = row(cell.of(of), None, fastest.of(of), next_token=next_token and next_token.of(of))
        figures = {name: found[name] for name in setting + measured}
        rows.append({"category": category, "prompts": cell.batch * len(of), **figures})
    mean = {name: np.mean([of[name] for of in rows], axis=0).tolist() for name in measured if rows[0][name] is not None}
    return [*rows, {**rows[0], "category": None, "prompts": sum(of["prompts"] for of in rows), **mean}]


def _identity(cell: Cell, plain: Cell | None, gap: Gap) -> dict[str, Any]:
    if plain is None or get_verifier(cell.verifier).keeps_q:  # the tokens depend on the drafts; their law does not
        return dict.fromkeys(("identical_to_plain", "rows_that_differ", "logit_gap"))
    differ, gaps = 0, []
    for index, (own, other) in enumerate(zip(plain.rows, cell.rows, strict=True)):
        if np.array_equal(own, other):
            continue
        differ += 1
        both = min(len(own), len(other))
        apart = np.flatnonzero(own[:both] != other[:both])
        if len(apart):  # else one of them ended early
            at = int(apart[0])
            gaps.append(gap(cell, index, own[:at], int(own[at]), int(other[at])))
    return {"identical_to_plain": not differ, "rows_that_differ": differ, "logit_gap": max(gaps, default=None)}
