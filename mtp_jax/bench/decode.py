"""The decode benchmark: k drafts per forward against the same code with none, in one process, interleaved."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax.bench import hf
from mtp_jax.bench.cells import Cell, category_rows, fastest, grid, ordinary, plain, row
from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.session import DTYPES, Decoders, Session
from mtp_jax.bench.suite import NO_CATEGORY, chosen_records, read_suite
from mtp_jax.config import TrainConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.prompts import file_prompts, held_out_prompts
from mtp_jax.decode.verify import get_verifier
from mtp_jax.runs.layout import versions
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import split
from mtp_jax.train.costs import costs
from mtp_jax.validate import require

NAMED = " (next-token table)"
MARGIN = 1.05  # by which the other dtype must win its trial: less than that is noise


def chosen_prompts(run: LoadedRun, config: BenchConfig) -> list[tuple[str, Any]]:
    """The prompts that `config` asks for, as (category, token ids): documents have none."""
    if config.suite:
        records = chosen_records(read_suite(config.suite), config)
        return [(record.category, record.encode(run, config.new_tokens)) for record in records]
    if config.files:
        named = file_prompts(config.files, run.tokenizer, config.prompts, config.prompt_tokens, config.seed)
    else:
        store = prepare(run.config.data, tokenizer=run.tokenizer, reading=True)
        named = held_out_prompts(store, config.prompts, config.prompt_tokens, config.seed)
    return [(NO_CATEGORY, tokens) for _, tokens in named]


def check(config: BenchConfig, run: TrainConfig) -> None:
    """Refuse what cannot be measured of such a run."""
    if config.suite:
        chosen_records(read_suite(config.suite), config)
    for name in config.verifiers:
        require(
            not (get_verifier(name).keeps_q and config.auto),
            f"BenchConfig.auto is True and verifiers has {name}, whose tokens depend on k; leave one of them out.",
        )
    if config.compare == "hf":
        hf.check(run)


def bench_decode(
    run: LoadedRun, config: BenchConfig, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure and return `{"rows": [...], ...}`, the object that the command prints last.

    A row's `speedup` is its tokens/s over those of k = 0 in the dtype `plain_dtype`, the fastest for k = 0, all else
    being equal, the median of the `speedups` by repetition; `verify_cost` the time of one of its iterations over one of
    that, a median as well. `identical_to_plain` says whether its tokens were those of k = 0 in its own dtype, all of
    them; `rows_that_differ` how many rows' were not, and `logit_gap` by how much at most plain decoding preferred its
    own token where they parted. All three are None for verifiers that keep the law of the output
    and not its tokens.

    Where the target is `marginal`, `next_token` has rows of plain decoding of the same trunk with a plain next-token
    table, and `speedup_next_token` is over that in the dtype that is fastest for it. `by_category` has, of a suite, the
    same figures of each category's prompts, and with the category None their mean over categories.
    """
    most = run.config.head.window - 1
    require(
        max(config.ks, default=0) <= most,
        f"BenchConfig.ks is {config.ks} and the head of the run drafts at most {most} tokens; leave out what is more.",
    )
    return bench_runs({"": run}, config, progress, next_token=True)[""]


def bench_runs(
    runs: Mapping[str, LoadedRun],
    config: BenchConfig,
    progress: Callable[[str], None] = lambda _: None,
    *,
    next_token: bool = False,
) -> dict[str, dict[str, Any]]:
    """`bench_decode` of several runs in one process, prompt by prompt in turn: their speeds compare with each other.

    In a repetition the dtypes come one after the other, for of each run one decoder is in memory at a time. The last of
    one is the first of the next, so that a machine whose speed drifts favours now one and now the other.
    With `next_token`, as `bench_decode` has it, runs with target `marginal` are measured beside plain decoding of the
    same trunk with a plain next-token table too.
    Of `config.ks` each has those that it can draft; the dtypes are the same for all.
    """
    for run in runs.values():
        check(config, run.config)
    benches = {name: _Bench(run, config, next_token) for name, run in runs.items()}
    prompts = max(len(bench.prompts) for bench in benches.values())  # which all have as many of
    for batch in config.batch_sizes:
        # The same cells for all.
        both = any([bench.tries(batch, progress) for bench in benches.values()])
        both |= len({run.config.model.dtype for run in runs.values()}) > 1
        for bench in benches.values():
            bench.add(batch, both, progress)
    for repetition in range(config.repetitions):
        for bench in benches.values():
            bench.begin()
        for dtype, batch in itertools.product(DTYPES[:: -1 if repetition % 2 else 1], config.batch_sizes):
            if (dtype, batch) not in {(cell.dtype, cell.batch) for bench in benches.values() for cell in bench.cells}:
                continue
            for first in range(0, prompts, batch):
                for bench in benches.values():
                    bench.decode(dtype, batch, first)
                progress(
                    f"prompt {first + batch} of {prompts} in {dtype}{_batch(batch)}, "
                    f"repetition {repetition + 1} of {config.repetitions}"
                )
    return {name: bench.result(progress) for name, bench in benches.items()}


