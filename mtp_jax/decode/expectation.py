"""Expected acceptance: what decoding with the `token` verifier would count, from texts that the model has written.

Blocks of drafts start where the last one failed, so decoding sees hard positions more often than a mean over positions
does. On a text drawn from the law that is sampled, draft s of a block behind a position is accepted with chance
c_s = min(1, q_s(x) / p(x)), where x is the text's token there, p the target's law and q_s the head's, given the tokens
before; p at the temperature of the text, q_s as drafts are sampled, both with the same top-k and top-p. With v(i) the
chance that a block starts behind new token i,

    v(i + j + 1) += v(i) P(exactly j drafts are accepted)

and every count is a sum over v. At temperature 0 it is what decoding counts, exactly where both compute the same law
(in float32); above, in the mean over texts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mtp_jax import arrays
from mtp_jax.arrays import NEVER
from mtp_jax.decode.config import DecodeConfig, prompt_ids
from mtp_jax.decode.decoding import bucket, put_rows, sampling_of
from mtp_jax.decode.law import Sampling, of_drafts, process_logits
from mtp_jax.heads.base import Seen
from mtp_jax.language_model import LanguageModel
from mtp_jax.validate import ConfigError, require


@dataclass(frozen=True)
class Expectation:
    """Expected counts of texts, in the words of `Generation`, and how far the head's law covers the target's.

    `emitted_B`: tokens behind the first new one. `forwards_B`: target forwards, prefill excluded. `accepted_Bk`,
    `drafted_Bk`: drafts by offset. `overlap_Bk`: the sum of sum_x min(p(x), q_s(x)) over the `positions_B` of a text
    whose offsets all lie in it. `limits_B`: the most tokens that each may have. `chances`: of each text, c_s of a block
    that starts behind each of its tokens, `[n, k]`.
    """

    emitted_B: np.ndarray
    forwards_B: np.ndarray
    accepted_Bk: np.ndarray
    drafted_Bk: np.ndarray
    overlap_Bk: np.ndarray
    positions_B: np.ndarray
    limits_B: np.ndarray
    chances: list[np.ndarray]

    @classmethod
    def together(cls, parts: Sequence[Expectation]) -> Expectation:
        """Those of several batches of texts as one."""
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)}
        chances = list(itertools.chain.from_iterable(columns.pop("chances")))
        return cls(**{name: np.concatenate(arrays) for name, arrays in columns.items()}, chances=chances)

    def first(self, count: int) -> Expectation:
        """That of the first `count` texts."""
        return Expectation(*(getattr(self, field.name)[:count] for field in dataclasses.fields(self)))

    def with_drafts(self, k: int) -> Expectation:
        """That of the first k drafts of each block alone. Overlaps stay means over the same positions."""
        chances = [chance_nk[:, :k] for chance_nk in self.chances]
        counts = [_counts(*pair) for pair in zip(chances, self.limits_B.tolist(), strict=True)]
        emitted_B, forwards_B, accepted_Bk, drafted_Bk = (np.array(column) for column in zip(*counts, strict=True))
        of_texts = emitted_B, forwards_B, accepted_Bk, drafted_Bk, self.overlap_Bk[:, :k]
        return Expectation(*of_texts, self.positions_B, self.limits_B, chances)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens emitted per target forward; NaN where there was none."""
        return _ratio(self.emitted_B.sum(), self.forwards_B.sum())

    @property
    def acceptance(self) -> list[float]:
        """At each offset, the fraction of drafts that is accepted; NaN where there was none."""
        return [_ratio(*counts) for counts in zip(self.accepted_Bk.sum(0), self.drafted_Bk.sum(0), strict=True)]

    @property
    def overlap(self) -> list[float]:
        """At each offset, how far the head's law covers the target's, in the mean over all positions alike. Decoding
        accepts less: it does not start at just any of them."""
        return [_ratio(overlap, self.positions_B.sum()) for overlap in self.overlap_Bk.sum(0)]


def _ratio(count: float, of: float) -> float:
    return float(count / of) if of else float("nan")


