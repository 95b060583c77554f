"""Weights of pretrained models: one table of their names, here, at Hugging Face and in GGUF, read both ways.

A matrix is `[inputs.., outputs..]` here and (outputs, inputs) there; our layers are stacked and theirs have names of
their own. Rotary embeddings turn the pairs (i, i + H/2) here and at Hugging Face.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mtp_jax.model.config import ModelConfig
from mtp_jax.parameters import row
from mtp_jax.validate import require

Path = tuple[str, ...]
Read = Callable[[str, slice, slice], np.ndarray]
"""A part of a tensor by name: its rows and its columns; of a vector, its entries and anything."""

ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Weight:
    """A parameter here and there: `path` below the model, the names at Hugging Face and in GGUF (`{}` is the layer).

    `pairs`: its outputs are turned by rotary embeddings; GGUF has them interleaved for some architectures.
    """

    path: str
    hf: str
    gguf: str
    pairs: bool = False

    @property
    def key(self) -> Path:
        """Its path as a tuple."""
        return tuple(self.path.split("."))


_LAYER, _BLOCK = "model.layers.{}.", "blk.{}."
WEIGHTS = (
    Weight("unembed_VD", "lm_head.weight", "output.weight"),
    Weight("embed_VD", "model.embed_tokens.weight", "token_embd.weight"),
    Weight("trunk.norm.scale", "model.norm.weight", "output_norm.weight"),
    *(
        Weight(f"trunk.blocks.{path}", f"{_LAYER}{hf}", f"{_BLOCK}{gguf}", pairs)
        for path, hf, gguf, pairs in (
            ("attention_norm.scale", "input_layernorm.weight", "attn_norm.weight", False),
            ("attention.wq_DNH", "self_attn.q_proj.weight", "attn_q.weight", True),
            ("attention.wk_DKH", "self_attn.k_proj.weight", "attn_k.weight", True),
            ("attention.wv_DKH", "self_attn.v_proj.weight", "attn_v.weight", False),
            ("attention.wo_NHD", "self_attn.o_proj.weight", "attn_output.weight", False),
            ("attention.bq_NH", "self_attn.q_proj.bias", "attn_q.bias", True),
            ("attention.bk_KH", "self_attn.k_proj.bias", "attn_k.bias", True),
            ("attention.bv_KH", "self_attn.v_proj.bias", "attn_v.bias", False),
            ("attention.q_norm.scale", "self_attn.q_norm.weight", "attn_q_norm.weight", False),
            ("attention.k_norm.scale", "self_attn.k_norm.weight", "attn_k_norm.weight", False),
            ("feed_forward_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight", False),
            ("feed_forward.w_gate_DF", "mlp.gate_proj.weight", "ffn_gate.weight", False),
            ("feed_forward.w_up_DF", "mlp.up_proj.weight", "ffn_up.weight", False),
            ("feed_forward.w_down_FD", "mlp.down_proj.weight", "ffn_down.weight", False),
        )
    ),
)
TIED = {"unembed_VD": "embed_VD"}  # where embeddings are tied, the one table has the name of the embedding there


def names(params: Mapping[str, Any], config: ModelConfig, kind: str) -> dict[Path, Weight]:
    """The rows of a model's parameters outside its head, by path, with the names of `kind` (`hf` or `gguf`)."""
    flat = [path for path in flatten_dict(dict(params)) if path[0] != "head"]
    rows = {weight.key: weight for weight in WEIGHTS}
    if config.tie_embeddings:
        embedding = rows[("embed_VD",)]
        rows[("unembed_VD",)] = Weight("unembed_VD", embedding.hf, embedding.gguf)
    return {path: rows[path] for path in flat}


