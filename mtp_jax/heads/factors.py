"""Factors p_rs(x_s | h) of a mixture: five ways to give R x W logits vectors of size V to one hidden state.

| factors | logits at (r, s) | forward FLOPs per position |
| --- | --- | --- |
| `full` | U_rs h | 2 R W V D |
| `shared` | U A_rs h | 2 R W V D + 2 R W D^2 |
| `residual` | U (h + silu(A_rs h)) | as `shared` |
| `lowrank` | U A_s h + (U B) C_rs h | 2 W V (D + R E) + 2 W D (D + R E); U B once per call, or once for decoding |
| `lora` | U_s h + B C_rs h | 2 W V (D + R E) + 2 W D R E |

U is the model's vocabulary table. Components are drawn per offset, copied over R and told apart by a little noise.
With target `ntp` maps begin as the identity, and those of `residual` as zero: drafts begin as the model's own law.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import product
from mtp_jax.model.output_major import OutputMajor
from mtp_jax.parameters import init_full, init_weight, row
from mtp_jax.sharding import gather

Tables = dict[str, Any]

NEAR = 0.01
"""Noise between components that begin as the identity, of what a fresh weight has. The law moves by less than 1e-2
nats."""


class Flops(NamedTuple):
    """FLOPs of the logits of one position, all R and W, and what of backward's twice as many is saved where the hidden
    states (`states`) or the vocabulary table (`table`) need no gradient."""

    forward: int
    states: int
    table: int


class Factors(nnx.Module):
    """Parameters of the factors; a `losses.tiles.Form`, which says how logits come from them.

    `STACKED` names the parameters that have a W axis, and where. `unstack` turns each into a list over offsets.
    `THROUGH_TABLE`: logits go through the model's vocabulary table, which is then among the tables as `unembed_VD`.
    """

    STACKED: ClassVar[dict[str, int]] = {}
    THROUGH_TABLE: ClassVar[bool] = False

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    @staticmethod
    def tables(params: Tables) -> Tables:
        """What a position's logits are computed from: made once for many positions."""
        return params

    @staticmethod
    def logits(tables: Tables, x_BTD: Array) -> Array:
        """`[B, T, R, W, V]` in float32."""
        raise NotImplementedError

    @staticmethod
    def rows(rank: int, window: int) -> int:
        """Rows of one position that go through the same large table, for `losses.tiles`."""
        return 1

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> Flops:
        """The work of one position."""
        raise NotImplementedError

    def params(self) -> Tables:
        """The parameters by name; those of which each offset has its own, if `unstack` made it so, in lists."""
        found: Tables = {}
        for name, param in vars(self).items():
            if isinstance(param, nnx.List):
                found[name] = [offset[...] for offset in param]
            elif isinstance(param, nnx.Param | OutputMajor):
                found[name] = param[...]
        return found

    @classmethod
    def at(cls, params: Tables, offsets: slice) -> Tables:
        """The parameters of a slice of the offsets 0..W-1."""

        def cut(name: str, param: Array | list[Array]) -> Array | list[Array]:
            if isinstance(param, list):
                return param[offsets]
            return param[(*(slice(None),) * cls.STACKED[name], offsets)] if name in cls.STACKED else param

        return {name: cut(name, param) for name, param in params.items()}

    def unstack(self, unembeddings: Tables) -> None:
        """Give each offset its own arrays, so that decoding reads those of the offsets it asks for and copies none.

        `unembeddings`: `unembed_VD` and, with a shortlist, `short_unembed_VD`, for what is made of them once.
        """
        for name, axis in self.STACKED.items():
            stacked = getattr(self, name)[...]
            offsets = [lax.slice_in_dim(stacked, s, s + 1, axis=axis) for s in range(stacked.shape[axis])]
            setattr(self, name, nnx.List([nnx.Param(offset) for offset in offsets]))


def _copies(rngs: nnx.Rngs, name: str, shape_DRWX: tuple[int, ...], noise: float) -> nnx.Param[Array]:
    """Weights of variance 1/D that are drawn for each offset and differ between components by `noise` of that."""
    d, _, w, x = shape_DRWX
    base = init_weight(rngs, name, (d, 1, w, x))
    return nnx.Param(base[...] + noise * init_weight(rngs, name, shape_DRWX)[...])


def _identity(rngs: nnx.Rngs, name: str, shape: tuple[int, ...], noise: float = 0.0) -> nnx.Param[Array]:
    """The identity from the first axis to the last, with noise of that many times a fresh weight."""
    eye = jnp.eye(shape[0]).reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1])
    whole = jax.reshard(jnp.broadcast_to(eye, shape), row(name).spec)
    return nnx.Param(whole + init_weight(rngs, name, shape, noise)[...] if noise else whole)


