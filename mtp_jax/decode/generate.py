"""Public decoding: prompts in, tokens out, at once or as a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.config import require
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.layout import for_decoding, mesh_in_scope
from mtp_jax.decode.loop import Limits, Plan, prefill, run
from mtp_jax.decode.state import DecodeState, Stops
from mtp_jax.decode.verify import get_verifier
from mtp_jax.model.block import Block
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.sharding import RULES

Prompt = Sequence[int] | np.ndarray

SMALLEST_WINDOW = 512
"""Slots that attention reads at no cost that matters next to the weights."""


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    `tokens`: each row's new tokens, a stop token included. `forwards`: target forwards per row, prefill excluded.
    `accepted`: how often the draft at each offset was accepted, per row, `[B, k]`. `drafted`: how often there was one.
    `logprobs`: log-probability of each new token under the target as the model has it: before temperature and filters.
    `finite`: whether all of a row's are numbers. A row ends with the first token whose law is not (`finite` is then
    False): that token is in the vocabulary and means nothing.
    """

    tokens: list[np.ndarray]
    forwards: np.ndarray
    accepted: np.ndarray
    drafted: np.ndarray
    logprobs: list[np.ndarray]
    finite: np.ndarray

    @property
    def block_efficiency(self) -> float:
        """Tokens emitted per target forward, prefill and the token it gives excluded."""
        emitted = sum(max(0, len(row) - 1) for row in self.tokens)
        return emitted / max(1, int(self.forwards.sum()))

    @property
    def acceptance(self) -> list[float]:
        """At each offset, the fraction of drafts that was accepted."""
        return [float(a) for a in self.accepted.sum(0) / np.maximum(1, self.drafted.sum(0))]


@dataclass(frozen=True)
class Request:
    """A batch that is ready to decode: the plan to compile for and its arrays. Made by `make_request`."""

    plan: Plan
    prompt_BP: Array
    length_B: Array
    limits: Limits
    sampling: Sampling
    stops: Stops


def bucket(length: int) -> int:
    """The smallest power of two that holds `length`, at least 16: another length in it does not compile again."""
    return max(16, 1 << (length - 1).bit_length())


