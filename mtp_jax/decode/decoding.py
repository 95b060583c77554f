"""Decoding of a batch of prompts: what its loop is compiled for, its arrays, and how far it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.arrays import row_keys
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, Packed, mesh_in_scope
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.loop import Limits, Plan, prefill, run
from mtp_jax.decode.state import DecodeState
from mtp_jax.decode.verify import get_verifier
from mtp_jax.sharding import RULES
from mtp_jax.validate import each, require

Prompt = Sequence[int] | np.ndarray

SMALLEST_ATTENDED = 512
"""Slots that attention reads at no cost that matters next to the weights."""

ENDLESS = 2**31 - 1
"""More forwards than any row has."""


@dataclass(frozen=True)
class Generation:
    """Tokens that were decoded, and counts.

    `tokens`: each row's new tokens, a stop token included. `forwards`: target forwards per row, prefill excluded.
    `accepted`: how often the draft at each offset was accepted, per row, `[B, k]`. `drafted`: how often there was one.
    `logprobs`: log-probability of each new token under the target as the model has it: before temperature and filters.
    `finite`: whether all of a row's are numbers. A row ends with the first token whose law is not (`finite` is then
    False): that token is in the vocabulary and means nothing.
    `k`: the drafts per forward that the loop was compiled for.
    """

    tokens: list[np.ndarray]
    forwards: np.ndarray
    accepted: np.ndarray
    drafted: np.ndarray
    logprobs: list[np.ndarray]
    finite: np.ndarray
    k: int

    @property
    def block_efficiency(self) -> float:
        """Tokens emitted per target forward, prefill and the token it gives excluded."""
        emitted = sum(max(0, len(row) - 1) for row in self.tokens)
        return emitted / max(1, int(self.forwards.sum()))

    @property
    def acceptance(self) -> list[float]:
        """At each offset, the fraction of drafts that was accepted."""
        return [float(a) for a in self.accepted.sum(0) / np.maximum(1, self.drafted.sum(0))]


def bucket(length: int) -> int:
    """The smallest power of two that holds `length`, at least 16: another length in it does not compile again."""
    return max(16, 1 << (length - 1).bit_length())


class Decoding:
    """A batch of prompts and how far it is decoded.

        decoding = Decoding(decoder, prompts, DecodeConfig(max_new_tokens=64))
        while not decoding.done:
            decoding.advance(16)
        decoding.result().tokens

    `plan` is what the loop is compiled for. Nothing is computed before `prefill` or the first look at `state`.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], config: DecodeConfig):
        """Check what is asked and lay it out.

        Args:
          decoder: what `for_decoding` made, its mesh in scope.
          prompts: token ids of each row; they may differ in length.
          config: k is a number; `tuned` chooses one for "auto".

        Raises:
          ConfigError: a bad value; the message names it and what is allowed.
        """
        prompts = config.check(decoder.config, decoder.head.config, prompts)
        require(not isinstance(config.k, str), f"k is {config.k!r}; give a number, or call `tuned`, which chooses one.")
        get_verifier(config.rule)
        window, batch = decoder.head.config.window, len(prompts)

        def rows(values: Any, dtype: type) -> np.ndarray:
            return np.broadcast_to(np.asarray(values, dtype), (batch,))

        width = bucket(max(len(p) for p in prompts))
        prompt_BP = np.zeros((batch, width), np.int32)
        for row, prompt in zip(prompt_BP, prompts, strict=True):
            row[: len(prompt)] = prompt
        length_B = np.array([len(p) for p in prompts], np.int32)
        new_B = rows(config.max_new_tokens, np.int32)
        most_B = rows(window - 1 if config.k is None else config.k, np.int32)
        # Every forward writes k + 1 positions, the last of them up to k behind the limit.
        slots = width + bucket(int(new_B.max())) + window
        self.sampling, filtered = sampling_of(config, batch, decoder.config.vocab_size)
        self.decoder, self._packed = decoder, Packed.of(decoder)
        self.plan = Plan(int(most_B.max()), config.rule, slots, filtered)
        self.prompt_BP, self.length_B = put_rows(prompt_BP), put_rows(length_B)
        self.limits = Limits(put_rows(length_B + new_B), put_rows(most_B))
        self.stops_n = jnp.asarray(np.array(config.stop_tokens, np.int32))

    @functools.cached_property
    def state(self) -> DecodeState:
        """Where every row is: at first behind the one token that prefill commits."""
        arrays = self.prompt_BP, self.length_B, self.limits, self.sampling, self.stops_n
        return prefill(self.plan, self._packed, *arrays)

    def prefill(self) -> None:
        """Read the prompts and commit one token of each, be it for the first time or again."""
        self.__dict__.pop("state", None)  # its memory is free for the new one
        self.wait()

    def wait(self) -> None:
        """Wait for the device."""
        jax.block_until_ready(self.state)

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return bool(np.all(np.asarray(self.state.done_B)))  # of a JAX array it would compile

    @property
    def attended(self) -> int | None:
        """The smallest bucket, of at most half the slots, that attention may read for the next forward; None: all.

        A loop is compiled for each, so there are few: powers of two from `SMALLEST_ATTENDED`.
        """
        if self.plan.slots < 2 * SMALLEST_ATTENDED:
            return None  # without waiting for the device
        longest = int(np.max(np.where(np.asarray(self.state.done_B), 0, np.asarray(self.state.length_B))))
        size = max(SMALLEST_ATTENDED, bucket(longest + self.plan.k))
        return size if 2 * size <= self.plan.slots else None

    @property
    def programs(self) -> list[int | None]:
        """All that `attended` may be, of this batch or of another of its shapes: a loop is compiled for each."""
        slots, width = self.plan.slots, self.prompt_BP.shape[1]
        # The longest prompt fills more than half the width, but its row may end before the others.
        size, found = (max(SMALLEST_ATTENDED, width) if len(self.length_B) == 1 else SMALLEST_ATTENDED), []
        while 2 * size <= slots:
            found.append(size)
            size *= 2
        return [*found, None]

    def advance(self, max_forwards: int = ENDLESS) -> None:
        """Decode until every row has ended, or for `max_forwards` forwards.

        The loop is entered once for each bucket of the cache that the rows grow through; most caches are small enough
        for one.
        """
        while (size := self.attended) is not None:
            before_B = np.array(self.state.forwards_B)
            self.enter(max_forwards, size)
            # A row that is live was so from the start: the most forwards of a row are those of the loop.
            max_forwards -= int(np.max(np.asarray(self.state.forwards_B) - before_B))
            if max_forwards == 0 or self.done:
                return
        self.enter(max_forwards)

    def enter(self, max_forwards: int, attended: int | None = None) -> None:
        """Enter the loop once. It ends too when a row grows out of the `attended` slots (None: all)."""
        plan = dataclasses.replace(self.plan, attended=attended)
        self.state = run(plan, self._packed, self.state, self.sampling, self.stops_n, np.int32(max_forwards))

    def end(self, rows_B: np.ndarray) -> None:
        """End these rows here, whatever they lack."""
        done_B = put_rows(np.asarray(self.state.done_B) | rows_B)
        self.state = dataclasses.replace(self.state, done_B=done_B)

    def parts(self, seen: int) -> list[tuple[np.ndarray, int]]:
        """The first row behind `seen` new tokens, by forward: (tokens, how many of them are accepted drafts)."""
        new = slice(int(self.length_B[0]) + seen, int(self.state.length_B[0]))
        tokens, flags = np.array(self.state.tokens_BS)[0, new], self.state.accepted_BS
        drafts = np.zeros(len(tokens), bool) if flags is None else np.asarray(flags)[0, new]
        # The last token of a forward is the target's own, or the row has ended.
        ends = np.flatnonzero(~drafts[:-1]) + 1
        parts = zip(np.split(tokens, ends), np.split(drafts, ends), strict=True)
        return [(part, int(accepted.sum())) for part, accepted in parts]

    def result(self) -> Generation:
        """The new tokens so far, and the counts."""
        state = self.state
        spans = list(zip(np.asarray(self.length_B), np.asarray(state.length_B), strict=True))
        tokens, logprobs = (
            [row[begin:end].copy() for row, (begin, end) in zip(np.asarray(array), spans, strict=True)]
            for array in (state.tokens_BS, state.logp_BS)
        )
        # Copies, as above: the state's own memory is given to the next forward.
        arrays = state.forwards_B, state.accepted_Bk, state.drafted_Bk, state.finite_B
        forwards, accepted, drafted, finite = map(np.array, arrays)
        return Generation(tokens, forwards, accepted, drafted, logprobs, finite, self.plan.k)


