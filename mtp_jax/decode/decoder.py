"""Decoder: a language model laid out for decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh

from mtp_jax.heads.base import Seen
from mtp_jax.heads.config import HeadConfig
from mtp_jax.language_model import LanguageModel
from mtp_jax.model.cache import Cache
from mtp_jax.model.output_major import JOINED, OutputMajor, Together
from mtp_jax.model.transformer import Trunk, UnrolledTrunk
from mtp_jax.parameters import PARAMETERS, last_name, row
from mtp_jax.sharding import RULES, gather, platform
from mtp_jax.validate import require

T = TypeVar("T")
NO_MESH = "No mesh in scope; decode under `with jax.set_mesh(mtp_jax.make_mesh()):`."


class Decoder(LanguageModel):
    """A language model that reads and extends a cache. Made by `for_decoding`."""

    def __init__(self, model: LanguageModel):
        """Take over the parts of `model`, layers in a list; the head is unstacked in place."""
        self.config, self.head = model.config, model.head
        self.embed_VD, self.unembed_VD = model.embed_VD, model.unembed_VD
        # It may come later.
        self.trunk = UnrolledTrunk(model.trunk) if isinstance(model.trunk, Trunk) else model.trunk
        self.head.unstack(None if self.unembed_VD is None else self.unembed_VD[...])

    def embed(self, tokens_BT: Array) -> Array:
        """Token embeddings `[B, T, D]` in the compute dtype."""
        table_VD = self.unembed_VD if self.embed_VD is None else self.embed_VD
        assert table_VD is not None
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


@jax.tree_util.register_pytree_node_class
class Packed:
    """A decoder as a compiled function takes it many times: a list of arrays.

    Flax goes through its modules each time they are given to one: 0.6 ms for 16 layers.
    """

    def __init__(self, arrays: Sequence[Array], structure: _Structure):
        self.arrays, self.structure = arrays, structure

    @classmethod
    def of(cls, decoder: Decoder) -> Packed:
        """The arrays of `decoder` as they are now."""
        arrays, structure = jax.tree.flatten(decoder)
        return cls(arrays, _structure(structure))

    def tree_flatten(self) -> tuple[Sequence[Array], _Structure]:
        """For `jax.tree`."""
        return self.arrays, self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, arrays: Sequence[Array]) -> Packed:
        """For `jax.tree`."""
        return cls(arrays, structure)


class _Structure:
    """A structure that is the same if it is the same object: there is one for all that are equal."""

    def __init__(self, of: Any):
        self.of = of


_structure = functools.cache(_Structure)


def unpacked(decoder: Decoder | Packed) -> Decoder:
    """The decoder itself."""
    return jax.tree.unflatten(decoder.structure.of, decoder.arrays) if isinstance(decoder, Packed) else decoder


def for_decoding(model: LanguageModel, *, keep: bool = True) -> Decoder:
    """The model as decoding wants it: layers unstacked, matrices in the compute dtype and whole along `fsdp`.

    For one CPU they are also turned (`OutputMajor`), and those of one input joined (`Together`). What is laid out
    already stays as it is.

    Args:
      model: the model, its mesh in scope. It is not changed, unless it is not kept.
      keep: whether the model is still wanted. If not, it is taken apart, and of its trunk there is never more than one
        stacked weight twice, if nobody else holds parts of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    require(not mesh.empty, NO_MESH)
    if isinstance(model, Decoder):
        return model
    turn = mesh.size == 1 and platform() == "cpu"
    if keep:
        return _laid_out(model, turn)
    trunk = _unrolled(model, _caster(model.config.dtype), turn)
    decoder = _laid_out(model, turn)
    decoder.trunk = nnx.data(trunk)
    return decoder


