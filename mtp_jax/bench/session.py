"""Sessions of the decode benchmark: decoders by dtype that continue the same prompts, and what is timed of them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from mtp_jax.bench.cells import Cell
from mtp_jax.bench.config import BenchConfig
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, for_decoding, with_next_token
from mtp_jax.decode.decoding import ENDLESS, Decoding, Generation, bucket
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.loop import read
from mtp_jax.decode.tune import best_k
from mtp_jax.decode.verify import get_verifier
from mtp_jax.language_model import in_dtype
from mtp_jax.runs.loading import LoadedRun

DTYPES = "float32", "bfloat16"
TRIAL_ROUNDS, TRIAL_FORWARDS = 5, 64


class Decoders(Mapping[str, Decoder]):
    """A run's model laid out for decoding, by dtype: the config's and the other one, the mesh in scope.

    The one that was asked for last is in memory, and no other: laying it out again takes less than it is measured for.
    `next_token` has the same trunks, shared, under a plain next-token table.
    """

    def __init__(self, run: LoadedRun):
        self._run, self._held = run, dict[str, Decoder]()
        self._next_token = dict[str, Decoder]()

    def __getitem__(self, dtype: str) -> Decoder:
        if dtype not in self._held:
            self._held.clear()
            self._next_token.clear()
            own = dtype == self._run.config.model.dtype
            model = self._run.model if own else in_dtype(self._run.model, dtype)  # type: ignore[arg-type]
            self._held[dtype] = for_decoding(model)
        return self._held[dtype]

    def next_token(self, dtype: str) -> Decoder:
        """`self[dtype]` with a plain next-token table in place of its head."""
        decoder = self[dtype]
        if dtype not in self._next_token:
            self._next_token[dtype] = with_next_token(decoder)
        return self._next_token[dtype]

    def __iter__(self) -> Iterator[str]:
        own = self._run.config.model.dtype
        return iter((own, *(dtype for dtype in DTYPES if dtype != own)))

    def __len__(self) -> int:
        return len(DTYPES)


class Session:
    """Decoders by dtype and the prompts that they continue, up to a stop token, the mesh in scope."""

    def __init__(self, models: Decoders, prompts: list[Any], stops: Sequence[int], config: BenchConfig):
        self.models, self.prompts, self.stops, self.config = models, prompts, stops, config
        self.compile_seconds = 0.0

    def asked(self, cell: Cell, first: int, *, endless: bool = False) -> tuple[Decoder, list[Any], DecodeConfig]:
        """A batch of prompts from number `first`. Prompt i is sampled as row i of the seed, whatever the batch.

        `endless`: no stop token ends a text before `new_tokens` do; the programs are the same. Nor does one end what a
        table says that nothing has trained.
        """
        stops = (-1,) * len(self.stops) if endless or cell.next_token else self.stops
        rows: Any = {"seed": self.config.seed, "row": first, "stop_tokens": stops}
        decode = DecodeConfig(self.config.new_tokens, cell.temperature, k=cell.k, verifier=cell.verifier, **rows)
        model = self.models.next_token(cell.dtype) if cell.next_token else self.models[cell.dtype]
        return model, self.prompts[first : first + cell.batch], decode

    def shapes(self, batch: int) -> list[int]:
        """The number of the first prompt of one batch of each shape: what is compiled for that serves all like it."""
        found: dict[int, int] = {}
        for first in range(0, len(self.prompts), batch):
            found.setdefault(bucket(max(map(len, self.prompts[first : first + batch]))), first)
        return list(found.values())

    def compile(self, cell: Cell, shapes: Iterable[int]) -> None:
        """Prefill and one iteration of each of these batches; of a cache that attention reads in part, the loop of each
        part.

        What k = "auto" stands for is chosen before, on the first prompts, and is no part of the time.
        """
        if cell.auto:
            cell.k = best_k(*self.asked(cell, 0))
        for first in shapes:
            begun, decoding = time.perf_counter(), Decoding(*self.asked(cell, first, endless=True))
            decoding.prefill()
            decoding.advance(1)
            for attended in decoding.programs:
                decoding.enter(0, attended)
            decoding.wait()
            self.compile_seconds += time.perf_counter() - begun

    def decode(self, cell: Cell, first: int, forwards: int = ENDLESS) -> tuple[Generation, float, float]:
        """(what was decoded, seconds of prefill, seconds of the loop), of so many forwards or up to where texts end."""
        decoding = Decoding(*self.asked(cell, first, endless=forwards != ENDLESS))
        t0 = time.perf_counter()
        decoding.prefill()
        t1 = time.perf_counter()
        decoding.advance(forwards)
        decoding.wait()
        t2 = time.perf_counter()
        return decoding.result(), t1 - t0, t2 - t1

    def trial(self, cell: Cell) -> dict[str, float]:
        """Forwards per second of a cell in each dtype, one after the other, in a few short runs: a slower one gets no
        more."""
        cells = {dtype: dataclasses.replace(cell, dtype=dtype) for dtype in self.models}
        # So few that they are needed even if all drafts are accepted.
        forwards = max(1, min(TRIAL_FORWARDS, (self.config.new_tokens - 1) // (cell.k + 1)))
        rates = {}
        for dtype, cell in cells.items():
            self.compile(cell, [0])
            seconds = [self.decode(cell, 0, forwards)[-1] for _ in range(TRIAL_ROUNDS)]
            rates[dtype] = float(forwards / np.median(seconds))
        return rates

    def gap(self, cell: Cell, index: int, shared: np.ndarray, own: int, other: int) -> float:
        """By how much prompt `index`, continued by the tokens `shared`, prefers one of two tokens to the other.

        What is compared is what plain decoding takes the argmax of: the log-probabilities at temperature 0, and above
        it the logits with their noise. Neither run is believed: the model reads the whole text again.
        """
        rows: Any = {"seed": self.config.seed, "row": index}
        decode = DecodeConfig(1, cell.temperature, k=0, verifier=cell.verifier, **rows)
        d = Decoding(self.models[cell.dtype], [np.concatenate([self.prompts[index], shared])], decode)
        scores_V = np.asarray(_scores(d.plan.verifier, d.decoder, d.prompt_BP, d.length_B, d.sampling))[0]
        return abs(float(scores_V[own] - scores_V[other]))


@functools.partial(jax.jit, static_argnames="verifier")
def _scores(verifier: str, decoder: Decoder, prompt_BP: Array, length_B: Array, sampling: Sampling) -> Array:
    """What the token after each prompt is the argmax of, `[B, V]`."""
    last, _ = read(decoder, prompt_BP, length_B)
    rule = get_verifier(verifier)
    logits_B1V = rule.law(decoder.target(decoder.seen(*last))[0], sampling, filtered=False)
    noise_B1V = rule.noise(sampling, length_B, 1, logits_B1V.shape[-1])
    return (logits_B1V if noise_B1V is None else logits_B1V + noise_B1V)[:, 0]
