"""Train state: a model's parameters by name, and what changes with them in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import Array

from mtp_jax.config import TrainConfig
from mtp_jax.language_model import LanguageModel


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
    """The model of a config, with fresh parameters."""
    return LanguageModel(config.model, config.head, rngs=nnx.Rngs(key))


def split(model: LanguageModel) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """A model as (structure, parameters by name); `nnx.merge` puts them together."""
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)