def _by_offset(equation: str, x_BTD: Array, weights: Any) -> Array:
    """`product` with weights that have a W axis, or a list over it; W is the last but one axis of the result."""
    parts = weights if isinstance(weights, list) else [weights]
    results = [product(equation, x_BTD, part) for part in parts]
    return results[0] if len(results) == 1 else jnp.concatenate(results, axis=-2)


class FullFactors(Factors):
    """An unembedding for each (rank, offset): the paper's from-scratch form, right for byte vocabularies."""

    STACKED: ClassVar[dict[str, int]] = {"u_DRWV": 2}

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        # D comes first and V last, so that all R x W unembeddings are one plain matrix product.
        shape = (model.d_model, head.rank, head.window, model.vocab_size)
        self.u_DRWV = _copies(rngs, "u_DRWV", shape, head.init_noise)

    @staticmethod
    def logits(tables: Tables, x_BTD: Array) -> Array:
        """`[B, T, R, W, V]` in float32."""
        return _by_offset("btd,drwv->btrwv", x_BTD, tables["u_DRWV"])

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> Flops:
        """The work of one position."""
        forward = 2 * head.rank * head.window * model.vocab_size * model.d_model
        return Flops(forward, forward, 0)


class SharedFactors(Factors):
    """A D x D map for each (rank, offset) under one unembedding: the paper's form for large vocabularies."""

    STACKED: ClassVar[dict[str, int]] = {"map_DRWD": 2}
    THROUGH_TABLE: ClassVar[bool] = True

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        shape = (model.d_model, head.rank, head.window, model.d_model)
        if head.target == "ntp":  # it begins as the law that it drafts for
            self.map_DRWD = _identity(rngs, "map_DRWD", shape, NEAR * head.init_noise if head.rank > 1 else 0.0)
        else:
            self.map_DRWD = _copies(rngs, "map_DRWD", shape, head.init_noise)

    @staticmethod
    def logits(tables: Tables, x_BTD: Array) -> Array:
        """`[B, T, R, W, V]` in float32."""
        rows_BTRWD = _by_offset("btd,drwe->btrwe", x_BTD, tables["map_DRWD"]).astype(x_BTD.dtype)
        return product("btrwd,vd->btrwv", rows_BTRWD, tables["unembed_VD"])

    @staticmethod
    def rows(rank: int, window: int) -> int:
        """All of them go through the model's."""
        return rank * window

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> Flops:
        """The work of one position."""
        maps, table = (2 * head.rank * head.window * model.d_model * n for n in (model.d_model, model.vocab_size))
        return Flops(maps + table, maps, table)


class ResidualFactors(Factors):
    """A residual block for each (rank, offset) under one unembedding; with one component, Medusa (arXiv 2401.10774)."""

    STACKED: ClassVar[dict[str, int]] = {"residual_DRWD": 2}
    THROUGH_TABLE: ClassVar[bool] = True

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        shape = (model.d_model, head.rank, head.window, model.d_model)
        if head.target == "ntp":  # it begins as the law that it drafts for
            noise = NEAR * head.init_noise if head.rank > 1 else 0.0
            self.residual_DRWD = init_weight(rngs, "residual_DRWD", shape, noise)
        else:
            self.residual_DRWD = _copies(rngs, "residual_DRWD", shape, head.init_noise)

    @staticmethod
    def logits(tables: Tables, x_BTD: Array) -> Array:
        """`[B, T, R, W, V]` in float32."""
        added_BTRWD = jax.nn.silu(_by_offset("btd,drwe->btrwe", x_BTD, tables["residual_DRWD"]))
        rows_BTRWD = (x_BTD.astype(added_BTRWD.dtype)[:, :, None, None] + added_BTRWD).astype(x_BTD.dtype)
        return product("btrwd,vd->btrwv", rows_BTRWD, tables["unembed_VD"])

    @staticmethod
    def rows(rank: int, window: int) -> int:
        """All of them go through the model's."""
        return rank * window

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> Flops:
        """The work of one position."""
        maps, table = (2 * head.rank * head.window * model.d_model * n for n in (model.d_model, model.vocab_size))
        return Flops(maps + table, maps, table)