def make_request(model: LanguageModel, prompts: Sequence[Prompt], config: DecodeConfig) -> Request:
    """Check what the user asks for and lay it out. Errors as in `generate`."""
    config.check(model.config, model.head.config, prompts)
    window, batch = model.head.config.window, len(prompts)
    get_verifier(config.rule)

    def rows(values: Any, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype), (batch,))

    width = bucket(max(len(p) for p in prompts))
    padded = np.zeros((batch, width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    new, most = rows(config.max_new_tokens, np.int32), rows(window - 1 if config.k is None else config.k, np.int32)
    top_k, top_p = rows(config.top_k, np.int32), rows(config.top_p, np.float32)
    # Every forward writes k + 1 positions, the last of them up to k behind the limit.
    slots = width + bucket(int(new.max())) + window
    filtered = bool((top_k > 0).any() or (top_p < 1).any())
    plan = Plan(int(most.max()), config.rule, slots, filtered, config.draft)
    seeds = np.asarray(config.seed, np.uint32)
    seeds = seeds if seeds.ndim else seeds + np.arange(batch, dtype=np.uint32)
    temperature = rows(config.temperature, np.float32)
    keys = jax.vmap(jax.random.key)(seeds)
    sampling = Sampling(put_rows(temperature), put_rows(top_k), put_rows(top_p), put_rows(keys))
    confidence = rows(config.min_confidence, np.float32)
    limits = Limits(put_rows(lengths + new), put_rows(most), put_rows(confidence) if confidence.any() else None)
    stops = Stops(jnp.asarray(np.array(config.stop_tokens, np.int32)))
    return Request(plan, put_rows(padded), put_rows(lengths), limits, sampling, stops)


def start(model: LanguageModel, request: Request) -> DecodeState:
    """Prefill: the state after the first committed token."""
    r = request
    return prefill(r.plan, model, r.prompt_BP, r.length_B, r.limits, r.sampling, r.stops)


def proceed(model: LanguageModel, request: Request, state: DecodeState, max_forwards: int = 2**31 - 1) -> DecodeState:
    """At most `max_forwards` iterations of the loop. The state is donated.

    The loop is entered once for each window that the rows grow through; most caches are small enough for one.
    """
    while True:
        size = window(request.plan, state)
        if size is None:
            return enter(model, request, state, size, max_forwards)
        seen_B = np.array(state.forwards_B)
        state = enter(model, request, state, size, max_forwards)
        # A row that is live was so from the start: the most forwards of a row are those of the loop.
        max_forwards -= int(np.max(np.asarray(state.forwards_B) - seen_B))
        if max_forwards == 0 or np.all(state.done_B):
            return state


def enter(
    model: LanguageModel, request: Request, state: DecodeState, window: int | None, max_forwards: int
) -> DecodeState:
    """`proceed`, at most until a row grows out of `window`, that which `window` gives for the state."""
    plan = dataclasses.replace(request.plan, window=window)
    return run(plan, model, state, request.sampling, request.stops, np.int32(max_forwards))


def window(plan: Plan, state: DecodeState) -> int | None:
    """The smallest bucket, of at most half the slots, that attention may read for the next forward; None: all slots.

    A loop is compiled for each, so there are few: powers of two from `SMALLEST_WINDOW`.
    """
    if plan.slots < 2 * SMALLEST_WINDOW:
        return None  # without waiting for the device
    longest = int(np.max(np.where(state.done_B, 0, state.length_B)))
    size = max(SMALLEST_WINDOW, bucket(longest + plan.k))
    return size if 2 * size <= plan.slots else None


def result(request: Request, state: DecodeState) -> Generation:
    """Fetch a state's new tokens and counts."""
    spans = list(zip(np.asarray(request.length_B), np.asarray(state.length_B), strict=True))
    tokens, logprobs = (
        [row[begin:end] for row, (begin, end) in zip(np.asarray(array), spans, strict=True)]
        for array in (state.tokens_BS, state.logp_BS)
    )
    forwards, accepted, drafted = (np.asarray(a) for a in (state.forwards_B, state.accepted_Bk, state.drafted_Bk))
    return Generation(tokens, forwards, accepted, drafted, logprobs, np.asarray(state.finite_B))


def generate(model: LanguageModel, prompts: Sequence[Prompt], **options: Any) -> Generation:
    """Continue every prompt. The output law is the target's, whatever `k` is.

    Args:
      model: a model, best one that `for_decoding` has laid out (it is laid out on the fly if not).
      prompts: token ids of each row; they may differ in length.
      options: the fields of `DecodeConfig`; max_new_tokens, temperature, top_k, top_p, seed, k and min_confidence may
        each be one value, or one per row. k may also be "adaptive": see `mtp_jax.decode.adaptive`.

    Raises:
      ConfigError: a bad value; the message names it and what is allowed.
    """
    if isinstance(options.get("k"), str) and options["k"] == "adaptive":
        from mtp_jax.decode.adaptive import generate_adaptive  # it is built on this module

        return generate_adaptive(model, prompts, **{name: value for name, value in options.items() if name != "k"})
    model = model if not isinstance(model.blocks, Block) else for_decoding(model)
    request = make_request(model, prompts, DecodeConfig(**options))
    return result(request, proceed(model, request, start(model, request)))


def stream(model: LanguageModel, prompt: Prompt, **options: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Continue one prompt and yield, after each forward, (the new tokens, how many of them were accepted drafts).

    Arguments as in `generate`. The last token of a forward is the target's own unless the row ended before it.
    """
    model = model if not isinstance(model.blocks, Block) else for_decoding(model)
    request = make_request(model, [prompt], DecodeConfig(**options))
    state = start(model, request)
    seen = accepted = 0
    while True:
        now = result(request, state)
        new, total = now.tokens[0][seen:], int(now.accepted.sum())
        yield new, min(len(new), total - accepted)
        seen, accepted = seen + len(new), total
        if bool(state.done_B[0]):
            return
        state = proceed(model, request, state, 1)


def put_rows(array: np.ndarray | Array) -> Array:
    """Put an array on the mesh in scope, its first axis over the batch axes."""
    mesh = mesh_in_scope()
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        array.shape[0] % devices == 0,
        f"The batch has {array.shape[0]} prompts and the mesh {devices} data x fsdp devices, which must divide it.",
    )
    return jax.device_put(array, jax.NamedSharding(mesh, RULES.rows_B))