def expectation(
    model: LanguageModel, prompts: Sequence[Any], texts: Sequence[Any], config: DecodeConfig, states: Any = None
) -> Expectation:
    """What decoding would count on its way to these texts.

    Args:
      model: as it is trained (not laid out for decoding), the mesh in scope.
      prompts: token ids of each row.
      texts: the new tokens of each row, from the law that `config` samples; plain decoding writes such.
      config: temperature, top_k, top_p, k and max_new_tokens. The rest is not looked at.
      states: what `hidden_states` gave of them, for those who ask again; the trunk is then not run.

    Raises:
      ConfigError: as decoding does; k is not one number of drafts; or a text is longer than max_new_tokens.
    """
    prompts, texts = config.check(model.config, model.head.config, prompts), prompt_ids(texts)
    k = model.head.config.window - 1 if config.k is None else config.k
    if not isinstance(k, int) or k < 1:
        raise ConfigError(f"k is {config.k!r}; what is expected of drafts takes one number of them, at least 1.")
    limits = np.broadcast_to(config.max_new_tokens, len(texts))
    for i, (text, limit) in enumerate(zip(texts, limits, strict=True)):
        require(len(text) <= limit, f"Text {i} has {len(text)} tokens and max_new_tokens is {limit}.")
    sampling, filtered = sampling_of(config, len(texts), model.config.vocab_size)
    states = hidden_states(model, prompts, texts) if states is None else states
    begin_B = put_rows(np.array([len(prompt) - 1 for prompt in prompts], np.int32))
    count = bucket(max(map(len, texts)))
    tokens_BT = padded(prompts, texts)
    found = _chances(model, states, tokens_BT, begin_B, sampling, k=k, count=count, filtered=filtered)
    chance_Bnk, overlap_Bnk = (np.asarray(a, np.float64) for a in jax.device_get(found))
    found, chances = [], []
    for chance_nk, overlap_nk, text, limit in zip(chance_Bnk, overlap_Bnk, texts, limits.tolist(), strict=True):
        inside = max(0, len(text) - k)
        chances.append(chance_nk[: len(text)])
        found.append((*_counts(chances[-1], limit), overlap_nk[:inside].sum(0), inside))
    emitted_B, forwards_B, *by_offset, positions_B = (np.array(column) for column in zip(*found, strict=True))
    accepted_Bk, drafted_Bk, overlap_Bk = by_offset
    return Expectation(emitted_B, forwards_B, accepted_Bk, drafted_Bk, overlap_Bk, positions_B, limits, chances)


def hidden_states(model: LanguageModel, prompts: Sequence[Any], texts: Sequence[Any]) -> Any:
    """The hidden states of texts behind their prompts, `[B, T, D]`, and the taps of the head, the mesh in scope."""
    return _see(model, padded(prompts, texts))


def padded(prompts: Sequence[Any], texts: Sequence[Any]) -> Array:
    """The ids of texts behind their prompts, `[B, T]`, on the mesh in scope; zeros behind their ends."""
    rows = [np.concatenate([prompt, text]).astype(np.int32) for prompt, text in zip(prompts, texts, strict=True)]
    tokens_BT = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for padded, row in zip(tokens_BT, rows, strict=True):
        padded[: len(row)] = row
    return put_rows(tokens_BT)


@jax.jit
def _see(model: LanguageModel, tokens_BT: Array) -> Any:
    seen = model.see(tokens_BT)
    return seen.x_BTD, seen.taps


@dataclass(frozen=True)
class Blocks:
    """Blocks of drafts on texts whose hidden states are known, in a compiled function. Positions are those of `[B, T]`,
    one for all rows or `[B]`; behind the last one stands the last one again."""

    model: LanguageModel
    seen: Seen
    cache: Any

    @classmethod
    def of(cls, model: LanguageModel, states: Any, tokens_BT: Array) -> Blocks:
        """`states` as `hidden_states` gives them."""
        seen = model.seen(states[0], tokens_BT, states[1])
        next_BT, start_B = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1))), jnp.zeros_like(tokens_BT[:, 0])
        cache, _ = model.head.extend(model.head.init_cache(*tokens_BT.shape), seen, next_BT, start_B, None)
        return cls(model, seen, cache)

    def _index(self, t: Array) -> Array:
        tokens_BT = self.seen.tokens_BT
        return jnp.zeros_like(tokens_BT[:, 0]) + jnp.minimum(t, tokens_BT.shape[1] - 1)

    def target(self, t: Array) -> Array:
        """The target's log-probabilities behind position t, `[B, V]`."""
        return self.model.target(self.seen.at(self._index(t)))[0][:, 0]

    def drafts(self, t: Array, k: int) -> Iterator[tuple[Array, Array]]:
        """The head's law of each of k drafts behind position t, `[B, V]`, as it learnt it, and the text's token there.
        The text's token stands in front of them too, and each draft is the text's."""
        head, index_B = self.model.head, self._index(t)
        tokens = [arrays.at(self.seen.tokens_BT, self._index(t + s)) for s in range(1, k + 2)]
        draft = head.begin(self.seen.at(index_B), tokens[0], window=k + 1, cache=self.cache, position_B=index_B)
        for s, token_B in enumerate(tokens[1:], 1):
            yield head.next_log_probs(draft), token_B
            if s < k:
                draft = head.condition(draft, token_B)