class LowRankFactors(Factors):
    """A D x D map for each offset, shared by all components, plus a correction of width E for each of them."""

    STACKED: ClassVar[dict[str, int]] = {"map_DWD": 1, "down_DRWE": 2}
    THROUGH_TABLE: ClassVar[bool] = True

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d, r, w, e = model.d_model, head.rank, head.window, head.factor_width
        self.down_DRWE = init_weight(rngs, "down_DRWE", (d, r, w, e), head.init_noise)
        if head.target == "ntp":  # as above, with corrections of zero, whose components differ after one step
            self.map_DWD, self.up_ED = _identity(rngs, "map_DWD", (d, w, d)), init_full("up_ED", (e, d))
        else:
            self.map_DWD, self.up_ED = init_weight(rngs, "map_DWD", (d, w, d)), init_weight(rngs, "up_ED", (e, d))

    @staticmethod
    def tables(params: Tables) -> Tables:
        """The corrections have a table of their own, U B."""
        if "up_VE" in params:
            return params
        return params | {"up_VE": product("vd,ed->ve", params["unembed_VD"], params["up_ED"])}

    def unstack(self, unembeddings: Tables) -> None:
        """As all factors; U B is made once."""
        whole = jax.tree.map(gather, self.params())
        super().unstack(unembeddings)
        for name, unembed_VD in unembeddings.items():
            up_VE = self.tables(whole | {"unembed_VD": gather(unembed_VD)})["up_VE"]
            setattr(self, name.replace("unembed_VD", "up_VE"), nnx.Param(up_VE))
        del self.up_ED

    @staticmethod
    def logits(tables: Tables, x_BTD: Array) -> Array:
        """`[B, T, R, W, V]` in float32."""
        shared_BTWD = _by_offset("btd,dwe->btwe", x_BTD, tables["map_DWD"]).astype(x_BTD.dtype)
        own_BTRWE = _by_offset("btd,drwe->btrwe", x_BTD, tables["down_DRWE"]).astype(x_BTD.dtype)
        shared_BTWV = product("btwd,vd->btwv", shared_BTWD, tables["unembed_VD"])
        return shared_BTWV[:, :, None] + product("btrwe,ve->btrwv", own_BTRWE, tables["up_VE"])

    @staticmethod
    def rows(rank: int, window: int) -> int:
        """One for each offset goes through the model's, which is larger than that of the corrections."""
        return window

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> Flops:
        """The work of one position."""
        w, d, own, v = head.window, model.d_model, head.rank * head.factor_width, model.vocab_size
        return Flops(2 * w * (d + own) * (v + d), 2 * w * d * (d + own), 2 * w * d * v)


class LoRAFactors(Factors):
    """An unembedding for each offset, shared by all components, plus a correction of width E for each of them.

    For vocabularies below D, where its tables are smaller than the maps of `lowrank`. LoRA: arXiv 2106.09685.
    """

    STACKED: ClassVar[dict[str, int]] = {"u_DWV": 1, "down_DRWE": 2}

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d, r, w, e, v = model.d_model, head.rank, head.window, head.factor_width, model.vocab_size
        self.u_DWV = init_weight(rngs, "u_DWV", (d, w, v))
        self.down_DRWE = init_weight(rngs, "down_DRWE", (d, r, w, e), head.init_noise)
        self.up_EV = init_weight(rngs, "up_EV", (e, v))

    @staticmethod
    def tables(params: Tables) -> Tables:
        """B with its outputs first, as a few rows are multiplied fast by."""
        return params if "up_VE" in params else params | {"up_VE": params["up_EV"].T}

    def unstack(self, unembeddings: Tables) -> None:
        """As all factors; B is turned once."""
        super().unstack(unembeddings)
        self.up_VE = nnx.Param(self.up_EV[...].T)
        del self.up_EV

    @staticmethod
    def logits(tables: Tables, x_BTD: Array) -> Array:
        """`[B, T, R, W, V]` in float32."""
        own_BTRWE = _by_offset("btd,drwe->btrwe", x_BTD, tables["down_DRWE"]).astype(x_BTD.dtype)
        shared_BTWV = _by_offset("btd,dwv->btwv", x_BTD, tables["u_DWV"])
        return shared_BTWV[:, :, None] + product("btrwe,ve->btrwv", own_BTRWE, tables["up_VE"])

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> Flops:
        """The work of one position."""
        w, d, own, v = head.window, model.d_model, head.rank * head.factor_width, model.vocab_size
        return Flops(2 * w * (v * (d + own) + d * own), 2 * w * d * (v + own), 0)


FACTORS: dict[str, type[Factors]] = {
    "full": FullFactors,
    "shared": SharedFactors,
    "residual": ResidualFactors,
    "lowrank": LowRankFactors,
    "lora": LoRAFactors,
}
