"""Decoder: a language model laid out for decoding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh

from mtp_jax.heads.base import Seen
from mtp_jax.language_model import LanguageModel
from mtp_jax.model.cache import Cache
from mtp_jax.model.output_major import OutputMajor
from mtp_jax.model.transformer import Trunk, UnrolledTrunk
from mtp_jax.parameters import PARAMETERS, last_name, row
from mtp_jax.sharding import RULES, gather, platform
from mtp_jax.validate import require

NO_MESH = "No mesh in scope; decode under `with jax.set_mesh(mtp_jax.make_mesh()):`."


class Decoder(LanguageModel):
    """A language model that reads and extends a cache. Made by `for_decoding`."""

    def __init__(self, model: LanguageModel):
        """Take over the parts of `model`, layers in a list; the head is unstacked in place."""
        assert isinstance(model.trunk, Trunk)
        self.config, self.head = model.config, model.head
        self.embed_VD, self.unembed_VD = model.embed_VD, model.unembed_VD
        self.trunk = UnrolledTrunk(model.trunk)
        self.head.unstack(None if self.unembed_VD is None else self.unembed_VD[...])

    def embed(self, tokens_BT: Array) -> Array:
        """Token embeddings `[B, T, D]` in the compute dtype."""
        table_VD = self.unembed_VD if self.embed_VD is None else self.embed_VD
        # A CPU gathers rows of bfloat16 in float32. Next to the tokens, which change, that is of these rows; alone it
        # would be of the whole table, in front of the loop.
        whole_VD, tokens_BT = lax.optimization_barrier((table_VD[...], tokens_BT))
        return whole_VD.at[tokens_BT].get(out_sharding=RULES.x_BTD).astype(self.config.dtype)

    def extend(self, tokens_BT: Array, cache: Cache, start_B: Array, attended: int | None = None) -> tuple[Seen, Cache]:
        """Run T more tokens of each row at its positions `start_B ..`, through the trunk's cache.

        Args:
          tokens_BT: the new tokens.
          cache: per layer (keys, values), written at the new positions before attention reads.
          start_B: each row's first new position.
          attended: attention reads the cache's first so many positions only (default: all).

        Returns:
          what the trunk saw of the new positions, and the cache.
        """
        assert isinstance(self.trunk, UnrolledTrunk)
        x_BTD, taps, cache = self.trunk.extend(self.embed(tokens_BT), cache, start_B, attended, self.head.taps)
        return self.seen(x_BTD, tokens_BT, taps), cache


def for_decoding(model: LanguageModel) -> Decoder:
    """The model as decoding wants it: layers unstacked, matrices in the compute dtype and whole along `fsdp`.

    For one CPU they are also turned (`OutputMajor`). What is laid out already stays as it is. `model` is not changed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    require(not mesh.empty, NO_MESH)
    if isinstance(model, Decoder):
        return model
    return _laid_out(model, turn=mesh.size == 1 and platform() == "cpu")


@functools.partial(jax.jit, static_argnames="turn")
def _laid_out(model: LanguageModel, turn: bool) -> Decoder:
    def cast(path: tuple[Any, ...], weight: Array) -> Array:
        name = last_name(path)
        exact = (name in PARAMETERS and row(name).exact) or not jnp.issubdtype(weight.dtype, jnp.floating)
        # Gathered once, not at every step.
        return gather(weight if exact else weight.astype(model.config.dtype))

    decoder = jax.tree_util.tree_map_with_path(cast, Decoder(model))
    return _turned(decoder) if turn else decoder


def _turned(decoder: Decoder) -> Decoder:
    """The same decoder with its matrices turned."""
    for _, module in list(nnx.iter_graph(decoder)):
        if not isinstance(module, nnx.Module):
            continue
        for name in [name for name in vars(module).keys() & PARAMETERS.keys() if row(name).matrix]:
            weight, inputs = getattr(module, name), len(row(name).inputs)
            if isinstance(weight, nnx.List) and not isinstance(weight[0], OutputMajor):
                setattr(module, name, nnx.List([OutputMajor(offset[...], inputs) for offset in weight]))
            elif isinstance(weight, nnx.Param):
                setattr(module, name, OutputMajor(weight[...], inputs))
    return decoder


def mesh_in_scope() -> AbstractMesh | Mesh:
    """The mesh in scope. Raises `ConfigError` if there is none."""
    mesh = jax.sharding.get_mesh()
    require(not mesh.empty, NO_MESH)
    return mesh
