"""Models whose parameters are noise, so that each of them matters, and what they compute."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mtp_jax.config import TrainConfig
from mtp_jax.language_model import LanguageModel
from mtp_jax.state import build_model, split
from support import tiny

TIME, ROWS = 12, 4
SEGMENTS = np.array([0] * 5 + [1] * 4 + [2] * 3)


def place(array: Any, spec: PartitionSpec) -> jax.Array:
    """An array on the mesh in scope."""
    return jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), spec))


def shapes_of(config: TrainConfig) -> tuple[nnx.GraphDef, Any]:
    """The structure of the config's model, and the shapes and shardings of its parameters on the mesh in scope."""
    return split(jax.eval_shape(lambda: build_model(config, jax.random.key(0))))


def random_params(config: TrainConfig, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """The structure of a config's model, and parameters that are noise: biases, gates and norms matter too.

    The noise is the same on every mesh.
    """
    graph, shapes = shapes_of(config)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        value = 1 + 0.2 * noise if path[-1].key == "scale" else 0.3 * noise
        return place(value, leaf.sharding.spec)

    return graph, jax.tree_util.tree_map_with_path(draw, shapes)


def make_model(seed: int = 0, **changes: Any) -> LanguageModel:
    """A model of noise. Tied embeddings and the other changes are of the model's config."""
    head = tiny.head_config(factors="shared" if changes.get("tie_embeddings") else "full")
    return nnx.merge(*random_params(tiny.train_config(tiny.model_config(**changes), head), seed))


def make_tokens(batch: int = 1, time: int = TIME, seed: int = 0) -> jax.Array:
    """Tokens that are drawn, on the mesh in scope."""
    tokens = np.random.default_rng(seed).integers(0, tiny.VOCAB, (batch, time))
    return tiny.shard(tokens.astype(np.int32))


forward = jax.jit(lambda model, *args: model(*args))


def hidden(model: LanguageModel, *args: Any) -> np.ndarray:
    """The hidden states of a forward pass, which is compiled once."""
    return np.asarray(forward(model, *args))
