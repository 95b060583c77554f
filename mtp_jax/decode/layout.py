"""How a model is laid out for decoding."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from mtp_jax.config import require
from mtp_jax.mesh import platform
from mtp_jax.model.block import Block
from mtp_jax.model.layers import MATRICES
from mtp_jax.model.output_major import OutputMajor
from mtp_jax.model.transformer import LanguageModel, unstack
from mtp_jax.sharding import gather

NO_MESH = "No mesh in scope; decode under `with jax.set_mesh(mtp_jax.make_mesh()):`."


def for_decoding(model: LanguageModel) -> LanguageModel:
    """The model as decoding wants it: layers unstacked, matrices in the compute dtype and whole along `fsdp`.

    For one CPU they are also turned (see `OutputMajor`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    require(not mesh.empty, NO_MESH)
    one = mesh.size == 1
    turn = one and platform() == "cpu"

    def cast(path: tuple[Any, ...], weight: Array) -> Array:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        # Norms and the gate compute in float32. Gathered once, not at every step.
        return gather(weight if names & {"scale", "gate_DR"} else weight.astype(model.config.dtype))

    def convert(model: LanguageModel) -> LanguageModel:
        model = unstack(model) if isinstance(model.blocks, Block) else model
        model = jax.tree_util.tree_map_with_path(cast, model)
        return _turned(model) if turn else model

    return jax.jit(convert)(model)


def _turned(model: LanguageModel) -> LanguageModel:
    """The same model with its matrices turned."""
    for _, module in list(nnx.iter_graph(model)):
        if not isinstance(module, nnx.Module):
            continue
        for name in vars(module).keys() & MATRICES.keys():
            weight, inputs = getattr(module, name), len(MATRICES[name][0])
            if isinstance(weight, nnx.List) and not isinstance(weight[0], OutputMajor):
                setattr(module, name, nnx.List([OutputMajor(offset[...], inputs) for offset in weight]))
            elif isinstance(weight, nnx.Param):
                setattr(module, name, OutputMajor(weight[...], inputs))
    return model


def mesh_in_scope() -> AbstractMesh | Mesh:
    """The mesh in scope. Raises `ConfigError` if there is none."""
    mesh = jax.sharding.get_mesh()
    require(not mesh.empty, NO_MESH)
    return mesh