def read_params(
    target: Mapping[str, Any],
    config: ModelConfig,
    shapes: Mapping[str, Sequence[int]],
    read: Read,
    kind: str,
    what: str,
) -> dict[str, Any]:
    """The parameters of a model without its head, each device's part read for itself.

    Args:
      target: shapes, dtypes and shardings of the parameters, by name; tables may have more rows, which are 0.
      config: the model's, with as many rows as its files have.
      shapes: of all tensors that there are, by their names.
      read: a part of one of them.
      kind: whose names they are: `hf` or `gguf`.
      what: the source, for messages.

    Raises:
      ConfigError: a tensor is missing, left over or of a wrong shape.
    """
    flat: dict[Path, Any] = flatten_dict(dict(target))  # type: ignore[assignment]
    rows = names(target, config, kind)
    wanted: dict[str, tuple[int, ...]] = {}
    for path, weight in rows.items():
        shape = theirs(flat[path].shape, path)
        if path[-1].endswith("_VD"):
            shape = (config.vocab_size, shape[1])
        for name in tensors(weight, config, kind):
            wanted[name] = shape
    missing, more = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    require(not missing, f"{what} has no tensor {_some(missing)}; the config says that the model has such weights.")
    require(not more, f"{what} has the tensor {_some(more)}, which this model has no place for.")
    for name, shape in wanted.items():
        found = tuple(shapes[name])
        require(
            found == shape,
            f"{what}: {name} is {list(found)}, and the config makes it {list(shape)}.",
        )

    def place(path: Path, weight: Weight) -> jax.Array:
        like, parts = flat[path], tensors(weight, config, kind)

        def part(index: Any) -> np.ndarray:
            return _part(path, like, index, parts, shapes, read)

        array = jax.make_array_from_callback(like.shape, like.sharding, part).block_until_ready()
        gc.collect(0)  # JAX lets go of what it has copied from when Python collects: two parameters would be held
        return array

    return unflatten_dict({path: place(path, weight) for path, weight in rows.items()})


def tensors(weight: Weight, config: ModelConfig, kind: str) -> list[str]:
    """The names of a weight's tensors: one, or one of each layer."""
    name = getattr(weight, kind)
    return [name.format(i) for i in range(config.num_layers)] if "{}" in name else [name]


def common_dtype(matrices: set[str], biases: Iterable[np.ndarray]) -> str:
    """The dtype that holds all parameters: the matrices', if it is one and the biases fit. Norms are float32."""
    if len(matrices) != 1:
        return "float32"
    (dtype,) = matrices
    with np.errstate(over="ignore"):
        same = all(np.array_equal(bias.astype(jnp.dtype(dtype)).astype(bias.dtype), bias) for bias in biases)
    return dtype if same else "float32"


def theirs(shape: Sequence[int], path: Path) -> tuple[int, ...]:
    """The shape of a tensor of theirs, from that of our parameter (without its layers)."""
    own, found = tuple(shape[1:] if "blocks" in path else shape), row(path[-1])
    if found.matrix:
        inner, outer = _sizes(own, len(found.inputs))
        return outer, inner
    return own if path[-1].endswith("_VD") else (math.prod(own),)


def to_theirs(array: np.ndarray, path: Path) -> np.ndarray:
    """One layer of our parameter as their tensor."""
    shape = theirs((0, *array.shape) if "blocks" in path else array.shape, path)
    return np.ascontiguousarray(array.reshape(shape[::-1]).T) if row(path[-1]).matrix else array.reshape(shape)


def _sizes(shape: tuple[int, ...], inputs: int) -> tuple[int, int]:
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _part(
    path: Path, like: Any, index: tuple[slice, ...], parts: list[str], shapes: Mapping[str, Sequence[int]], read: Read
) -> np.ndarray:
    """What a device keeps of a parameter: `index` of it, read from the tensors it is made of."""
    stacked = "blocks" in path
    layers = range(len(parts))[index[0]] if stacked else range(1)
    own, at = (like.shape[1:], index[1:]) if stacked else (like.shape, index)
    bounds = [range(size)[piece] for size, piece in zip(own, at, strict=True)]
    lengths = [len(bound) for bound in bounds]
    found = row(path[-1])
    out = _zeros((len(layers), *lengths), like.dtype)
    for place, layer in enumerate(layers):
        if found.matrix:
            inputs = len(found.inputs)
            inner, outer = _flat(bounds[:inputs], own[:inputs]), _flat(bounds[inputs:], own[inputs:])
            out[place] = read(parts[layer], outer, inner).T.reshape(lengths)
        elif path[-1].endswith("_VD"):
            rows = slice(bounds[0].start, min(bounds[0].stop, shapes[parts[0]][0]))  # the rest is padding
            if rows.start < rows.stop:
                out[place, : rows.stop - rows.start] = read(parts[0], rows, slice(bounds[1].start, bounds[1].stop))
        else:
            out[place] = read(parts[layer], _flat(bounds, own), slice(None)).reshape(lengths)
    return out if stacked else out[0]


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that lie as JAX wants them: a CPU then keeps them, and makes no copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.zeros(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)


def _flat(bounds: Sequence[range], sizes: Sequence[int]) -> slice:
    """The entries of axes that are laid end to end: only the first of them may be cut."""
    inner = math.prod(sizes[1:])
    assert [len(bound) for bound in bounds[1:]] == list(sizes[1:]), "only the first of several axes is split"
    return slice(bounds[0].start * inner, bounds[0].stop * inner)


def _some(found: Sequence[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(map(repr, found[:3])) + more