def sampling_of(config: DecodeConfig, batch: int, vocab_size: int) -> tuple[Sampling, bool]:
    """How each row of a batch samples, on the mesh in scope; and whether any sets top-k or top-p."""
    seeds = np.asarray(config.seeds, np.uint32)
    row_B = np.zeros(batch, np.uint32) if seeds.ndim else np.arange(config.row, config.row + batch, dtype=np.uint32)
    # More than there are keeps all.
    top_k = [min(top_k, vocab_size) for top_k in each(config.top_k)]
    values = ((config.temperature, np.float32), (top_k, np.int32), (config.top_p, np.float32), (seeds, np.uint32))
    temperature_B, top_k_B, top_p_B, seed_B = (np.broadcast_to(np.asarray(v, t), (batch,)) for v, t in values)
    law = map(put_rows, (temperature_B, top_k_B, top_p_B, row_keys(seed_B, row_B)))
    return Sampling(*law), bool((top_k_B > 0).any() or (top_p_B < 1).any())


def put_rows(array: np.ndarray | Array) -> Array:
    """Put an array on the mesh in scope, its first axis over the batch axes."""
    mesh = mesh_in_scope()
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        array.shape[0] % devices == 0,
        f"The batch has {array.shape[0]} prompts and the mesh {devices} data x fsdp devices, which must divide it.",
    )
    return jax.device_put(array, jax.NamedSharding(mesh, RULES.rows_B))
