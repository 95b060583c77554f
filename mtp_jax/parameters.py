"""Parameters: one row for each, by the name of its array. Sharding, initialisation, optimizer and decoding read it.

A new parameter is one row. The letters are the legend of `mtp_jax`; the L axis of stacked layers is in front and
counted nowhere. Input widths lie over `fsdp`, the other axis over `tensor`; R and W are never split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Parameter:
    """How one parameter is treated.

    `spec`: the mesh axes that split it. `inputs`, `outputs`: the axes of a matrix; all others (L, R, W) are batch axes.
    `matrix`: it has weight decay, Muon orthogonalises it, and a CPU's decoder turns it. Tables of rows are no matrices.
    `exact`: it computes in its own dtype, whatever the model's is. `trained`: no gradient exists where it is not.
    """

    spec: P
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    matrix: bool = True
    exact: bool = False
    trained: bool = True


PARAMETERS: dict[str, Parameter] = {
    # The vocabulary.
    "embed_VD": Parameter(P("tensor", "fsdp"), (1,), (0,), matrix=False),
    "unembed_VD": Parameter(P("tensor", "fsdp"), (1,), (0,), matrix=False),
    # The trunk.
    "wq_DNH": Parameter(P("fsdp", "tensor", None), (0,), (1, 2)),
    "wk_DKH": Parameter(P("fsdp", "tensor", None), (0,), (1, 2)),
    "wv_DKH": Parameter(P("fsdp", "tensor", None), (0,), (1, 2)),
    "wo_NHD": Parameter(P("tensor", None, "fsdp"), (0, 1), (2,)),
    "bq_NH": Parameter(P("tensor", None), matrix=False),
    "bk_KH": Parameter(P("tensor", None), matrix=False),
    "bv_KH": Parameter(P("tensor", None), matrix=False),
    "w_gate_DF": Parameter(P("fsdp", "tensor"), (0,), (1,)),
    "w_up_DF": Parameter(P("fsdp", "tensor"), (0,), (1,)),
    "w_down_FD": Parameter(P("tensor", "fsdp"), (0,), (1,)),
    "scale": Parameter(P(None), matrix=False, exact=True),
    # Factors. The D x D maps are not split over tensor: their output meets the vocabulary, which is.
    "u_DRWV": Parameter(P("fsdp", None, None, "tensor"), (0,), (3,)),
    "u_DWV": Parameter(P("fsdp", None, "tensor"), (0,), (2,)),
    "map_DRWD": Parameter(P("fsdp", None, None, None), (0,), (3,)),
    "residual_DRWD": Parameter(P("fsdp", None, None, None), (0,), (3,)),
    "map_DWD": Parameter(P("fsdp", None, None), (0,), (2,)),
    "down_DRWE": Parameter(P("fsdp", None, None, None), (0,), (3,)),
    "up_ED": Parameter(P(None, "fsdp"), (0,), (1,)),
    "up_EV": Parameter(P(None, "tensor"), (0,), (1,)),
    "listed_n": Parameter(P(None), matrix=False, exact=True, trained=False),
    # Encoders: C is what is joined, two widths or more.
    "join_gate_CF": Parameter(P("fsdp", "tensor"), (0,), (1,)),
    "join_up_CF": Parameter(P("fsdp", "tensor"), (0,), (1,)),
    "join_down_FD": Parameter(P("tensor", "fsdp"), (0,), (1,)),
    "join_CD": Parameter(P("fsdp", None), (0,), (1,)),
    # Circuits.
    "gate_DR": Parameter(P("fsdp", None), (0,), (1,), matrix=False, exact=True),
    "trans_DMRR": Parameter(P("fsdp", None, None, None), (0,), (3,), matrix=False),
    "trans_down_DE": Parameter(P("fsdp", None), (0,), (1,), matrix=False),
    "trans_EMRR": Parameter(P(None, None, None, None), (0,), (3,), matrix=False),
}


STACKS = ("blocks", "stages")
"""The modules whose parameters are stacked on an L axis in front."""


def row(name: str) -> Parameter:
    """The row of a parameter. Raises `KeyError`, which says where to add it, if there is none."""
    if name not in PARAMETERS:
        raise KeyError(f"The parameter {name} has no row in PARAMETERS of {__name__}; add one.")
    return PARAMETERS[name]


def init_weight(rngs: nnx.Rngs, name: str, shape: tuple[int, ...], scale: float = 1.0) -> nnx.Param[Array]:
    """A float32 weight of variance `scale**2 / fan_in`, split as its row says."""
    found = row(name)
    std = scale / math.sqrt(math.prod(shape[axis] for axis in found.inputs))
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=found.spec))


def init_full(name: str, shape: tuple[int, ...], value: float = 0.0) -> nnx.Param[Array]:
    """A float32 parameter that starts with one value everywhere."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=row(name).spec))


def last_name(path: tuple[Any, ...]) -> str:
    """The name of the parameter at a path of a tree of parameters; what is stacked in a list has that of the list."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    return next((name for name in reversed(names) if name in PARAMETERS), str(names[-1]))
