"""The decode benchmark: k drafts per forward against the same code with none, in one process, interleaved."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax import Array

from mtp_jax.bench import hf
from mtp_jax.bench.config import BenchConfig
from mtp_jax.config import TrainConfig, require
from mtp_jax.data import Mixture, Store, Tokenizer, prepare
from mtp_jax.data.sources.files import Files
from mtp_jax.decode.adaptive import learnt_policy, proceed_adaptively, start_adaptively
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.generate import Generation, Request, for_decoding, make_request, proceed, result, start, window
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.loop import read
from mtp_jax.decode.state import DecodeState
from mtp_jax.decode.verify import get_verifier
from mtp_jax.loading import LoadedRun
from mtp_jax.model.transformer import LanguageModel, in_dtype
from mtp_jax.run_dir import versions
from mtp_jax.train.costs import costs
from mtp_jax.train.step import split

DTYPES = "float32", "bfloat16"
TRIAL_ROUNDS, TRIAL_FORWARDS = 5, 64
MARGIN = 1.05  # by which the other dtype must win its trial: less than that is noise


@dataclass
class Cell:
    """The measurements of one setting, by repetition: the generations of its batches, and seconds without prefill.

    The tokens are the same in all; forwards can differ in the adaptive mode, and so in bfloat16 can its tokens: those
    of the first repetition are compared.
    """

    temperature: float
    k: int | Literal["adaptive"]
    verifier: str
    dtype: str
    batch: int = 1
    generations: list[list[Generation]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

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
        """By repetition, the time of one pass of the loop, which goes on until the last row of a batch is done."""
        passes = [sum(int(g.forwards.max()) for g in batches) for batches in self.generations]
        return [seconds / n for seconds, n in zip(self.seconds, passes, strict=True)]

    def count(self, name: str) -> np.ndarray:
        """`forwards`, `drafted` or `accepted` of `Generation`, summed over rows and repetitions."""
        return np.sum([getattr(g, name).sum(0) for batches in self.generations for g in batches], 0)

    @property
    def setting(self) -> tuple[int, float, str]:
        """What plain decoding that it is measured against has in common with it."""
        return self.batch, self.temperature, self.verifier


def held_out_prompts(store: Store | Mixture, count: int, length: int, seed: int = 0) -> list[tuple[str, Any]]:
    """`count` held-out documents chosen by `seed`: (name, first `length` tokens). None ends with its prompt.

    Raises `ConfigError` if there are not that many of that length.
    """
    documents = store.valid
    lengths = documents.lengths
    order = np.random.default_rng(seed).permutation(len(documents))
    long = [int(i) for i in order if lengths[i] > length]
    require(
        len(long) >= count,
        f"{count} prompts were asked for and {len(long)} held-out documents have more than {length} tokens; "
        "ask for fewer or shorter ones, or hold out more (data.valid_fraction).",
    )
    return [(documents.names[i], documents[i][:length]) for i in long[:count]]


def file_prompts(files: str, tokenizer: Tokenizer, count: int, length: int, seed: int = 0) -> list[tuple[str, Any]]:
    """`count` of the files that a glob matches, chosen by `seed`: (name, first `length` tokens).

    Raises `ConfigError` if no file matches, or not that many have that length.
    """
    source = Files.matching(files)
    order = np.random.default_rng(seed).permutation(len(source.names))
    texts = ((source.names[i], tokenizer.encode(source.content(source.names[i]))) for i in order)
    long = [(name, tokens[:length]) for name, tokens in texts if len(tokens) >= length]
    require(
        len(long) >= count,
        f"{count} prompts were asked for and {len(long)} files of {files!r} have {length} tokens or more; "
        "ask for fewer or shorter ones, or give more files.",
    )
    return long[:count]


def chosen_prompts(run: LoadedRun, config: BenchConfig) -> list[Any]:
    """The prompts that `config` asks for, as token ids."""
    if config.files:
        named = file_prompts(config.files, run.tokenizer, config.prompts, config.prompt_tokens, config.seed)
    else:
        store = prepare(run.config.data, tokenizer=run.tokenizer)
        named = held_out_prompts(store, config.prompts, config.prompt_tokens, config.seed)
    return [tokens for _, tokens in named]


def check(config: BenchConfig, run: TrainConfig) -> None:
    """Refuse what cannot be measured of such a run."""
    for name in config.verifiers:
        get_verifier(name)
    if config.compare == "hf":
        hf.check(run)


def bench_decode(
    run: LoadedRun,
    config: BenchConfig,
    progress: Callable[[str], None] = lambda _: None,
    prompts: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Measure and return `{"rows": [...], ...}`, the object that the command prints last.

    `prompts` are token ids to continue in place of those that `config` chooses, `config.prompts` of them.

    A row's `speedup` is its tokens/s over those of k = 0 in the dtype `plain_dtype`, the fastest for k = 0, all else
    being equal, the median of the `speedups` by repetition; `verify_cost` the time of one of its iterations over one of
    that, a median as well. `identical_to_plain` says whether its tokens were those of k = 0 in its own dtype, all of
    them; `rows_that_differ` how many rows' were not, and `logit_gap` by how much at most plain decoding preferred its
    own token where they parted (see `Session.gap`). All three are None for verifiers that keep the law of the output
    and not its tokens.
    """
    most = run.config.head.window - 1
    require(
        max(config.ks, default=0) <= most,
        f"BenchConfig.ks is {config.ks} and the head of the run drafts at most {most} tokens; leave out what is more.",
    )
    return bench_runs({"": run}, config, progress, prompts)[""]


