"""Train state: a model's parameters by name, and what changes with them in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import Array

from mtp_jax.config import TrainConfig
from mtp_jax.language_model import LanguageModel
from mtp_jax.parameters import last_name, row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training: steps taken, parameters by name, optimizer state of those that are trained, and the
    average of the parameters if the run keeps one. Donated whole to the step."""

    step: Array
    params: dict[str, Any]
    opt_state: Any
    ema: Any = None


def build_model(config: TrainConfig, key: Array) -> LanguageModel:
    """The model of a config, with fresh parameters in the dtype that they are kept in."""
    model = LanguageModel(config.model, config.head, rngs=nnx.Rngs(key))
    if config.model.param_dtype == "float32":
        return model
    graph, params = split(model)

    def cast(path: tuple[Any, ...], weight: Array) -> Array:
        kept = path[0].key == "head" or row(last_name(path)).exact
        return weight if kept else weight.astype(config.model.param_dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(cast, params))


def split(model: LanguageModel) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """A model as (structure, parameters by name); `nnx.merge` puts them together."""
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)