class _Bench:
    """One run that is measured."""

    def __init__(self, run: LoadedRun, config: BenchConfig, next_token: bool):
        self.run, self.config = run, config
        # The target `ntp` is such a table itself; `marginal` pays for its mixture in plain decoding too.
        self.next_token = next_token and run.config.head.target == "marginal"
        self.categories, self.prompts = map(list, zip(*chosen_prompts(run, config), strict=True))
        self.prefill_seconds: list[float] = []
        self.cells: list[Cell] = []
        self.trials: dict[tuple[int, int, bool], dict[str, float]] = {}
        self.rng = np.random.default_rng(0)
        with jax.set_mesh(run.mesh):
            self.session = Session(Decoders(run), self.prompts, run.stop_tokens, config)

    def tries(self, batch: int, progress: Callable[[str], None]) -> bool:
        """Whether the other dtype is faster, for plain decoding or with the most drafts."""
        dtype, won = self.run.config.model.dtype, False
        cells = [grid(self.config, batch, dtype, [k])[0] for k in sorted({0, max(self.ks)})]
        if self.next_token:
            cells.append(dataclasses.replace(cells[0], next_token=True))
        for cell in cells:
            with jax.set_mesh(self.run.mesh):
                trial = self.trials[batch, cell.k, cell.next_token] = self.session.trial(cell)
            progress(f"tried k = {cell.k}{NAMED * cell.next_token} in {' and '.join(trial)}")
            won |= max(trial.values()) > MARGIN * trial[dtype]
        return won

    @property
    def ks(self) -> list[int]:
        """The numbers of drafts that are measured."""
        return [k for k in range(self.run.config.head.window) if not self.config.ks or k in self.config.ks]

    def add(self, batch: int, both: bool, progress: Callable[[str], None]) -> None:
        """Compile the cells of a batch size, in the run's own dtype or in both."""
        own = self.run.config.model.dtype
        dtypes = [dtype for dtype in self.session.models if both or dtype == own]
        cells = [cell for d in dtypes for cell in grid(self.config, batch, d, self.ks, self.next_token)]
        with jax.set_mesh(self.run.mesh):
            for cell in cells:
                self.session.compile(cell, self.session.shapes(batch))
                what = " (auto)" * cell.auto + NAMED * cell.next_token
                progress(f"compiled T = {cell.temperature:g}, k = {cell.k}{what}{_batch(cell.batch)}")
        self.cells += cells

    def begin(self) -> None:
        """Begin a repetition."""
        for cell in self.cells:
            cell.batch_seconds.append([])
            cell.generations.append([])

    def decode(self, dtype: str, batch: int, first: int) -> None:
        """Continue a batch of prompts, from number `first`, in every cell of that dtype and batch size.

        Each time in an order of its own, always the same ones: no cell always begins in the caches that another leaves.
        """
        cells = [cell for cell in self.cells if cell.dtype == dtype and cell.batch == batch]
        with jax.set_mesh(self.run.mesh):
            for index in self.rng.permutation(len(cells)):
                cell = cells[index]
                generation, prefilled, seconds = self.session.decode(cell, first)
                self.prefill_seconds.append(prefilled)
                cell.batch_seconds[-1].append(seconds)
                cell.generations[-1].append(generation)

    def result(self, progress: Callable[[str], None]) -> dict[str, Any]:
        """What `bench_decode` returns."""
        run, config, cells = self.run, self.config, self.cells
        with jax.set_mesh(run.mesh):
            rows: dict[int, dict[str, Any]] = {}
            # A gap wants a decoder of its dtype, of which there is one at a time.
            for index in sorted(range(len(cells)), key=lambda index: cells[index].dtype):
                cell = cells[index]
                own = None if cell.next_token else plain(cells, cell)
                rows[index] = row(cell, own, fastest(cells, cell), self.session.gap, ordinary(cells, cell))
            compared = None
            if config.compare == "hf":
                k = fastest_k([rows[i] for i, cell in enumerate(cells) if not cell.next_token], max(self.ks))
                compared = hf.bench_hf(run, self.session.models, self.prompts, k, config, progress)
        shared = ("prompt_tokens", "new_tokens", "files", "suite", "repetitions", "seed")
        lengths = [len(prompt) for prompt in self.prompts]
        return {
            "rows": [rows[index] for index, cell in enumerate(cells) if not cell.next_token],
            "next_token": [rows[index] for index, cell in enumerate(cells) if cell.next_token],
            "by_category": self.by_category() if config.suite else [],
            "step": run.step,
            "draft_temperature": run.config.head.draft_temperature,
            "prompts": len(self.prompts),
            **{name: getattr(config, name) for name in shared},
            "prompt_lengths": [min(lengths), max(lengths)],
            "compile_seconds": self.session.compile_seconds,
            "prefill_seconds": float(np.median(self.prefill_seconds)),
            "trials": [
                {"batch": batch, "k": k, "next_token": other, "forwards_per_second": trial}
                for (batch, k, other), trial in self.trials.items()
            ],
            "hf": compared,
            "device": run.mesh.devices.flat[0].device_kind,
            "versions": versions(),
            "parameters": _parameters(run),
        }

    def by_category(self) -> list[dict[str, Any]]:
        """What is said of each cell by category; see `category_rows`."""
        rows = []
        for cell in (cell for cell in self.cells if not cell.next_token):
            batches: dict[str, list[int]] = {}
            for number, category in enumerate(self.categories[:: cell.batch]):
                batches.setdefault(category, []).append(number)
            rows += category_rows(cell, fastest(self.cells, cell), batches, ordinary(self.cells, cell))
        return rows


def fastest_k(rows: Sequence[Mapping[str, Any]], most: int) -> int:
    """The drafts with which the smallest batch is greedily decoded fastest; `most` where nothing says it."""
    greedy = [row for row in rows if row["k"] and not row["temperature"]]
    smallest = min((row["batch"] for row in greedy), default=0)
    some = [row for row in greedy if row["batch"] == smallest]
    return max(some, key=lambda row: row["tokens_per_second"])["k"] if some else most


def _batch(size: int) -> str:
    return "" if size == 1 else f", batch {size}"


def _parameters(run: LoadedRun) -> dict[str, int]:
    found = costs(run.config, split(run.model)[1])
    return {"trunk": found.trunk_params, "head": found.head_params, "embedding": found.embedding_params}
