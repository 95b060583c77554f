"""Continuous batching: requests come and go, one batch decodes, and nothing is compiled for a new mixture of them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.decoding import Decoding, Prompt, bucket
from mtp_jax.language_model import LanguageModel
from mtp_jax.validate import require

SHARED = "verifier", "stop_tokens"  # options that belong to all rows

Rows = TypeVar("Rows")  # a tree of arrays whose first axis is the batch


class Progress(NamedTuple):
    """What a request produced in one step: new `tokens` and their `logprobs`, as in `Generation`.

    `finished`: whether these are its last. `finite`: as in `Generation`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool
    finite: bool


@dataclass
class _Row:
    """A request. `seen` counts the tokens that its caller has, prompt included."""

    number: int
    prompt: np.ndarray
    config: DecodeConfig
    seen: int


class Slots:
    """`size` rows that decode together; a row that has ended gives its slot to the next request::

        slots = Slots(model, size=8, max_prompt=512, max_new=256, temperature=0.7)
        slots.submit(prompt, max_new_tokens=40)
        while slots.busy:
            for number, progress in slots.step().items(): ...

    A request's output is that of `generate` for its prompt and options alone, whatever slot it gets, whatever else is
    decoded and however many forwards a step takes. A bucket of prompt lengths compiles its prefill at its first use,
    and requests with top-k or top-p do so for themselves; nothing else compiles after the first step.
    """

    def __init__(self, model: LanguageModel, *, size: int, max_prompt: int, max_new: int, **options: Any):
        """Allocate `size` rows of bucket(max_prompt) + bucket(max_new) + W positions.

        Args:
          model: as in `generate`; the mesh in scope has one data x fsdp device.
          size: rows of the batch.
          max_prompt: the longest prompt, in tokens.
          max_new: the most new tokens of a request, which it gets if it does not say.
          options: the fields of `DecodeConfig`, one value each. `verifier` and `stop_tokens` hold for all requests;
            `k` is the most drafts of any, a number; the others are what requests have that do not say. Request i
            samples as row `row` + i of that seed.

        Raises:
          ConfigError: a bad value; the message names it and what is allowed.
        """
        for name, value in (("size", size), ("max_prompt", max_prompt), ("max_new", max_new)):
            require(value >= 1, f"Slots: {name} is {value}; it must be at least 1.")
        mesh = jax.sharding.get_mesh()
        devices = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        require(
            devices == 1, f"Slots: the mesh has {devices} data x fsdp devices and they decode on 1; make one of each."
        )
        self._decoder = for_decoding(model)
        self._max_prompt, self._max_new = max_prompt, max_new
        self._config = DecodeConfig(**{"max_new_tokens": max_new, **options})
        _number(self._config)
        self._config.check(model.config, model.head.config, [[0]])
        _fits("max_new_tokens", self._config.max_new_tokens, "max_new", max_new)
        # An idle slot holds a row that has ended, with its one token.
        config = dataclasses.replace(self._config, max_new_tokens=1)
        idle, self._batch = (Decoding(self._decoder, [[0]] * rows, config) for rows in (1, size))
        slots = bucket(max_prompt) + bucket(max_new) + model.head.config.window
        self._plan = idle.plan = dataclasses.replace(idle.plan, slots=slots, filtered=False)
        self._batch.state, self._batch.sampling = _repeat((idle.state, idle.sampling), size)
        self._rows: list[_Row | None] = [None] * size
        self._queue: collections.deque[_Row] = collections.deque()
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether any request has not finished."""
        return bool(self._queue) or any(self._rows)

    def submit(self, prompt: Prompt, **options: Any) -> int:
        """Queue a prompt, and return its number: 0, 1, 2 ...

        Args:
          prompt: token ids, at most `max_prompt`.
          options: max_new_tokens, temperature, top_k, top_p, seed and k of this request.

        Raises:
          ConfigError: a bad value, or an option that belongs to all requests.
        """
        for name in SHARED:
            require(name not in options, f"{name} belongs to all requests; give it to Slots(...), not to submit.")
        given = {name: value for name, value in options.items() if value is not None}
        row = 0 if "seed" in given else self._config.row + self._submitted
        config = dataclasses.replace(self._config, verifier=None, **{"row": row, **given})
        _number(config)
        require(
            self._plan.verifier != "greedy" or config.greedy,
            f"temperature is {config.temperature} and these slots are greedy; make them with verifier='coupled'.",
        )
        config = dataclasses.replace(config, verifier=self._plan.verifier)
        config.check(self._decoder.config, self._decoder.head.config, [prompt])
        _fits("The prompt's length", len(prompt), "max_prompt", self._max_prompt)
        _fits("max_new_tokens", config.max_new_tokens, "max_new", self._max_new)
        _fits("k", config.k or 0, "k", self._plan.k)
        self._queue.append(_Row(self._submitted, np.array(prompt), config, len(prompt)))
        self._submitted += 1
        return self._submitted - 1

    def step(self, max_forwards: int = 16) -> dict[int, Progress]:
        """Fill the free slots, decode for at most `max_forwards` forwards, and return what each request produced.

        A slot that becomes free waits for the next step, so few forwards keep slots busy and many cost fewer calls.
        """
        require(max_forwards >= 1, f"max_forwards is {max_forwards}; it must be at least 1.")
        for slot, row in enumerate(self._rows):
            if row is None and self._queue:
                self._rows[slot] = self._fill(slot, self._queue.popleft())
        filtered = any(row and (row.config.top_k or row.config.top_p != 1) for row in self._rows)
        self._batch.plan = dataclasses.replace(self._plan, filtered=filtered)
        self._batch.enter(max_forwards)
        state = self._batch.state
        tokens_BS, logp_BS, length_B, done_B, finite_B = jax.device_get(
            (state.tokens_BS, state.logp_BS, state.length_B, state.done_B, state.finite_B)
        )
        progress = {}
        for slot, row in enumerate(self._rows):
            if row is None:
                continue
            new = slice(row.seen, int(length_B[slot]))
            row.seen = new.stop
            # Copies: the state's own memory is given to the next step.
            tokens, logprobs = tokens_BS[slot, new].copy(), logp_BS[slot, new].copy()
            progress[row.number] = Progress(tokens, logprobs, bool(done_B[slot]), bool(finite_B[slot]))
            if done_B[slot]:
                self._rows[slot] = None
        return progress

    def _fill(self, slot: int, row: _Row) -> _Row:
        """Prefill the request alone, as `generate` does, and put it into the batch."""
        alone = Decoding(self._decoder, [row.prompt], row.config)
        alone.plan = dataclasses.replace(self._plan, filtered=alone.plan.filtered)
        batch = self._batch
        batch.state, batch.sampling = _insert(
            (batch.state, batch.sampling), (alone.state, alone.sampling), np.int32(slot)
        )
        return row


def _number(config: DecodeConfig) -> None:
    require(
        not isinstance(config.k, str),
        f"Slots: k is {config.k!r}, and the loop is compiled before requests come; give a number, such as the `k` of "
        "what generate(..., k='auto') returns.",
    )


def _fits(name: str, value: Any, bound: str, most: int) -> None:
    require(value <= most, f"{name} is {value} and these slots have {bound} = {most}; make larger ones.")


@functools.partial(jax.jit, static_argnames="size")
def _repeat(row: Rows, size: int) -> Rows:
    """A batch of `size` times the same row."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape[1:]), out_sharding=jax.typeof(a).sharding), row)


@functools.partial(jax.jit, donate_argnames="batch")
def _insert(batch: Rows, row: Rows, slot: Array) -> Rows:
    """`batch` with all of row `slot` replaced: NaN that a broken row left in the cache would show through masks."""

    def put(rows: Array, row: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(rows, row, slot, axis=0)

    return jax.tree.map(put, batch, row)
