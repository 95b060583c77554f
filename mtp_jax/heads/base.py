"""Protocol of heads: all that training, decoding and the benchmarks ask of a law of the next W tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax import arrays
from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.sharding import RULES
from mtp_jax.validate import require

if TYPE_CHECKING:
    from mtp_jax.heads.shortlist import Shortlist

Aux = dict[str, Array]
Draft = Any  # what a head knows while it drafts: opaque to the loop, and never leaves one iteration


@dataclass(frozen=True)
class Seen:
    """What the trunk saw of T positions of each row. A head takes what it needs.

    `x_BTD`: hidden states after the final norm. `tokens_BT`: the tokens that were read. `segments_BT`: the document of
    each position; None in decoding, where a row is one. `taps`: the residual stream `[B, T, D]` behind each layer of
    `Head.taps`. `embed`: token ids `[B, T]` to the model's embeddings. `unembed_VD`: the model's vocabulary table, if
    it has one. `normaliser_BT`: that of the target's law, where it was kept.
    """

    x_BTD: Array
    tokens_BT: Array
    segments_BT: Array | None
    taps: tuple[Array, ...]
    embed: Callable[[Array], Array]
    unembed_VD: Any
    normaliser_BT: Array | None = None

    def at(self, index_B: Array) -> Seen:
        """One position of each row: every array has T = 1. The index may come from anywhere."""
        index_B = jax.reshard(jnp.asarray(index_B), RULES.rows_B)
        pick = lambda a: arrays.at(a, index_B)[:, None]  # noqa: E731
        names = "x_BTD", "tokens_BT", "segments_BT", "taps", "normaliser_BT"
        return dataclasses.replace(self, **jax.tree.map(pick, {name: getattr(self, name) for name in names}))


def with_own_first(aux: Aux, weights_BTW: Array, law_weights_BTW: Array | None) -> Aux:
    """What is reported of the offsets from 2 on, with the first one in front, whose law is the model's own: it has all
    tokens, and the target's law."""
    first = {"listed": weights_BTW, "listed_before": law_weights_BTW, "overlap_offset": law_weights_BTW}
    found = dict(aux)
    for name in aux.keys() & {*first, "kl_offset", "acceptance_offset", "lk_offset"}:
        weights = first.get(name)
        own_1 = jnp.zeros(1) if weights is None else jnp.sum(weights[..., :1], axis=(0, 1))
        found[name] = jnp.concatenate([own_1.astype(aux[name].dtype), aux[name]])
    return found