def bench_runs(
    runs: Mapping[str, LoadedRun],
    config: BenchConfig,
    progress: Callable[[str], None] = lambda _: None,
    prompts: Sequence[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """`bench_decode` of several runs in one process, prompt by prompt in turn: their speeds compare with each other.

    Of `config.ks` each has those that it can draft; `prompts` are the same for all, and so are the dtypes.
    """
    for run in runs.values():
        check(config, run.config)
    benches = {name: _Bench(run, config, prompts) for name, run in runs.items()}
    for batch in config.batch_sizes:
        # The same cells for all.
        both = any([bench.tries(batch, progress) for bench in benches.values()])
        both |= len({run.config.model.dtype for run in runs.values()}) > 1
        for bench in benches.values():
            bench.add(batch, both, progress)
    for repetition in range(config.repetitions):
        for bench in benches.values():
            bench.begin()
        for batch in config.batch_sizes:
            for first in range(0, config.prompts, batch):
                for bench in benches.values():
                    bench.decode(batch, first)
                progress(
                    f"prompt {first + batch} of {config.prompts}{_batch(batch)}, "
                    f"repetition {repetition + 1} of {config.repetitions}"
                )
    return {name: bench.result(progress) for name, bench in benches.items()}


class _Bench:
    """One run that is measured."""

    def __init__(self, run: LoadedRun, config: BenchConfig, prompts: Sequence[Any] | None):
        self.run, self.config = run, config
        self.prompts = list(chosen_prompts(run, config) if prompts is None else prompts)
        require(
            len(self.prompts) == config.prompts,
            f"BenchConfig.prompts is {config.prompts} and {len(self.prompts)} were given; make them as many.",
        )
        self.prefill_seconds: list[float] = []
        self.cells: list[Cell] = []
        self.trials: dict[tuple[int, int], dict[str, float]] = {}
        self.rng = np.random.default_rng(0)
        with jax.set_mesh(run.mesh):
            self.session = Session(decoders(run), self.prompts, config)

    def tries(self, batch: int, progress: Callable[[str], None]) -> bool:
        """Whether the other dtype is faster, for plain decoding or with the most drafts."""
        dtype, won = self.run.config.model.dtype, False
        for k in sorted({0, max(self.ks)}):
            with jax.set_mesh(self.run.mesh):
                trial = self.trials[batch, k] = self.session.trial(_grid(self.config, batch, dtype, [k])[0])
            progress(f"tried k = {k} in {' and '.join(trial)}")
            won |= max(trial.values()) > MARGIN * trial[dtype]
        return won

    @property
    def ks(self) -> list[int]:
        """The numbers of drafts that are measured."""
        return [k for k in range(self.run.config.head.window) if not self.config.ks or k in self.config.ks]

    def add(self, batch: int, both: bool, progress: Callable[[str], None]) -> None:
        """Compile the cells of a batch size, in the run's own dtype or in both."""
        ks = [*self.ks, *["adaptive"] * self.config.adaptive]
        own = self.run.config.model.dtype
        cells = [cell for d in self.session.models if both or d == own for cell in _grid(self.config, batch, d, ks)]
        with jax.set_mesh(self.run.mesh):
            for cell in cells:
                self.session.compile(cell)
                progress(f"compiled T = {cell.temperature:g}, k = {cell.k}{_batch(cell.batch)}")
        self.cells += cells

    def begin(self) -> None:
        """Begin a repetition."""
        for cell in self.cells:
            cell.seconds.append(0.0)
            cell.generations.append([])

    def decode(self, batch: int, first: int) -> None:
        """Continue a batch of prompts, from number `first`, in every cell of that batch size.

        Each time in an order of its own, always the same ones: no cell always begins in the caches that another leaves.
        """
        cells = [cell for cell in self.cells if cell.batch == batch]
        with jax.set_mesh(self.run.mesh):
            for index in self.rng.permutation(len(cells)):
                cell = cells[index]
                asked, state, prefilled, seconds = self.session.decode(cell, first)
                self.prefill_seconds.append(prefilled)
                cell.seconds[-1] += seconds
                cell.generations[-1].append(result(asked, state))

    def result(self, progress: Callable[[str], None]) -> dict[str, Any]:
        """What `bench_decode` returns."""
        run, config, cells = self.run, self.config, self.cells
        with jax.set_mesh(run.mesh):
            gap = self.session.gap
            rows = [_row(cell, _plain(cells, cell), _fastest(cells, cell), gap) for cell in cells]
            compared = hf.bench_hf(run, self.prompts, config, progress) if config.compare == "hf" else None
        shared = ("prompts", "prompt_tokens", "new_tokens", "files", "repetitions", "seed")
        return {
            "rows": rows,
            "step": run.step,
            **{name: getattr(config, name) for name in shared},
            "compile_seconds": self.session.compile_seconds,
            "prefill_seconds": float(np.median(self.prefill_seconds)),
            "trials": [{"batch": b, "k": k, "forwards_per_second": trial} for (b, k), trial in self.trials.items()],
            "hf": compared,
            "device": run.mesh.devices.flat[0].device_kind,
            "versions": versions(),
            "parameters": _parameters(run),
        }


def decoders(run: LoadedRun) -> dict[str, LanguageModel]:
    """The model laid out for decoding, by dtype: the config's and the other one."""
    dtype = run.config.model.dtype
    (other,) = set(DTYPES) - {dtype}
    return {dtype: run.decoder, other: for_decoding(in_dtype(run.model, other))}  # type: ignore[arg-type]


class Session:
    """Decoders by dtype and the prompts that they continue, the mesh in scope."""

    def __init__(self, models: dict[str, LanguageModel], prompts: list[Any], config: BenchConfig):
        self.models, self.prompts, self.config = models, prompts, config
        self.compile_seconds = 0.0

    def request(self, cell: Cell, first: int) -> Request:
        """A batch of prompts from number `first`. Prompt i is sampled with `config.seed + i`, whatever the batch."""
        k = None if cell.k == "adaptive" else cell.k
        decode = DecodeConfig(
            self.config.new_tokens, cell.temperature, k=k, seed=self.config.seed + first, verifier=cell.verifier
        )
        return make_request(self.models[cell.dtype], self.prompts[first : first + cell.batch], decode)

    def compile(self, cell: Cell) -> None:
        """Prefill and one iteration; of a cache that is read through windows, and in the adaptive mode, whole batches:
        each window and each width is a program."""
        begun, model, asked = time.perf_counter(), self.models[cell.dtype], self.request(cell, 0)
        if cell.k == "adaptive":
            policy = learnt_policy(model, asked)
            for _ in range(2):  # the second begins at the width that the first has found
                proceed_adaptively(model, asked, start_adaptively(model, asked, policy), policy)
        else:
            state = start(model, asked)
            one = [1] if window(asked.plan, state) is None else []
            jax.block_until_ready(proceed(model, asked, state, *one))
        self.compile_seconds += time.perf_counter() - begun

    def decode(self, cell: Cell, first: int, *forwards: int) -> tuple[Request, DecodeState, float, float]:
        """(what was asked, the state, seconds of prefill, seconds of the loop), of at most so many `forwards`."""
        model, asked = self.models[cell.dtype], self.request(cell, first)
        policy = learnt_policy(model, asked) if cell.k == "adaptive" else None
        t0 = time.perf_counter()
        state = start_adaptively(model, asked, policy) if policy else start(model, asked)
        jax.block_until_ready(state)
        t1 = time.perf_counter()
        state = proceed_adaptively(model, asked, state, policy) if policy else proceed(model, asked, state, *forwards)
        jax.block_until_ready(state)
        return asked, state, t1 - t0, time.perf_counter() - t1

    def trial(self, cell: Cell) -> dict[str, float]:
        """Forwards per second of a cell in each dtype, in a few short runs: a slower one gets no more."""
        cells = {dtype: dataclasses.replace(cell, dtype=dtype) for dtype in self.models}
        # So few that they are needed even if all drafts are accepted.
        forwards = max(1, min(TRIAL_FORWARDS, (self.config.new_tokens - 1) // (int(cell.k) + 1)))
        for cell in cells.values():
            self.compile(cell)
        rounds = [[self.decode(cell, 0, forwards)[-1] for cell in cells.values()] for _ in range(TRIAL_ROUNDS)]
        return dict(zip(cells, (forwards / np.median(rounds, axis=0)).tolist(), strict=True))

    def gap(self, cell: Cell, index: int, shared: np.ndarray, own: int, other: int) -> float:
        """By how much prompt `index`, continued by the tokens `shared`, prefers one of two tokens to the other.

        What is compared is what plain decoding takes the argmax of: the log-probabilities at temperature 0, and above
        it the logits with their noise. Neither run is believed: the model reads the whole text again.
        """
        decode = DecodeConfig(1, cell.temperature, k=0, seed=self.config.seed + index, verifier=cell.verifier)
        model = self.models[cell.dtype]
        asked = make_request(model, [np.concatenate([self.prompts[index], shared])], decode)
        slots = asked.plan.slots
        scores_V = np.asarray(_scores(cell.verifier, slots, model, asked.prompt_BP, asked.length_B, asked.sampling))[0]
        return abs(float(scores_V[own] - scores_V[other]))


@functools.partial(jax.jit, static_argnames=("verifier", "slots"))
def _scores(
    verifier: str, slots: int, model: LanguageModel, prompt_BP: Array, length_B: Array, sampling: Sampling
) -> Array:
    """What the token after each prompt is the argmax of, `[B, V]`."""
    x_BD, _ = read(model, prompt_BP, length_B, slots)
    rule = get_verifier(verifier)
    logits_B1V = rule.law(model.head.target_log_probs(x_BD[:, None]), sampling, filtered=False)
    noise_B1V = rule.noise(sampling, length_B, 1, logits_B1V.shape[-1])
    return (logits_B1V if noise_B1V is None else logits_B1V + noise_B1V)[:, 0]


def _grid(config: BenchConfig, batch: int, dtype: str, ks: Any) -> list[Cell]:
    return [
        Cell(temperature, k, verifier, dtype, batch)
        for temperature in config.temperatures
        for verifier in (config.verifiers if temperature and config.verifiers else [DecodeConfig(1, temperature).rule])
        for k in ks
        if k != "adaptive" or not get_verifier(verifier).keeps_q
    ]


def _plain(cells: list[Cell], cell: Cell) -> Cell:
    """k = 0 in the cell's own dtype: what its tokens are compared with."""
    return next(c for c in cells if c.setting == cell.setting and c.k == 0 and c.dtype == cell.dtype)


def _fastest(cells: list[Cell], cell: Cell) -> Cell:
    """k = 0 in the dtype that is fastest for it: what its speed is compared with."""
    return max((c for c in cells if c.setting == cell.setting and c.k == 0), key=lambda c: c.rate)


def _row(cell: Cell, plain: Cell, fastest: Cell, gap: Callable[[Cell, int, np.ndarray, int, int], float]) -> dict:
    speedups = cell.rates / fastest.rates
    return {
        "batch": cell.batch,
        "temperature": cell.temperature,
        "k": cell.k,
        "verifier": cell.verifier,
        "dtype": cell.dtype,
        "plain_dtype": fastest.dtype,
        "tokens_per_second": cell.rate,
        "speedup": float(np.median(speedups)),
        "speedups": speedups.tolist(),
        "block_efficiency": len(cell.generations) * cell.emitted / int(cell.count("forwards")),
        "acceptance": (cell.count("accepted") / np.maximum(1, cell.count("drafted"))).tolist(),
        "verify_cost": float(np.median(np.divide(cell.iteration_seconds, fastest.iteration_seconds))),
        "iteration_seconds": cell.iteration_seconds,
        **_identity(cell, plain, gap),
    }


def _identity(cell: Cell, plain: Cell, gap: Callable[[Cell, int, np.ndarray, int, int], float]) -> dict[str, Any]:
    if get_verifier(cell.verifier).keeps_q:  # the tokens depend on the drafts; their law does not
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


def _batch(size: int) -> str:
    return "" if size == 1 else f", batch {size}"


def _parameters(run: LoadedRun) -> dict[str, int]:
    found = costs(run.config, split(run.model)[1])
    return {"trunk": found.trunk_params, "head": found.head_params, "embedding": found.embedding_params}
