"""Gates: what must hold of a head on a trunk before its figures are believed.

| gate | what is looked at | passed |
| --- | --- | --- |
| start | the head before its first step, on texts of the model | it drafts by the base's law, within 0.01 nats |
| shuffled | its drafts where tokens are dealt out anew, and hidden states stay | they hit at most 0.02 more than the \
most frequent token |
| cache | a base's logits from its trunk and from the cached states, on 100 rows | they have the same law, and \
the kept normaliser is that of the states |
| decoding | decoding's counters beside what is expected of the texts that it wrote | inside the 95% interval |
| greedy | greedy decoding with and without drafts, in float32 | token for token the same |

A head that peeks at what it drafts, a cache of another base, a decoder that reads another head state than training:
each of them looks good in one figure and fails a gate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array, lax

from mtp_jax.arrays import random_key
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.placement import place
from mtp_jax.data.rows import pack
from mtp_jax.data.store import Store
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, for_decoding
from mtp_jax.decode.decoding import Generation
from mtp_jax.decode.expectation import Blocks, Expectation, draw, expectation, hidden_states, padded
from mtp_jax.decode.generate import generate
from mtp_jax.heads.factors import FACTORS
from mtp_jax.heads.shortlist import put_listed
from mtp_jax.language_model import LanguageModel, in_dtype
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import build_model, split
from mtp_jax.train.evaluate import groups

START, SHUFFLED, CACHE_ROWS, DRAWS = 0.01, 0.02, 100, 4000
SAME_LAW = {"float32": 1e-5}
"""Nats between two laws that are computed alike in a dtype, at most."""
SAME_LAW_ELSE = 1e-3
SAME_NORMALISER = 0.01
"""Nats between a normaliser that was kept and that of the states beside it, at most."""
POSITIONS = 64
"""Whose logits are alive at a time."""


@dataclass(frozen=True)
class Gate:
    """What a gate found. `passed` is None where the run has nothing that it looks at."""

    name: str
    passed: bool | None
    found: str


def gates(
    run: LoadedRun,
    store: Store | Mixture,
    prompts: list[np.ndarray],
    temperatures: tuple[float, ...],
    k: int,
    new_tokens: int,
) -> Iterator[Gate]:
    """Look at each gate in turn.

    Args:
      run: a run whose head drafts.
      store: its data.
      prompts: token ids, behind which texts are written.
      temperatures: where decoding's counters are compared; at 0 they always are.
      k: drafts per forward.
      new_tokens: how long a text is, at most.

    Raises:
      ConfigError: as decoding does.
    """
    hot = sorted({temperature for temperature in temperatures if temperature > 0})
    with jax.set_mesh(run.mesh):
        at = {temperature: _decode(run, run.decoder, prompts, temperature, k, new_tokens) for temperature in hot}
        exact, decoder = run.model, run.decoder
        if run.config.model.dtype != "float32":
            exact = in_dtype(run.model, "float32")
            decoder = for_decoding(exact)
        plain, drafted = (_decode(run, decoder, prompts, 0.0, each, new_tokens) for each in (0, k))
    texts = at[hot[-1]] if hot else drafted
    decodings = [(run.model if t else exact, decoded, t) for t, decoded in {0.0: drafted, **at}.items()]
    looks = [
        lambda: start(run, texts, k),
        lambda: shuffled(run, texts, k),
        lambda: cached(run, store),
        *(functools.partial(decoding, *one) for one in decodings),
        lambda: greedy(plain, drafted),
    ]
    for look in looks:
        with jax.set_mesh(run.mesh):  # and not while the caller looks at what was found
            found = look()
        yield found


@dataclass(frozen=True)
class Decoded:
    """What was decoded behind a group of prompts; the first `count` rows are no copies."""

    config: DecodeConfig
    prompts: list[np.ndarray]
    made: Generation
    count: int


def _decode(
    run: LoadedRun, decoder: Decoder, prompts: list[np.ndarray], temperature: float, k: int, new_tokens: int
) -> list[Decoded]:
    found, verifier = [], "token" if temperature else "greedy"
    for first, some, count in groups(run, prompts):
        config = DecodeConfig(new_tokens, temperature, row=first, k=k, verifier=verifier, stop_tokens=run.stop_tokens)
        found.append(Decoded(config, some, generate(decoder, some, **vars(config)), count))
    return found


def start(run: LoadedRun, texts: list[Decoded], k: int) -> Gate:
    """Whether the head began with the law of its base: the mean of KL(base, draft) over the positions of texts, where a
    draft has a list over the base's law on that."""
    head = run.config.head
    if not run.config.base:
        return Gate("start", None, "the run has no base; its head and its trunk began at random")
    if head.kind == "mixture" and not FACTORS[head.factors].THROUGH_TABLE:
        return Gate("start", None, f"{head.factors} factors have a table for each offset, which begins at random")
    build = functools.partial(build_model, run.config, trunk=False)
    graph, params = split(run.model)
    fresh = jax.jit(lambda: split(build(random_key(run.config.seed)))[1]["head"])()
    flat: dict[tuple[str, ...], Any] = flatten_dict(params["head"])  # type: ignore[assignment]
    for listed_n in (ids for path, ids in flat.items() if path[-1] == "listed_n"):
        fresh = put_listed(fresh, listed_n)
    model = nnx.merge(graph, {**params, "head": fresh})
    found_k = _mean(model, texts, k, _distance)
    nats = float(np.max(found_k))
    return Gate("start", nats <= START, f"{nats:.2g} nats from the base's law before the first step")