class Head(nnx.Module):
    """A law of the next W tokens, given what the trunk saw up to a position: q(x_1..x_W | seen).

    Drafting is `begin`, then `next_log_probs` and `condition` in turn. The first token of a window is always the
    target's own, so `begin` takes it. With k = 0 drafts nothing of a head runs but `marginal`, where it is the target.

    A head with layers of its own has a cache, under the discipline of the trunk's: absolute positions, nothing ever
    zeroed, entries behind what is committed are garbage that is overwritten before it is read.
    """

    config: HeadConfig
    shortlists: ClassVar[bool] = False
    """Whether such a head can have a shortlist."""
    learns_law: ClassVar[bool] = False
    """Whether such a head has losses against the target's law."""
    modular: ClassVar[bool] = False
    """Whether such a head has modules along the window."""
    leaves_first: ClassVar[bool] = False
    """Whether such a head leaves the first offset to the model."""

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config

    @classmethod
    def check(cls, config: HeadConfig) -> None:
        """Raise `ConfigError` on a config that such a head cannot have. Cheap: nothing is built."""
        require(
            config.target == "ntp" or cls.marginal is not Head.marginal,
            f"HeadConfig.target is marginal and kind is {config.kind}, whose law of the first token is the model's "
            "own; set target to ntp.",
        )
        require(
            config.shortlist == 0 or cls.shortlists,
            f"HeadConfig.shortlist is {config.shortlist} and kind is {config.kind}, which has none; set it to 0.",
        )
        require(
            cls.modular or not (config.attention or config.per_offset),
            f"HeadConfig.attention is {config.attention}, per_offset is {config.per_offset} and kind is {config.kind}, "
            "which has no modules along the window. Set both to False, or kind to sequential.",
        )
        zero = f"{' and '.join(config.against_target)} to 0"
        require(
            cls.learns_law or not config.against_target,
            f"HeadConfig.{config.weights_against} and kind is {config.kind}, which has no loss against the target's "
            f"law. Set kind to mixture or sequential, or {zero}.",
        )
        require(
            config.target == "ntp" or not config.against_target,
            f"HeadConfig.{config.weights_against} and target is {config.target}; what is learnt then is the model's "
            f"own next-token law. Set target to ntp, or {zero}.",
        )

    @classmethod
    def describe(cls, config: HeadConfig) -> str:
        """A config of such a head in a few words, for the line that a run prints."""
        return f"{config.kind}, W = {config.window}"

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers, counted from 1, whose outputs the head reads beside the last one's."""
        return ()

    @property
    def reads_table(self) -> bool:
        """Whether the head's logits go through the model's vocabulary table."""
        return False

    @property
    def has_cache(self) -> bool:
        """Whether `init_cache` and `extend` do anything."""
        return False

    def loss(
        self,
        seen: Seen,
        targets_BTW: Array,
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
    ) -> tuple[Array, Aux]:
        """The training loss in nats, and sums to report, which add up over micro-batches.

        Args:
          seen: what the trunk saw.
          targets_BTW: the next W tokens of each position.
          weights_BTW: 0 where a target is masked, else 1 / (valid targets of that offset in the whole optimizer batch).
          key: for what the config draws at random in training; without one the loss is exact.
          law_weights_BTW: the same for losses against the target's law, which are also masked where the position before
            the target, whose law it is, lies outside the row: 0, else 1 / (targets of that offset that are left in the
            whole optimizer batch). Heads without such losses do not look at them.

        Returns:
          the loss, and sums by name; `loss_offset`, in nats, is always there: `[W]`, or `[W - 1]` of a head that leaves
          the first offset to the model.
        """
        raise NotImplementedError

    def log_likelihood(self, seen: Seen, targets_BTW: Array) -> Array:
        """log q(x_s | x_<s), `[B, T, W]` in nats: their sum over offsets is the joint. Forward only."""
        raise NotImplementedError

    def gate(self, seen: Seen, next_BT: Array) -> Array | None:
        """Log-weights `[B, T, R]` of the head's components, given the tokens behind, for those who look; None where it
        has no components."""
        return None

    def marginal(self, seen: Seen) -> tuple[Array, Any]:
        """The head's own law of the next token, `[B, T, V]` log-probabilities in float32, for heads that may be the
        target; and a tree with B and T in front of what `begin` need not compute again."""
        raise NotImplementedError

    def init_cache(self, batch: int, slots: int) -> Any:
        """An empty cache of `slots` positions: a tree of arrays with B in front."""
        return ()

    def extend(self, cache: Any, seen: Seen, next_BT: Array, start_B: Array, memo: Any) -> tuple[Any, Any]:
        """Write T positions of each row, from `start_B` on, into the cache.

        Args:
          cache: as `init_cache` made it, or as it was written.
          seen: what the trunk saw of these positions.
          next_BT: the token behind each of them. Entries whose token is not committed in the end are garbage.
          start_B: the first position.
          memo: what `marginal` gave of them.

        Returns:
          the cache, and a tree with B and T in front, of which `begin` is given the last committed position.
        """
        return cache, memo

    def begin(
        self,
        seen: Seen,
        token_B: Array,
        *,
        window: int,
        cache: Any = (),
        position_B: Array | None = None,
        memo: Any = None,
    ) -> Draft:
        """The law of what follows the first token of each row's window.

        Args:
          seen: what the trunk saw of one position of each row, the last committed one (T = 1).
          token_B: the token that the target has chosen behind it.
          window: no more offsets than so many are asked for, the first one included.
          cache: filled up to that position, itself included.
          position_B: that position.
          memo: what `extend` gave of it.
        """
        raise NotImplementedError

    def next_log_probs(self, draft: Draft) -> Array:
        """log q(x_s | x_<s): `[B, V]`, exact and normalised."""
        raise NotImplementedError

    def next_listed(self, draft: Draft) -> tuple[Array, Shortlist | None]:
        """The same for the tokens that may be drafted alone, `[B, n]`, and which they are; None: all, `[B, V]`."""
        return self.next_log_probs(draft), None

    def condition(self, draft: Draft, token_B: Array) -> Draft:
        """The law of what follows, after token x_s is known."""
        raise NotImplementedError

    def unstack(self, unembed_VD: Any) -> None:
        """Lay parameters out for decoding, so that a step copies none of them."""

    @classmethod
    def flops(cls, config: HeadConfig, model: ModelConfig, frozen: bool) -> tuple[float, float]:
        """FLOPs of the loss for one token, (forward, backward), without the model's own next-token loss.

        With a `frozen` trunk no gradient goes to its hidden states or to the vocabulary table.
        """
        raise NotImplementedError
