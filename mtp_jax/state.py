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
    average of the parameters if the run keeps one. Donated whole to the step.

    `base`: the parameters of the run's base, if it has one, which stay as they are and are not saved with it; `params`
    are then the head's.
    """

    step: Array
    params: dict[str, Any]
    opt_state: Any
    ema: Any = None
    base: Any = None

    @property
    def whole(self) -> dict[str, Any]:
        """The parameters of the whole model."""
        return self.on_base(self.params)

    def on_base(self, params: dict[str, Any]) -> dict[str, Any]:
        """Those of the whole model where `params`, or their average, are its own."""
        return {**(self.base or {}), **params}


def build_model(config: TrainConfig, key: Array, *, trunk: bool = True) -> LanguageModel:
    """The model of a config, with fresh parameters in the dtype that they are kept in; without its trunk if `trunk` is
    False."""
    model = LanguageModel(config.model, config.head, rngs=nnx.Rngs(key), trunk=trunk)
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
