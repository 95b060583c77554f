"""Shortlist of tokens for the offsets after the first (FR-Spec, arXiv 2502.14856).

The first offset has the whole vocabulary (behind an encoder it is the model's own). The later ones, which are only ever
drafts, have the tokens on the list and cost as much less as that is shorter. A token that is not on it is never
drafted, and what is decoded keeps its law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from mtp_jax.heads.factors import Factors, Tables
from mtp_jax.model.config import ModelConfig
from mtp_jax.parameters import last_name
from mtp_jax.sharding import BATCH, RULES
from mtp_jax.validate import require

SHORT = "short_"
"""What the name of a table begins with that holds the listed tokens' rows alone."""


@dataclass(frozen=True)
class ShortlistForm:
    """The form (`losses.tiles.Form`) of `factors` with tables of their own, as `split` gives, after the first `whole`
    offsets: 1, or 0 where all are drafts."""

    factors: type[Factors]
    whole: int

    def tables(self, params: Tables) -> tuple[Tables, ...]:
        """Those of the first offset, if it has the whole vocabulary, and those of the later ones."""
        parts = zip(split(params), (slice(0, self.whole), slice(self.whole, None)), strict=True)
        read = list(parts)[1 - self.whole :]
        return tuple(self.factors.tables(self.factors.at(one, offsets)) for one, offsets in read)

    def logits(self, tables: tuple[Tables, ...], x_BTD: Array) -> tuple[Array, ...]:
        """`[B, T, R, 1, V]` of the first offset and `[B, T, R, W - 1, n]` of the later ones, for n listed tokens."""
        return tuple(self.factors.logits(one, x_BTD) for one in tables)

    def rows(self, rank: int, window: int) -> int:
        """As the factors' own."""
        return self.factors.rows(rank, window)


def split(params: Tables) -> tuple[Tables, Tables]:
    """The parameters of the first offset and those of the later ones, where `short_x` stands for a table x."""
    whole = {name: value for name, value in params.items() if not name.startswith(SHORT)}
    return whole, whole | {name.removeprefix(SHORT): params[name] for name in params.keys() - whole.keys()}


class Shortlist(nnx.Module):
    """The n listed token ids, `listed_n`, in the order of their columns in the logits of the later offsets."""

    def __init__(self, count: int, model: ModelConfig, whole: int = 1):
        require(
            count <= model.known,
            f"HeadConfig.shortlist is {count} and the vocabulary has {model.known} tokens; it is part of them.",
        )
        self.vocab_size, self.whole = model.vocab_size, whole
        self.listed_n = nnx.Param(jnp.arange(count, dtype=jnp.int32))

    def rows(self, table_VD: Array) -> Array:
        """The listed tokens' rows of a table, split as it is."""
        return table_VD.at[self.listed_n[...]].get(out_sharding=jax.typeof(table_VD).sharding.spec)

    def columns(self, tokens: Array) -> Array:
        """The column of each token, of any shape; n where it is not listed."""
        return self._columns_V().at[tokens].get(out_sharding=jax.typeof(tokens).sharding.spec)

    def targets(self, targets_BTW: Array) -> tuple[Array, Array]:
        """The column of each target in the logits of its offset, and whether it and those before it have one."""
        later = self.columns(targets_BTW[..., self.whole :])
        listed = jnp.cumprod((later < self.listed_n.shape[0]).astype(jnp.int32), axis=-1).astype(bool)
        first = targets_BTW[..., : self.whole]
        return jnp.concatenate([first, later], axis=-1), jnp.concatenate([jnp.ones_like(first, bool), listed], axis=-1)

    def ids(self, columns: Array) -> Array:
        """The token of each column, of any shape."""
        return self.listed_n[...].at[columns].get(out_sharding=jax.typeof(columns).sharding.spec)

    def of_all(self, values_BTV: Array) -> Array:
        """The listed tokens' part of what is known of all, `[B, T, n]`."""
        return values_BTV.at[..., self.listed_n[...]].get(out_sharding=P(BATCH, None, "tensor"))

    def spread(self, logp_Bn: Array) -> Array:
        """Log-probabilities of the listed tokens as those of all, `[B, V]`: -inf elsewhere."""
        padded = jnp.pad(jax.reshard(logp_Bn, RULES.tokens_BT), ((0, 0), (0, 1)), constant_values=-jnp.inf)
        return padded.at[:, self._columns_V()].get(out_sharding=P(BATCH, "tensor"))

    def unstack(self) -> None:
        """Make the columns of all tokens once, for decoding."""
        self.columns_V = nnx.Param(self._columns_V())

    def _columns_V(self) -> Array:
        if hasattr(self, "columns_V"):  # laid out for decoding
            return self.columns_V[...]
        count = self.listed_n.shape[0]
        columns_V = jnp.full(self.vocab_size, count, jnp.int32)
        return columns_V.at[self.listed_n[...]].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)


def columns(shortlist: Shortlist | None, targets_BTW: Array) -> tuple[Array, Array]:
    """Where each target is in the logits of its offset, and whether it and those before it have such a place."""
    if shortlist is None:
        return targets_BTW, jnp.ones_like(targets_BTW, bool)
    return shortlist.targets(targets_BTW)


def behind_listed(listed_BTW: Array, weights_BTW: Array) -> Array:
    """Weights, 0 where a token before is not listed: a head has no law there to compare with another."""
    first_BT1 = jnp.ones_like(listed_BTW[..., :1])
    return jnp.where(jnp.concatenate([first_BT1, listed_BTW[..., :-1]], axis=-1), weights_BTW, 0.0)


def put_listed(params: dict[str, Any], ids: np.ndarray) -> dict[str, Any]:
    """The parameters of a model with these ids as its shortlist."""

    def put(path: Any, leaf: Any) -> Any:
        return jax.device_put(np.asarray(ids, np.int32), leaf.sharding) if last_name(path) == "listed_n" else leaf

    return jax.tree_util.tree_map_with_path(put, params)


def most_frequent(frequencies_V: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The `count` ids that occur most often, in ascending order, and their share of all tokens.

    `frequencies_V` is the share of each. Of equally frequent ids the lower ones.
    """
    ids = np.sort(np.argsort(-frequencies_V, kind="stable")[:count])
    return ids, float(frequencies_V[ids].sum())