def with_next_token(decoder: Decoder) -> Decoder:
    """The same trunk and embedding, in memory once, under a plain next-token table of V x D, to be timed.

    The table is the decoder's own where it has one, else random: its texts mean nothing.
    """
    config, table = HeadConfig(kind="none", window=1, target="ntp"), decoder.unembed_VD

    @jax.jit
    def bare() -> LanguageModel:
        model = LanguageModel(decoder.config, config, rngs=nnx.Rngs(0))
        model.trunk = model.embed_VD = None  # type: ignore[assignment]
        if table is not None:
            model.unembed_VD = None
        return model

    plain = for_decoding(bare())
    plain.trunk = nnx.data(decoder.trunk)
    if decoder.embed_VD is not None:
        plain.embed_VD = nnx.data(decoder.embed_VD)
    if table is not None:
        plain.unembed_VD = nnx.data(table)
    return plain


@functools.partial(jax.jit, static_argnames="turn")
def _laid_out(model: LanguageModel, turn: bool) -> Decoder:
    decoder = jax.tree_util.tree_map_with_path(_caster(model.config.dtype), Decoder(model))
    return _turned(decoder) if turn else decoder


def _caster(dtype: str) -> Callable[[tuple[Any, ...], Array], Array]:
    """A function of a parameter's path and itself: as decoding reads it. Gathered once, not at every step."""
    return lambda path, weight: gather(weight.astype(dtype) if _is_cast(path, weight) else weight)


def dtypes_for_decoding(target: Any, dtype: str) -> Any:
    """Shapes of parameters that are loaded for decoding alone.

    The trunk's are in the compute dtype, to which `for_decoding` casts them; those that a head makes something of are
    as they were saved.
    """

    def cast(path: tuple[Any, ...], weight: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        found = path[0].key in ("trunk", "embed_VD") and _is_cast(path, weight)
        return weight.update(dtype=jnp.dtype(dtype)) if found else weight

    return jax.tree_util.tree_map_with_path(cast, target)


def _is_cast(path: tuple[Any, ...], weight: Any) -> bool:
    """Whether decoding reads a parameter in the compute dtype."""
    name = last_name(path)
    return jnp.issubdtype(weight.dtype, jnp.floating) and not (name in PARAMETERS and row(name).exact)


def _unrolled(model: LanguageModel, cast: Callable[..., Array], turn: bool) -> UnrolledTrunk:
    """Take the trunk out of a model, its layers in a list. Each stacked weight goes before the next one is copied."""
    assert isinstance(model.trunk, Trunk)
    trunk, layers = model.trunk, []
    found, tree = jax.tree_util.tree_flatten_with_path(trunk.blocks)
    model.trunk = trunk.blocks = None  # type: ignore[assignment]
    while found:
        path, stacked = found.pop()
        layers.append(jax.block_until_ready(jax.jit(lambda w, path=path: [cast(path, one) for one in w])(stacked)))
        del stacked
    blocks = [tree.unflatten(weights) for weights in zip(*reversed(layers), strict=True)]
    del layers
    for i, block in enumerate(blocks):
        blocks[i] = None  # the one reference to what is about to be turned
        blocks[i] = jax.block_until_ready(jax.jit(_turned)(block)) if turn else block
        del block
    return UnrolledTrunk(trunk, blocks)


def _turned(part: T) -> T:
    """The same decoder, or layer of one, with its matrices turned, and those of one input joined."""
    for _, module in list(nnx.iter_graph(part)):
        if not isinstance(module, nnx.Module):
            continue
        names = getattr(module, "TOGETHER", ())
        if names and hasattr(module, names[0]):
            weights = [getattr(module, name)[...] for name in names]
            setattr(module, JOINED, Together(weights, len(row(names[0]).inputs)))
            for name in names:
                delattr(module, name)
        for name in [name for name in vars(module).keys() & PARAMETERS.keys() if row(name).matrix]:
            weight, inputs = getattr(module, name), len(row(name).inputs)
            if isinstance(weight, nnx.List) and not isinstance(weight[0], OutputMajor):
                setattr(module, name, nnx.List([OutputMajor(offset[...], inputs) for offset in weight]))
            elif isinstance(weight, nnx.Param):
                setattr(module, name, OutputMajor(weight[...], inputs))
    return part


def mesh_in_scope() -> AbstractMesh | Mesh:
    """The mesh in scope. Raises `ConfigError` if there is none."""
    mesh = jax.sharding.get_mesh()
    require(not mesh.empty, NO_MESH)
    return mesh
