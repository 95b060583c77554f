"""Tiles of positions of a device's part of a batch: logits, scores and gradients of one tile, inside `shard_map`.

The batch lies over the mesh's batch axes and the vocabulary over `tensor`. A tile exchanges a maximum and two sums per
row over `tensor`, and the gradient of its hidden states. Tables are gathered over `fsdp` once before the loop over
tiles, and their gradient is reduced once after it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax import arrays
from mtp_jax.sharding import gather_local, platform, reduce_local, shares, varies, vary

# Bytes of float32 logits that are alive together on one device: as few as keep the products at full speed, and what may
# be spent on having TILE_ROWS rows in one.
TILE_BYTES = {"cpu": (20 * 2**20, 160 * 2**20), "gpu": (2**29, 2**32), "tpu": (2**28, 2**31)}
# A tile reads every table and adds to its gradient, in float32: for a table of V D entries 8 V D bytes at the least,
# beside 6 V D FLOPs for each row that is multiplied by it. With so many rows that takes a tenth of the time of the
# products, on devices of 200 to 300 FLOPs a byte and on processors of 20.
TILE_ROWS = {"cpu": 256, "gpu": 4096, "tpu": 4096}


class Form(Protocol):
    """How the logits of every factor come from parameters and hidden states.

    Where the offsets have vocabularies of different sizes, `logits` is a tuple of arrays over W, in their order.
    """

    @staticmethod
    def tables(params: Any) -> Any:
        """What every tile reads, made from the parameters once."""
        ...

    @staticmethod
    def logits(tables: Any, x_BTD: Array, /) -> Any:
        """`[B, T, R, W, V]` in float32."""
        ...

    @staticmethod
    def rows(rank: int, window: int) -> int:
        """Rows of one position, of R x W, that go through the same large table."""
        ...


def tile_positions(positions: int, logits_bytes: int, rows: int) -> int:
    """Positions in a tile, of `positions` on a device. Each has `logits_bytes` of logits and multiplies a table by so
    many rows."""
    device = platform() if platform() in TILE_BYTES else "tpu"
    enough, most = (max(1, size // logits_bytes) for size in TILE_BYTES[device])
    wanted = max(enough, -(-TILE_ROWS[device] // rows))
    return -(-positions // max(-(-positions // most), positions // wanted))


class Device:
    """What one device does with its part of a batch: inside `shard_map`."""

    def __init__(
        self, form: Form, params: Any, specs: Any, x_BTD: Array, known: int | None, beside: int = 0, more: int = 0
    ):
        """`beside`: columns of another law's logits that a tile has, by position and, like a component, by offset;
        `more`: bytes of what else it has at a position."""
        self.form, self.params, self.specs, self.known = form, params, specs, known
        self.whole = jax.tree.map(lambda w, spec: gather_local(w, spec, x_BTD.dtype), params, specs)
        self.tables, self._pull = jax.vjp(form.tables, self.whole)
        # The axes that split the vocabulary: the rules split nothing else of the head over this one.
        self.split = {"tensor"} & shares(axis for spec in jax.tree.leaves(specs) for axis in spec)
        working = varies(x_BTD) | self.split
        mesh = jax.sharding.get_abstract_mesh()
        self.copies = math.prod(size for name, size in mesh.shape.items() if name not in working)
        one = jax.eval_shape(lambda tables, x: form.logits(tables, vary(x)), self.tables, x_BTD[:1, :1])
        # How many offsets each array of logits has.
        self.offsets = [logits.shape[3] for logits in jax.tree.leaves(one)]
        size = more + sum(logits.size * logits.dtype.itemsize for logits in jax.tree.leaves(one))
        rows = min(form.rows(*logits.shape[2:4]) for logits in jax.tree.leaves(one))
        if beside:  # its own, and the probabilities of both laws at every offset
            rows = min(rows, 2)  # one, whose table has no gradient: half the traffic for each product
            offsets = sum(logits.size // logits.shape[2] for logits in jax.tree.leaves(one))
            size += (beside + 2 * offsets) * jax.tree.leaves(one)[0].dtype.itemsize
        self.width = tile_positions(x_BTD.shape[0] * x_BTD.shape[1], size, rows)

    def tiles(self, trees: Any) -> Any:
        """Each `[B, T, ...]` as `[tiles, 1, positions, ...]`, padded at the end with zeros (of weight zero)."""

        def split(array: Array) -> Array:
            flat = array.reshape(-1, *array.shape[2:])
            padding = -flat.shape[0] % self.width
            flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
            return flat.reshape(-1, 1, self.width, *flat.shape[1:])

        return jax.tree.map(split, trees)

    def untile(self, tiled: Array, like_BT: Array) -> Array:
        """The inverse of `tiles`, with B and T of `like_BT`."""
        batch, time = like_BT.shape[:2]
        flat = tiled.reshape(-1, *tiled.shape[3:])
        return flat[: batch * time].reshape(batch, time, *flat.shape[1:])

    def zeros(self) -> Any:
        """A gradient of the tables to add to."""
        return jax.tree.map(lambda table: vary(jnp.zeros_like(table)), self.tables)

    def logits(self, x_BTD: Array) -> tuple[list[Array], Callable[[Any], tuple[Any, Array]]]:
        """The logits of a tile, and the function that takes their gradient back to (tables, x).

        As plain matrices: M rows, one for each position, component and offset. XLA then works on them in place. Ids
        from `known` on, if it is given, are ruled out.
        """

        def logits_MV(tables: Any, x_BTD: Array) -> list[Array]:
            return [self.rule_out(a.reshape(-1, a.shape[-1])) for a in jax.tree.leaves(self.form.logits(tables, x_BTD))]

        return jax.vjp(logits_MV, self.tables, vary(x_BTD))

    def rule_out(self, logits_MV: Array) -> Array:
        """The logits without ids from `known` on, if it is given."""
        parts, size = lax.axis_size("tensor") if self.split else 1, logits_MV.shape[1]
        if self.known is None or size * parts <= self.known:
            return logits_MV
        return arrays.rule_out(logits_MV, self.known, lax.axis_index("tensor") * size if self.split else 0)

    def normaliser(self, logits_MV: Array) -> Array:
        """The logarithm of the sum over the vocabulary of exp(logits), `[M, 1]`."""
        most_M1 = self._most(logits_MV)
        return most_M1 + jnp.log(self.total(jnp.sum(jnp.exp(logits_MV - most_M1), axis=1, keepdims=True)))

    def total(self, parts: Any) -> Any:
        """Sums over a device's part of the vocabulary, as sums over all of it."""
        return lax.psum(parts, "tensor") if self.split else parts

    def scores(self, logits_MV: list[Array], columns_BTW: Array) -> tuple[Array, Array]:
        """log p_rs(x_s) and the log-normalisers, `[B, T, R, W]`, of the targets in these columns."""
        found = [self._scores(*one) for one in zip(logits_MV, self._by_array(columns_BTW), strict=True)]
        logp, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*found, strict=True))
        return logp, lse

    def d_logits(
        self, logits_MV: list[Array], lse_BTRW: Array, columns_BTW: Array, d_logp_BTRW: Array, d_lse_BTRW: Array
    ) -> list[Array]:
        """The gradient of the logits, from those of the scores."""
        scores = (self._by_array(a) for a in (lse_BTRW, columns_BTW, d_logp_BTRW, d_lse_BTRW))
        return [self._d_logits(*one) for one in zip(logits_MV, *scores, strict=True)]

    def _scores(self, logits_MV: Array, columns_BTW: Array) -> tuple[Array, Array]:
        rank = logits_MV.shape[0] // columns_BTW.size
        index_M1, here_M1 = self._locate(columns_BTW, logits_MV)
        found_M1 = jnp.where(here_M1, jnp.take_along_axis(logits_MV, index_M1, axis=1), 0.0)
        most_M1 = self._most(logits_MV)
        sum_M1, found_M1 = self.total((jnp.sum(jnp.exp(logits_MV - most_M1), axis=1, keepdims=True), found_M1))
        lse_M1 = most_M1 + jnp.log(sum_M1)
        batch, time, window = columns_BTW.shape
        return tuple(a.reshape(batch, time, rank, window) for a in (found_M1 - lse_M1, lse_M1))  # type: ignore[return-value]

    def _most(self, logits_MV: Array) -> Array:
        most_M1 = jnp.max(logits_MV, axis=1, keepdims=True)
        return lax.pmax(most_M1, "tensor") if self.split else most_M1

    def _d_logits(
        self, logits_MV: Array, lse_BTRW: Array, columns_BTW: Array, d_logp_BTRW: Array, d_lse_BTRW: Array
    ) -> Array:
        index_M1, here_M1 = self._locate(columns_BTW, logits_MV)
        lse_M1, d_logp_M1, d_lse_M1 = (a.reshape(-1, 1) for a in (lse_BTRW, d_logp_BTRW, d_lse_BTRW))
        d_MV = (d_lse_M1 - d_logp_M1) * jnp.exp(logits_MV - lse_M1)
        d_target_M1 = jnp.where(here_M1, d_logp_M1, 0.0)
        if platform() == "cpu":  # where comparing every logit costs more than setting a few
            rows = jnp.arange(index_M1.shape[0], dtype=jnp.int32)
            return d_MV.at[rows, index_M1[:, 0]].add(d_target_M1[:, 0], unique_indices=True)
        # Elsewhere one kernel does all of this, and rounds: the gradient is never written in float32.
        columns_1V = lax.broadcasted_iota(index_M1.dtype, (1, d_MV.shape[1]), 1)
        return d_MV + jnp.where(columns_1V == index_M1, d_target_M1, 0.0)

    def _by_array(self, a_W: Array) -> list[Array]:
        """The offsets (the last axis) of each array of logits."""
        return jnp.split(a_W, list(itertools.accumulate(self.offsets))[:-1], axis=-1)

    def d_params(self, d_tables: Any) -> Any:
        """The gradient of the parameters, reduced over devices and split as they are."""
        (d_whole,) = self._pull(d_tables)
        return jax.tree.map(lambda d, w, spec: reduce_local(d, w, spec), d_whole, self.params, self.specs)

    def _locate(self, columns_BTW: Array, logits_MV: Array) -> tuple[Array, Array]:
        """Where the target's logit is in each row, `[M, 1]` (anywhere, if not here), and whether this device has it."""
        rows, size = logits_MV.shape
        batch, time, window = columns_BTW.shape
        shape = (batch, time, rows // columns_BTW.size, window)
        index_M1 = jnp.broadcast_to(columns_BTW[:, :, None], shape).reshape(-1, 1)
        if self.split:
            index_M1 = index_M1 - lax.axis_index("tensor") * size
        return jnp.clip(index_M1, 0, size - 1), (index_M1 >= 0) & (index_M1 < size)