def shuffled(run: LoadedRun, texts: list[Decoded], k: int) -> Gate:
    """Whether drafts hit tokens that have nothing to do with what the head reads: the negative control."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([row for one in texts for row in one.made.tokens[: one.count]])
    most = float(np.max(np.bincount(tokens)) / len(tokens))
    dealt = []
    for one in texts:
        rows = [rng.choice(tokens, len(row)).astype(row.dtype) for row in one.made.tokens]
        dealt.append(dataclasses.replace(one, made=dataclasses.replace(one.made, tokens=rows)))
    hits_k = _mean(run.model, texts, k, _hits, dealt)
    passed = bool(np.max(hits_k) <= most + SHUFFLED)
    return Gate("shuffled", passed, f"hit {_numbers(hits_k)} of the drafts; the most frequent token does {most:.3f}")


def _mean(model: LanguageModel, texts: list[Decoded], k: int, look: Any, read: list[Decoded] | None = None) -> Any:
    """The mean by offset of what `look` finds at the positions of texts behind which k + 1 tokens come; tokens may be
    others than those which the hidden states are of."""
    total_k, positions = np.zeros(k), 0
    for one, other in zip(texts, read or texts, strict=True):
        states = hidden_states(model, one.prompts, one.made.tokens)
        found_BTk = np.asarray(look(model, states, padded(one.prompts, other.made.tokens), k=k), np.float64)
        for b in range(one.count):
            # A block behind the prompt's last token begins with the first new one.
            inside = slice(len(one.prompts[b]) - 1, len(one.prompts[b]) - 1 + max(0, len(one.made.tokens[b]) - k))
            total_k, positions = total_k + found_BTk[b, inside].sum(0), positions + inside.stop - inside.start
    return total_k / max(1, positions)


@functools.partial(jax.jit, static_argnames="k")
def _distance(model: LanguageModel, states: Any, tokens_BT: Array, *, k: int) -> Array:
    """KL(p, q_s) in nats, `[B, T, k]`, where p is the target's law behind a position, on the ids that q_s has."""
    blocks = Blocks.of(model, states, tokens_BT)

    def block(_: None, t: Array) -> tuple[None, Array]:
        logp_BV, found = blocks.target(t), []
        for logq_BV, _token_B in blocks.drafts(t, k):
            own_BV = jax.nn.log_softmax(jnp.where(jnp.isfinite(logq_BV), logp_BV, -jnp.inf), axis=-1)
            found.append(_kl(own_BV, logq_BV))
        return None, jnp.stack(found, axis=-1)

    return jnp.moveaxis(lax.scan(block, None, jnp.arange(tokens_BT.shape[1], dtype=jnp.int32))[1], 0, 1)


@functools.partial(jax.jit, static_argnames="k")
def _hits(model: LanguageModel, states: Any, tokens_BT: Array, *, k: int) -> Array:
    """Whether the most probable draft of each offset is the token that is read there, `[B, T, k]`."""
    blocks = Blocks.of(model, states, tokens_BT)

    def block(_: None, t: Array) -> tuple[None, Array]:
        hits = [jnp.argmax(logq_BV, axis=-1) == token_B for logq_BV, token_B in blocks.drafts(t, k)]
        return None, jnp.stack(hits, axis=-1)

    return jnp.moveaxis(lax.scan(block, None, jnp.arange(tokens_BT.shape[1], dtype=jnp.int32))[1], 0, 1)


def _kl(logp: Array, logq: Array) -> Array:
    """sum p (log p - log q) over the last axis, where p may be 0."""
    p = jnp.exp(logp)
    return jnp.sum(jnp.where(p > 0, p * (jnp.where(p > 0, logp, 0.0) - logq), 0.0), axis=-1)


