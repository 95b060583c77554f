"""The decode benchmark: k drafts per forward against the same code with none, on held-out prompts, in one process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mtp_jax.checkpoint import LoadedRun, versions
from mtp_jax.config import BenchConfig, DecodeConfig, require
from mtp_jax.data import Store, prepare
from mtp_jax.decode.generate import Generation, Request, make_request, proceed, result, start
from mtp_jax.train.costs import costs
from mtp_jax.train.step import split


@dataclass
class Cell:
    """The measurements of one (temperature, k). Seconds and forwards are per repetition, prefill excluded."""

    temperature: float
    k: int
    verifier: str
    generations: list[Generation] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def held_out_prompts(store: Store, count: int, length: int, seed: int = 0) -> list[tuple[str, Any]]:
    """`count` held-out documents chosen by `seed`: (name, first `length` tokens). None ends with its prompt.

    Raises `ConfigError` if there are not that many of that length.
    """
    documents = store.valid
    order = np.random.default_rng(seed).permutation(len(documents))
    long = [int(i) for i in order if documents.offsets[i + 1] - documents.offsets[i] > length]
    require(
        len(long) >= count,
        f"{count} prompts were asked for and {len(long)} held-out documents have more than {length} tokens; "
        "ask for fewer or shorter ones, or hold out more (data.valid_fraction).",
    )
    return [(documents.names[i], documents[i][:length]) for i in long[:count]]


def bench_decode(
    run: LoadedRun, config: BenchConfig, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure and return `{"rows": [...], ...}`, the object that the command prints last.

    A row's `speedup` is its tokens/s over that of k = 0 at the same temperature; `verify_cost` the time of one of its
    iterations over one of k = 0; `identical_to_plain` whether its tokens were those of k = 0, all of them.
    """
    prompts = [
        tokens
        for _, tokens in held_out_prompts(prepare(run.config.data), config.prompts, config.prompt_tokens, config.seed)
    ]
    cells = [
        Cell(temperature, k, DecodeConfig(1, temperature).rule)
        for temperature in config.temperatures
        for k in range(run.config.head.window)
    ]
    with jax.set_mesh(run.mesh):
        model = run.decoder

        def request(cell: Cell, index: int) -> Request:
            decode = DecodeConfig(config.new_tokens, cell.temperature, k=cell.k, seed=config.seed + index)
            return make_request(model, [prompts[index]], decode)

        begun = time.perf_counter()
        for cell in cells:
            warm = request(cell, 0)
            jax.block_until_ready(proceed(model, warm, start(model, warm), 1))
            progress(f"compiled T = {cell.temperature:g}, k = {cell.k}")
        compile_seconds, prefill_seconds = time.perf_counter() - begun, []

        for repetition in range(config.repetitions):
            for index in range(len(prompts)):
                for cell in cells:
                    asked = request(cell, index)
                    t0 = time.perf_counter()
                    state = jax.block_until_ready(start(model, asked))
                    t1 = time.perf_counter()
                    state = jax.block_until_ready(proceed(model, asked, state))
                    t2 = time.perf_counter()
                    prefill_seconds.append(t1 - t0)
                    if index == 0:
                        cell.seconds.append(0.0)
                    cell.seconds[repetition] += t2 - t1
                    if repetition == 0:
                        cell.generations.append(result(asked, state))
                progress(f"prompt {index + 1} of {len(prompts)}, repetition {repetition + 1} of {config.repetitions}")

    return {
        "rows": [_row(cell, _plain(cells, cell), run.config.model.dtype) for cell in cells],
        "step": run.step,
        **{name: getattr(config, name) for name in ("prompts", "prompt_tokens", "new_tokens", "repetitions", "seed")},
        "compile_seconds": compile_seconds,
        "prefill_seconds": float(np.median(prefill_seconds)),
        "device": run.mesh.devices.flat[0].device_kind,
        "versions": versions(),
        "parameters": _parameters(run),
    }


def _plain(cells: list[Cell], cell: Cell) -> Cell:
    return next(c for c in cells if c.temperature == cell.temperature and c.k == 0)


def _row(cell: Cell, plain: Cell, dtype: str) -> dict[str, Any]:
    rate, plain_rate = _rate(cell), _rate(plain)
    pairs = zip(cell.generations, plain.generations, strict=True)
    accepted, drafted = (np.sum([getattr(g, n).sum(0) for g in cell.generations], 0) for n in ("accepted", "drafted"))
    return {
        "batch": 1,
        "temperature": cell.temperature,
        "k": cell.k,
        "verifier": cell.verifier,
        "dtype": dtype,
        "tokens_per_second": rate,
        "speedup": rate / plain_rate,
        "block_efficiency": _emitted(cell) / _forwards(cell),
        "acceptance": [float(a) for a in accepted / np.maximum(1, drafted)],
        "verify_cost": (np.median(cell.seconds) / _forwards(cell)) / (np.median(plain.seconds) / _forwards(plain)),
        "identical_to_plain": all(np.array_equal(g.tokens[0], p.tokens[0]) for g, p in pairs),
    }


def _emitted(cell: Cell) -> int:
    """Tokens that forwards of the loop gave: the first of each row comes from prefill."""
    return sum(len(row) - 1 for g in cell.generations for row in g.tokens)


def _forwards(cell: Cell) -> int:
    return sum(int(g.forwards.sum()) for g in cell.generations)


def _rate(cell: Cell) -> float:
    return _emitted(cell) / float(np.median(cell.seconds))


def _parameters(run: LoadedRun) -> dict[str, int]:
    found = costs(run.config, split(run.model)[1])
    return {"trunk": found.trunk_params, "head": found.head_params, "embedding": found.embedding_params}
