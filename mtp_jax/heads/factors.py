"""The factors p_rs(x_s | h) of a head: three ways to give R x W logits vectors of size V to one hidden state.

| factors | logits at (r, s) | matmul cost per position |
| --- | --- | --- |
| `full` | U_rs h | R W V D |
| `shared` | U A_rs h | R W V D + R W D^2 |
| `lowrank` | U A_s h + (U B) C_rs h | W V (D + R E) + W D^2 + V D E / positions |

U is the head's unembedding. Components are drawn per offset, copied over R and told apart by a little noise.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.config import HeadConfig, ModelConfig
from mtp_jax.model.layers import init_weight
from mtp_jax.sharding import RULES


class Factors(nnx.Module):
    """Logits of every factor.

    `STACKED` names the parameters that have a W axis, and where. `unstack` turns each into a list over offsets.
    """

    STACKED: ClassVar[dict[str, int]] = {}

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        raise TypeError("Factors is the interface; use one of FACTORS.")

    def logits(self, x_BTD: Array, unembed_VD: Array | None, offsets: slice = slice(None)) -> Array:
        """`[B, T, R, W, V]` in float32, for the offsets of a slice of 0..W-1 (all by default)."""
        raise TypeError(f"{type(self).__name__} does not define logits.")

    def unstack(self) -> None:
        """Give each offset its own arrays, so that decoding reads those of the offsets it asks for and copies none."""
        for name, axis in self.STACKED.items():
            stacked = getattr(self, name)[...]
            offsets = [lax.slice_in_dim(stacked, s, s + 1, axis=axis) for s in range(stacked.shape[axis])]
            setattr(self, name, nnx.List([nnx.Param(offset) for offset in offsets]))

    def project(self, equation: str, x_BTD: Array, name: str, offsets: slice, dtype: Any = None) -> Array:
        """`einsum(equation, x, parameter)` for some offsets; W is the last but one axis of the result."""
        weights = getattr(self, name)
        if isinstance(weights, nnx.List):
            parts = [weight[...] for weight in weights[offsets]]
        else:
            parts = [weights[...][(slice(None),) * self.STACKED[name] + (offsets,)]]
        results = [jnp.einsum(equation, x_BTD, w.astype(x_BTD.dtype), preferred_element_type=dtype) for w in parts]
        return results[0] if len(results) == 1 else jnp.concatenate(results, axis=-2)


def _copies(rngs: nnx.Rngs, shape_DRWX: tuple[int, ...], noise: float, spec: P) -> nnx.Param[Array]:
    """Weights of variance 1/D that are drawn for each offset and differ between components by `noise` of that."""
    d, _, w, x = shape_DRWX
    base = init_weight(rngs, (d, 1, w, x), inputs=1, spec=spec)
    return nnx.Param(base[...] + noise * init_weight(rngs, shape_DRWX, inputs=1, spec=spec)[...])


def unembed(x: Array, unembed_VD: Array) -> Array:
    """`[..., D]` to float32 logits `[..., V]`."""
    letters = "btrw"[: x.ndim - 1]
    equation = f"{letters}d,vd->{letters}v"
    return jnp.einsum(equation, x, unembed_VD.astype(x.dtype), preferred_element_type=jnp.float32)


class FullFactors(Factors):
    """An unembedding for each (rank, offset): the paper's from-scratch form, right for byte vocabularies."""

    STACKED: ClassVar[dict[str, int]] = {"u_DRWV": 2}

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        # D comes first and V last, so that all R x W unembeddings are one plain matrix product.
        shape = (model.d_model, head.rank, head.window, model.vocab_size)
        self.u_DRWV = _copies(rngs, shape, head.init_noise, RULES.u_DRWV)

    def logits(self, x_BTD: Array, unembed_VD: Array | None, offsets: slice = slice(None)) -> Array:
        """See `Factors.logits`."""
        return self.project("btd,drwv->btrwv", x_BTD, "u_DRWV", offsets, jnp.float32)


class SharedFactors(Factors):
    """A D x D map for each (rank, offset) under one unembedding: the paper's form for large vocabularies."""

    STACKED: ClassVar[dict[str, int]] = {"map_DRWD": 2}

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        shape = (model.d_model, head.rank, head.window, model.d_model)
        self.map_DRWD = _copies(rngs, shape, head.init_noise, RULES.map_DRWD)

    def logits(self, x_BTD: Array, unembed_VD: Array | None, offsets: slice = slice(None)) -> Array:
        """See `Factors.logits`."""
        assert unembed_VD is not None
        return unembed(self.project("btd,drwe->btrwe", x_BTD, "map_DRWD", offsets), unembed_VD)


class LowRankFactors(Factors):
    """A D x D map for each offset, shared by all components, plus a correction of width E for each of them."""

    STACKED: ClassVar[dict[str, int]] = {"map_DWD": 1, "down_DRWE": 2}

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d, r, w, e = model.d_model, head.rank, head.window, head.factor_width
        self.map_DWD = init_weight(rngs, (d, w, d), inputs=1, spec=RULES.map_DWD)
        self.down_DRWE = init_weight(rngs, (d, r, w, e), inputs=1, spec=RULES.down_DRWE, scale=head.init_noise)
        self.up_ED = init_weight(rngs, (e, d), inputs=1, spec=RULES.up_ED)

    def logits(self, x_BTD: Array, unembed_VD: Array | None, offsets: slice = slice(None)) -> Array:
        """See `Factors.logits`."""
        assert unembed_VD is not None
        dtype = x_BTD.dtype
        shared_BTWD = self.project("btd,dwe->btwe", x_BTD, "map_DWD", offsets)
        own_BTRWE = self.project("btd,drwe->btrwe", x_BTD, "down_DRWE", offsets)
        up_VE = jnp.einsum("vd,ed->ve", unembed_VD.astype(dtype), self.up_ED[...].astype(dtype))
        shared_BTWV = jnp.einsum(
            "btwd,vd->btwv", shared_BTWD, unembed_VD.astype(dtype), preferred_element_type=jnp.float32
        )
        return shared_BTWV[:, :, None] + unembed(own_BTRWE, up_VE)


FACTORS: dict[str, type[Factors]] = {"full": FullFactors, "shared": SharedFactors, "lowrank": LowRankFactors}


def factor_logits(params: tuple[Factors, Array | None], x_BTD: Array) -> Array:
    """The logits `[B, T, R, W, V]` of (factors, unembedding), as a function of parameters for `losses.mixture`."""
    factors, unembed_VD = params
    return factors.logits(x_BTD, unembed_VD)


def next_token_logits(unembed_VD: Array, x_BTD: Array) -> Array:
    """An ordinary next-token head in the same form: `[B, T, 1, 1, V]`."""
    return unembed(x_BTD, unembed_VD)[:, :, None, None]
