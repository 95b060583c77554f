"""Public decoding: prompts in, tokens out, at once or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from mtp_jax.config import DecodeConfig, require
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.loop import Plan, prefill, run
from mtp_jax.decode.state import DecodeState, Stops
from mtp_jax.decode.verify import get_verifier
from mtp_jax.model.block import Block
from mtp_jax.model.transformer import LanguageModel, unstack
from mtp_jax.sharding import RULES, gather

Prompt = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    `tokens`: each row's new tokens, a stop token included. `forwards`: target forwards per row, prefill excluded.
    `accepted`: how often the draft at each offset was accepted, per row, `[B, k]`.
    """

    tokens: list[np.ndarray]
    forwards: np.ndarray
    accepted: np.ndarray

    @property
    def block_efficiency(self) -> float:
        """Tokens emitted per target forward, prefill and the token it gives excluded."""
        emitted = sum(max(0, len(row) - 1) for row in self.tokens)
        return emitted / max(1, int(self.forwards.sum()))

    @property
    def acceptance(self) -> list[float]:
        """At each offset, the fraction of drafts that was accepted."""
        return [float(a) for a in self.accepted.sum(0) / max(1, int(self.forwards.sum()))]


@dataclass(frozen=True)
class Request:
    """A batch that is ready to decode: the plan to compile for and its arrays. Made by `make_request`."""

    plan: Plan
    prompt_BP: Array
    length_B: Array
    limit_B: Array
    sampling: Sampling
    stops: Stops


def bucket(length: int) -> int:
    """The smallest power of two that holds `length`, at least 16: another length in it does not compile again."""
    return max(16, 1 << (length - 1).bit_length())


def for_decoding(model: LanguageModel) -> LanguageModel:
    """The model as decoding wants it: layers unstacked, matrices in the compute dtype and whole along `fsdp`."""

    def cast(path: tuple[Any, ...], weight: Array) -> Array:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        # Norms and the gate compute in float32. Gathered once, not at every step.
        return gather(weight if names & {"scale", "gate_DR"} else weight.astype(model.config.dtype))

    def convert(model: LanguageModel) -> LanguageModel:
        model = unstack(model) if isinstance(model.blocks, Block) else model
        return jax.tree_util.tree_map_with_path(cast, model)

    _mesh()
    return jax.jit(convert)(model)


def make_request(model: LanguageModel, prompts: Sequence[Prompt], config: DecodeConfig) -> Request:
    """Check what the user asks for and lay it out. Errors as in `generate`."""
    config.check(model.config, model.head.config, prompts)
    window = model.head.config.window
    k = window - 1 if config.k is None else config.k
    get_verifier(config.rule)

    batch, width = len(prompts), bucket(max(len(p) for p in prompts))
    padded = np.zeros((batch, width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    # Every forward writes k + 1 positions, the last of them up to k behind the limit.
    slots = width + bucket(config.max_new_tokens) + window
    sampling = Sampling(
        _rows(np.full(batch, config.temperature, np.float32)),
        _rows(np.full(batch, config.top_k, np.int32)),
        _rows(np.full(batch, config.top_p, np.float32)),
        _rows(jax.vmap(jax.random.key)(np.arange(config.seed, config.seed + batch, dtype=np.uint32))),
    )
    plan = Plan(k, config.rule, slots, filtered=config.top_k > 0 or config.top_p < 1)
    stops = Stops(jnp.asarray(np.array(config.stop_tokens, np.int32)))
    return Request(plan, _rows(padded), _rows(lengths), _rows(lengths + config.max_new_tokens), sampling, stops)


def start(model: LanguageModel, request: Request) -> DecodeState:
    """Prefill: the state after the first committed token."""
    r = request
    return prefill(r.plan, model, r.prompt_BP, r.length_B, r.limit_B, r.sampling, r.stops)


def proceed(model: LanguageModel, request: Request, state: DecodeState, max_forwards: int = 2**31 - 1) -> DecodeState:
    """At most `max_forwards` iterations of the loop. The state is donated."""
    return run(request.plan, model, state, request.sampling, request.stops, np.int32(max_forwards))


def result(request: Request, state: DecodeState) -> Generation:
    """Fetch a state's new tokens and counts."""
    tokens, begin, end = (np.asarray(a) for a in (state.tokens_BS, request.length_B, state.length_B))
    rows = [row[b:e] for row, b, e in zip(tokens, begin, end, strict=True)]
    return Generation(rows, np.asarray(state.forwards_B), np.asarray(state.accepted_Bk))


def generate(model: LanguageModel, prompts: Sequence[Prompt], **options: Any) -> Generation:
    """Continue every prompt. The output law is the target's, whatever `k` is.

    Args:
      model: a model, best one that `for_decoding` has laid out (it is laid out on the fly if not).
      prompts: token ids of each row; they may differ in length.
      options: the fields of `DecodeConfig`: max_new_tokens, temperature, top_k, top_p, seed, k, verifier, stop_tokens.

    Raises:
      ConfigError: a bad value; the message names it and what is allowed.
    """
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


def _mesh() -> AbstractMesh | Mesh:
    """The mesh in scope. Raises `ConfigError` if there is none."""
    mesh = jax.sharding.get_mesh()
    require(not mesh.empty, "No mesh in scope; decode under `with jax.set_mesh(mtp_jax.make_mesh()):`.")
    return mesh


def _rows(array: np.ndarray | Array) -> Array:
    """Put an array on the mesh in scope, its first axis over the batch axes."""
    mesh = _mesh()
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        array.shape[0] % devices == 0,
        f"The batch has {array.shape[0]} prompts and the mesh {devices} data x fsdp devices, which must divide it.",
    )
    return jax.device_put(array, jax.NamedSharding(mesh, RULES.rows_B))
