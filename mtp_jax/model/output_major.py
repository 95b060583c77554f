"""Weights as a CPU reads them fast for a few rows: one matrix each, its outputs first.

XLA multiplies a few rows by such a matrix much faster than by one with its inputs first, and faster still with the
matrix on the left: the right operand is packed anew at every call. Four rows then take little more time than one, in
bfloat16 with AMX as much. One row in bfloat16 has no such kernel; with a row of zeros beside it it has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.sharding import platform

LEAST_ROWS, FEW_ROWS = 2, 64
JOINED = "together"
"""The attribute of a module with the weights that `TOGETHER` of its class names, in their place."""


class OutputMajor(nnx.Module):
    """A weight `[inputs.., outputs..]` as `[N, K]`. It stands where its Param was: `linear` and `product` take it."""

    def __init__(self, w: Array, inputs: int):
        """`w`: the weight, on a mesh of one device. `inputs`: how many of its axes are contracted."""
        self.outputs, self.spec = w.shape[inputs:], jax.typeof(w).sharding.spec[inputs:]
        w_KN = w.reshape(math.prod(w.shape[:inputs]), -1, out_sharding=P(None, None))
        self.w_NK = nnx.Param(w_KN.T)

    def __getitem__(self, index: Any) -> OutputMajor:
        """Itself, as `param[...]` is an array."""
        return self

    def times(self, x: Array) -> Array:
        """`x @ w`, `[B, T, inputs..]` to `[B, T, outputs..]` in float32."""
        rows = jax.typeof(x).sharding.spec[0]
        y_BTN = few_rows(x.reshape(*x.shape[:2], -1, out_sharding=P(rows, None, None)), self.w_NK[...])
        return y_BTN.reshape(*x.shape[:2], *self.outputs, out_sharding=P(rows, None, *self.spec))


class Together(nnx.Module):
    """Weights of one input, `[inputs.., outputs..]` each, as one `[N, K]`: one product in place of several."""

    def __init__(self, weights: Sequence[Array], inputs: int):
        """As `OutputMajor`."""
        each = [OutputMajor(w, inputs) for w in weights]
        self.outputs, self.specs = tuple(one.outputs for one in each), tuple(one.spec for one in each)
        self.w_NK = nnx.Param(jnp.concatenate([one.w_NK[...] for one in each]))

    def times(self, x: Array) -> tuple[Array, ...]:
        """`x @ w` of each, in float32."""
        rows = jax.typeof(x).sharding.spec[0]
        y_BTN = few_rows(x.reshape(*x.shape[:2], -1, out_sharding=P(rows, None, None)), self.w_NK[...])
        sizes = list(itertools.accumulate(math.prod(shape) for shape in self.outputs))[:-1]
        return tuple(
            y.reshape(*x.shape[:2], *shape, out_sharding=P(rows, None, *spec))
            for y, shape, spec in zip(jnp.split(y_BTN, sizes, axis=-1), self.outputs, self.specs, strict=True)
        )


def few_rows(x: Array, w_NK: Array) -> Array:
    """`x @ w.T`, `[B, T, .., K]` to `[B, T, .., N]` in float32.

    As a product of two matrices: of one with more axes XLA would first transpose the whole of w.
    """
    time, per_time = x.shape[1], math.prod(x.shape[:-1]) // x.shape[1]
    least = -(-LEAST_ROWS // per_time)
    if time < least and x.dtype == jnp.bfloat16 and platform() == "cpu":
        x = jnp.pad(x, ((0, 0), (0, least - time), *((0, 0),) * (x.ndim - 2)))
    at_x, at_w = jax.typeof(x).sharding.spec, jax.typeof(w_NK).sharding.spec
    x_MK, dtype = x.reshape(-1, x.shape[-1], out_sharding=P(at_x[0], None)), jnp.promote_types(x.dtype, jnp.float32)
    if 1 < len(x_MK) <= FEW_ROWS and platform() == "cpu":
        # Without the barrier XLA would swap them again.
        at_y = P(at_w[0], at_x[0])
        y_NM = jnp.einsum("nk,mk->nm", w_NK, x_MK, out_sharding=at_y, preferred_element_type=dtype)
        y_MN = lax.optimization_barrier(y_NM).T
    else:
        y_MN = jnp.einsum("mk,nk->mn", x_MK, w_NK, out_sharding=P(at_x[0], at_w[0]), preferred_element_type=dtype)
    return y_MN.reshape(*x.shape[:-1], -1, out_sharding=P(*at_x[:-1], at_w[0]))[:, :time]
