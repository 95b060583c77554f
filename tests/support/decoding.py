"""A model whose drafts are sometimes right, what decodes with it, and plain decoding in Python."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax.decode import loop
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, for_decoding
from mtp_jax.decode.decoding import ENDLESS, Decoding, Generation
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.state import DecodeState
from mtp_jax.language_model import LanguageModel
from mtp_jax.state import build_model
from support import tiny
from support.laws import reference_law

WINDOW, VOCAB = tiny.WINDOW, tiny.VOCAB
NEW = 16
PROMPTS = [[5, 1, 9], [4, 30, 6, 7, 8, 2, 10, 11, 12, 13], [3], [7, 20] * 8]
Law = tuple[float, int, float]
# Each row samples by a law of its own: temperature, top-k, top-p.
LAWS: list[Law] = [(0.8, 6, 0.95), (1.3, 0, 0.9), (0.0, 0, 1.0), (1.0, 10, 1.0)]


@dataclasses.dataclass(frozen=True)
class Models:
    """One model twice: as training has it, and as decoding wants it."""

    stacked: LanguageModel
    ready: Decoder


def build(mesh: jax.sharding.Mesh, **changes: Any) -> Models:
    """A model whose drafts are sometimes right, more often if the head is conditioned.

    Component r expects permutation r of the last token to come next, and then what the model finds most likely after
    that. The trunk is random, so the tokens before the last one matter too. All of it is filled in on the host: drawing
    parameters on the device costs more compile time than the loop.
    """
    config = tiny.train_config(tiny.model_config(**changes))
    shapes = jax.eval_shape(lambda: build_model(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    embed_VD = rng.normal(size=(VOCAB, config.model.d_model))
    gate_DR = 0.5 * rng.normal(size=(config.model.d_model, tiny.RANK))
    permutation_RV = np.stack([rng.permutation(VOCAB) for _ in range(tiny.RANK)])
    likely_V = np.choose(np.argmax(embed_VD @ gate_DR, axis=1), permutation_RV)
    expected_RWV = np.repeat(permutation_RV[:, None], WINDOW, axis=1)
    for s in range(1, WINDOW):
        expected_RWV[:, s] = likely_V[expected_RWV[:, s - 1]]
    special = {
        "embed_VD": embed_VD,
        "gate_DR": gate_DR,
        "u_DRWV": 0.9 * np.einsum("vd,rwvu->drwu", embed_VD, np.eye(VOCAB)[expected_RWV]),
    }

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        value = np.ones(leaf.shape) if "scale" in name else 0.4 * rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5
        value = next((special[key] for key in special if key in name), value)
        return jax.device_put(value.astype(leaf.dtype), jax.NamedSharding(mesh, leaf.sharding.spec))

    stacked = jax.tree_util.tree_map_with_path(fill, shapes)
    return Models(stacked, for_decoding(stacked))


def ask(
    model: Decoder,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    laws: Sequence[Law] | None = None,
    stop: int = -1,
    **options: Any,
) -> Decoding:
    """A decoding of the shapes that all tests share: 4 prompts of up to 16 tokens, up to 16 new ones, one stop."""
    if laws is not None:
        options.update(temperature=1.0, top_k=1)  # compiled for top-k and top-p
    decoding = Decoding(model, prompts, DecodeConfig(**{"max_new_tokens": NEW, "stop_tokens": [stop], **options}))
    if laws is not None:
        temperature, top_k, top_p = zip(*laws, strict=True)
        rows = np.array(temperature, np.float32), np.array(top_k, np.int32), np.array(top_p, np.float32)
        decoding.sampling = Sampling(*map(tiny.shard, rows), decoding.sampling.key_B)
    return decoding


def prefilled(decoding: Decoding) -> DecodeState:
    """The shapes of the state after prefill; nothing is compiled."""
    d = decoding
    arrays = d.decoder, d.prompt_BP, d.length_B, d.limits, d.sampling, d.stops_n
    return jax.eval_shape(functools.partial(loop.prefill, d.plan), *arrays)


def finish(decoding: Decoding, *, chunk: int = ENDLESS) -> Generation:
    """Decode from the beginning to the end, `chunk` forwards at a time."""
    decoding.prefill()
    while not decoding.done:
        decoding.advance(chunk)
    return decoding.result()


def drive(decoding: Decoding, drafts: Callable[[np.ndarray], np.ndarray]) -> Generation:
    """Decode with drafts `[B, k]` that `drafts(how many new tokens each row has)` gives, in place of the head's."""
    decoding.prefill()
    while not decoding.done:
        draft_Bk = drafts(np.asarray(decoding.state.length_B - decoding.length_B)).astype(np.int32)
        decoding.state = dataclasses.replace(decoding.state, draft_Bk=tiny.shard(draft_Bk))
        decoding.advance(1)
    return decoding.result()


def same(rows: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> bool:
    """Whether all rows are equal, token for token."""
    return all(map(np.array_equal, rows, others))


@jax.jit
def full_log_probs(model: LanguageModel, tokens_BT: jax.Array) -> jax.Array:
    """The target's law after every position, by one forward of the whole sequence without a cache."""
    return model.target(model.see(tokens_BT))[0]


def by_hand(
    models: Models, choose: Callable[[int, int, np.ndarray], int], prompts: Sequence[Sequence[int]] = PROMPTS
) -> list[np.ndarray]:
    """Plain decoding in Python: row b's token at `position` is `choose(b, position, logp_V)`."""
    rows = [list(p) for p in prompts]
    with tiny.mesh():
        for _ in range(NEW):
            tokens_BT = tiny.shard(np.array([row + [0] * (32 - len(row)) for row in rows], np.int32))
            logp_BTV = np.asarray(full_log_probs(models.stacked, tokens_BT))
            for b, row in enumerate(rows):
                row.append(int(choose(b, len(row), logp_BTV[b, len(row) - 1])))
    return [np.array(row[len(p) :]) for row, p in zip(rows, prompts, strict=True)]


def chooser(laws: Sequence[Law], seed: int = 0) -> Callable[[int, int, np.ndarray], int]:
    """Sampling by the definition: argmax of log law + the noise of (seed, row, position)."""

    @functools.cache
    def noise(b):
        key = jax.random.wrap_key_data(np.array([b, seed], np.uint32), impl="threefry2x32")
        draw = jax.vmap(lambda position: jax.random.bits(jax.random.fold_in(key, position), (VOCAB,)))
        u = ((np.asarray(draw(np.arange(33))) >> 1) + 0.5) / 2**31
        return -np.log(-np.log1p(-u))

    def choose(b, position, logp_V):
        with np.errstate(divide="ignore"):
            return np.argmax(np.log(reference_law(logp_V, *laws[b])) + noise(b)[position])

    return choose


def cut(row: np.ndarray, stop: int) -> np.ndarray:
    """A row up to and with its first stop token."""
    hits = np.flatnonzero(row == stop)
    return row[: hits[0] + 1] if len(hits) else row


def faulty_loop() -> Callable[[Decoding], Generation]:
    """A `finish` whose loop is traced anew, with whatever is patched, and cached for nobody else.

    Prefill comes from the cache: run it before patching.
    """

    def run(plan, decoder, state, sampling, stops, max_forwards):
        return loop.run.__wrapped__(plan, decoder, state, sampling, stops, max_forwards)

    compiled = jax.jit(run, static_argnames="plan", donate_argnames="state")

    def decode(decoding: Decoding) -> Generation:
        d = decoding
        d.prefill()
        d.state = compiled(d.plan, d.decoder, d.state, d.sampling, d.stops_n, np.int32(100))
        assert d.done
        return d.result()

    return decode