@functools.partial(jax.jit, static_argnames=("k", "count", "filtered"))
def _chances(
    model: LanguageModel,
    states: Any,
    tokens_BT: Array,
    begin_B: Array,
    sampling: Sampling,
    *,
    k: int,
    count: int,
    filtered: bool,
) -> Any:
    """c_s and the overlap of p and q_s, `[B, count, k]`, of a block that is drafted from each position of a row, the
    first one `begin_B`. Positions in turn: no more than k + 1 laws of each row are alive."""
    blocks, drafting = Blocks.of(model, states, tokens_BT), of_drafts(sampling, model.head.config)

    def law(logp_BV: Array, sampling: Sampling = sampling) -> Array:
        return jax.nn.log_softmax(process_logits(logp_BV[:, None], sampling, filtered=filtered)[:, 0], axis=-1)

    def block(ahead: tuple[Array, ...], t: Array) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        chances, overlaps = [], []
        for logp_BV, (logq_BV, token_B) in zip(ahead, blocks.drafts(begin_B + t, k), strict=True):
            logq_BV = law(logq_BV, drafting)
            logq_B, logp_B = (arrays.log_prob(a[:, None], token_B[:, None])[:, 0] for a in (logq_BV, logp_BV))
            # A law that was rounded otherwise may rule out what was sampled; NEVER is finite.
            chance_B = jnp.where(logp_B > 0.5 * NEVER, jnp.exp(jnp.minimum(0.0, logq_B - logp_B)), 0.0)
            chances.append(chance_B)
            overlaps.append(jnp.sum(jnp.exp(jnp.minimum(logp_BV, logq_BV)), axis=-1))
        found = jnp.stack(chances, axis=-1), jnp.stack(overlaps, axis=-1)
        return (*ahead[1:], law(blocks.target(begin_B + t + k + 1))), found

    first = tuple(law(blocks.target(begin_B + s)) for s in range(1, k + 1))
    _, found = lax.scan(block, first, jnp.arange(count, dtype=jnp.int32))
    return jax.tree.map(lambda a_TBk: jnp.moveaxis(a_TBk, 0, 1), found)


def draw(found: Expectation, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode the texts `count` times, drawing which drafts are accepted: (forwards, accepted by offset, drafted by
    offset) of all texts together, `[count]`, `[count, k]` and `[count, k]`. Their means are what is expected."""
    rng, k = np.random.default_rng(seed), found.accepted_Bk.shape[1]
    forwards_N, accepted_Nk, drafted_Nk = np.zeros(count), np.zeros((count, k)), np.zeros((count, k))
    offset_k = np.arange(k)
    for chance_nk, limit in zip(found.chances, found.limits_B, strict=True):
        last, at_N = len(chance_nk) - 1, np.zeros(count, int)
        while (live_N := at_N < last).any():
            here_N = np.minimum(at_N, last)
            drafted = (offset_k < (limit - here_N - 2)[:, None]) & live_N[:, None]
            inside = drafted & (offset_k < (last - here_N)[:, None])
            accepted = np.cumprod(inside & (rng.random((count, k)) < chance_nk[here_N]), axis=1)
            forwards_N += live_N
            drafted_Nk += drafted
            accepted_Nk += accepted
            at_N += np.where(live_N, accepted.sum(1) + 1, 0)
    return forwards_N, accepted_Nk, drafted_Nk


def _counts(chance_nk: np.ndarray, limit: int) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(emitted, forwards, accepted by offset, drafted by offset) of one text of n new tokens, at most `limit`."""
    count, k = chance_nk.shape
    start_n, accepted_k, drafted_k = np.zeros(count + k + 1), np.zeros(k), np.zeros(k)
    start_n[0] = 1.0
    for i in range(count - 1):
        # The last token that may come is the target's own, so no draft is made for it.
        drafts = min(k, max(limit - i - 2, 0))
        last = min(drafts, count - 1 - i)
        reach = start_n[i] * np.cumprod(chance_nk[i, :last])
        drafted_k[:drafts] += start_n[i]
        accepted_k[:last] += reach
        # How many are accepted: exactly j, or all that are left of the text.
        reach = np.concatenate([[start_n[i]], reach, [0.0]])
        start_n[i + 1 : i + 2 + last] += reach[:-1] - reach[1:]
    return max(count - 1, 0), float(start_n[: max(count - 1, 0)].sum()), accepted_k, drafted_k
