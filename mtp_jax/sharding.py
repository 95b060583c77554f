"""Sharding: where every activation lives. Those of parameters are in their rows, `mtp_jax.parameters`.

The batch is split over `data` and `fsdp`. Weights are split over `fsdp` (and gathered just before they are used:
ZeRO-3) and over `tensor` (attention heads, feed-forward width and vocabulary stay split while they are used).
Rank R and window W are never split. The letters are the legend of `mtp_jax`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")


@dataclass(frozen=True)
class Rules:
    """One partition spec for each kind of array."""

    rows_B: P = P(BATCH)
    tokens_BT: P = P(BATCH, None)
    x_BTD: P = P(BATCH, None, None)
    qkv_BTNH: P = P(BATCH, None, "tensor", None)
    mask_B1TS: P = P(BATCH, None, None, None)
    cache_BKSH: P = P(BATCH, "tensor", None, None)
    h_BTF: P = P(BATCH, None, "tensor")


RULES = Rules()


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: that of the mesh in scope, which may be a machine that is not here; else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def gather(w: Array) -> Array:
    """`w` whole along `fsdp`, still split along `tensor`. Its transpose scatters the gradient back."""
    spec = jax.typeof(w).sharding.spec
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return w if whole == spec else jax.reshard(w, whole)


# Inside `shard_map`, where each device sees its own part. The type of an array says over which mesh axes it varies.


def shares(axes: Iterable[str | Iterable[str] | None]) -> set[str]:
    """The mesh axes that a partition spec (or a set of names) mentions."""
    return {name for axis in axes if axis for name in ((axis,) if isinstance(axis, str) else axis)}


def varies(a: Array) -> frozenset[str]:
    """The mesh axes along which devices may hold different values of `a`."""
    return jax.typeof(a).manual_axis_type.varying


def vary(a: Array, but: Iterable[str] = ()) -> Array:
    """`a`, to be treated by each device as its own, so that its gradient is the device's own too and not a sum.

    Along the axes of `but` it stays what it is.
    """
    known = varies(a) | set(but)
    missing = tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name not in known)
    return lax.pcast(a, missing, to="varying") if missing else a


def like(d: Array, a: Array) -> Array:
    """The devices' own parts `d` of a gradient, summed (in float32) over the axes over which `a` does not vary."""
    axes = tuple(sorted(varies(d) - varies(a)))
    return lax.psum(d.astype(jnp.promote_types(d.dtype, jnp.float32)), axes).astype(d.dtype) if axes else d


def gather_local(w: Array, spec: P, dtype: jnp.dtype, but: Iterable[str] = ()) -> Array:
    """The parameter `w` whole along `fsdp`, rounded to `dtype` (in which it travels) and given back in float32; each
    device's own, but along the axes of `but`."""
    w = vary(w.astype(dtype), but)
    for dim in _gathered(spec):
        w = lax.all_gather(w, "fsdp", axis=dim, tiled=True)
    return w.astype(jnp.promote_types(dtype, jnp.float32))


def reduce_local(d: Array, w: Array, spec: P) -> Array:
    """The transpose of `gather_local`: scattered over `fsdp`, then summed over the axes that do not split `w`."""
    for dim in _gathered(spec):
        d = lax.psum_scatter(d, "fsdp", scatter_dimension=dim, tiled=True)
    return like(d, w).astype(w.dtype)


def _gathered(spec: P) -> list[int]:
    """The axes of an array that `fsdp` splits; none on a mesh where it has one device, whose exchange with itself would
    be a copy."""
    if jax.sharding.get_abstract_mesh().shape["fsdp"] == 1:
        return []
    return [dim for dim, axes in enumerate(spec) if "fsdp" in shares((axes,))]