def cached(run: LoadedRun, store: Store | Mixture) -> Gate:
    """Whether hidden states that were cached are those that the base's trunk gives."""
    if isinstance(store, Mixture) or store.hidden is None:
        return Gate("cache", None, "the run's data has no cached states")
    rows = pack(store.train, store.hidden["seq_len"])
    numbers = np.unique(np.linspace(0, len(rows) - 1, min(CACHE_ROWS, len(rows))).round().astype(int))
    kept_NTD = store.train.hidden
    assert kept_NTD is not None
    each = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    total, worst, off, count = 0.0, 0.0, 0.0, 0
    for first in range(0, len(numbers), each):
        some = numbers[first : first + each]
        some = np.concatenate([some, np.full(each - len(some), some[0])])
        tokens_BT, pieces_BT, _ = rows.read(some)
        batch = {"tokens_BT": tokens_BT, "segments_BT": pieces_BT.astype(np.int32), "x_BTD": kept_NTD[some]}
        if store.train.normaliser is not None:
            batch["normaliser_BT"] = store.train.normaliser[some]
        temperature = store.law_temperature
        found = _moved(run.model, temperature, **place(batch, run.mesh))
        nats_BT, off_BT = (np.asarray(each_BT)[: len(numbers) - first] for each_BT in found)
        inside_BT = pieces_BT[: len(nats_BT)] < len(rows.rows)
        nats_n, off = nats_BT[inside_BT], max(off, float(off_BT[inside_BT].max()))
        total, worst, count = total + float(nats_n.sum()), max(worst, float(nats_n.max())), count + len(nats_n)
    mean, dtypes = total / max(1, count), {store.hidden["dtype"], run.config.model.dtype}
    limit = max(SAME_LAW.get(dtype, SAME_LAW_ELSE) for dtype in dtypes)
    said = f"{mean:.2g} nats from the trunk's law, {worst:.2g} at most, on {len(numbers)} rows"
    if store.law_temperature is not None:
        said += f"; its normaliser off by {off:.2g} at most"
    return Gate("cache", mean <= limit and off <= SAME_NORMALISER, said)


@functools.partial(jax.jit, static_argnums=1)
def _moved(
    model: LanguageModel,
    temperature: float | None,
    tokens_BT: Array,
    segments_BT: Array,
    x_BTD: Array,
    normaliser_BT: Array | None = None,
) -> tuple[Array, Array]:
    """KL in nats, `[B, T]`, of the next token's law from given hidden states behind that from the trunk's; and how far
    a normaliser that is given is from that of these states, `[B, T]`."""
    own_BTD = model.see(tokens_BT, segments_BT).x_BTD
    x_BTD = x_BTD[..., : own_BTD.shape[-1]].astype(own_BTD.dtype)  # taps lie behind them
    some = math.gcd(own_BTD.shape[1], POSITIONS)
    laws = ([*jnp.split(a_BTD, a_BTD.shape[1] // some, axis=1)] for a_BTD in (own_BTD, x_BTD))
    own, kept = (jnp.stack(parts) for parts in laws)
    nats_BT = jnp.concatenate([*lax.map(lambda pair: _kl(*map(model.next_token, pair)), (own, kept))], axis=1)
    if normaliser_BT is None or temperature is None:
        return nats_BT, jnp.zeros_like(nats_BT)
    return nats_BT, jnp.abs(normaliser_BT - model.normaliser(x_BTD, temperature))


def decoding(model: LanguageModel, decoded: list[Decoded], temperature: float) -> Gate:
    """Whether decoding counted what is expected of a head that drafts as it was trained. Given the texts that it wrote,
    each draft's chance is known: the interval is that of all counts together, of decoding the same texts again."""
    parts = [expectation(model, one.prompts, one.made.tokens, one.config).first(one.count) for one in decoded]
    expected = Expectation.together(parts)
    forwards, accepted_k, drafted_k = (
        np.sum([getattr(one.made, name)[: one.count].sum(0) for one in decoded], axis=0)
        for name in ("forwards", "accepted", "drafted")
    )
    emitted = expected.emitted_B.sum()
    forwards_N, accepted_Nk, drafted_Nk = draw(expected, DRAWS)
    counted = np.append(emitted / max(1, forwards), accepted_k / np.maximum(1, drafted_k))
    drawn_N = np.column_stack([emitted / np.maximum(1, forwards_N), accepted_Nk / np.maximum(1, drafted_Nk)])
    tail = 0.05 / 2 / len(counted)  # that all lie inside at once
    low, high = np.quantile(drawn_N, [tail, 1 - tail], axis=0)
    passed = bool(np.all((counted >= low - 1e-9) & (counted <= high + 1e-9)))
    figures = [f"{c:.3f} ({a:.3f} .. {b:.3f})" for c, a, b in zip(counted, low, high, strict=True)]
    said = f"tokens per forward {figures[0]}, accepted {' '.join(figures[1:])}"
    return Gate(f"decoding at {temperature:g}", passed, said)


def greedy(plain: list[Decoded], drafted: list[Decoded]) -> Gate:
    """Whether drafts leave the output as it is."""
    pairs = [
        pair
        for one, other in zip(plain, drafted, strict=True)
        for pair in zip(one.made.tokens[: one.count], other.made.tokens[: one.count], strict=True)
    ]
    same = sum(np.array_equal(ours, theirs) for ours, theirs in pairs)
    return Gate("greedy", same == len(pairs), f"{same} of {len(pairs)} texts are the same with and without drafts")


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in values)
