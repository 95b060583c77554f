"""The parameters that a run begins with, where they are those of another run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh

from mtp_jax.config import ConfigError, TrainConfig, differences, require, shown
from mtp_jax.data import Tokenizer
from mtp_jax.loading import LoadedRun, load
from mtp_jax.train.checks import RESUMABLE
from mtp_jax.train.freeze import is_frozen
from mtp_jax.train.step import TrainState, split

TABLE = ("head", "unembed_VD")


def begin_from(config: TrainConfig, state: TrainState, tokenizer: Tokenizer, mesh: Mesh) -> tuple[TrainState, str]:
    """A fresh `state` with the trunk and the unembedding of the run `config.init_from`, and what was taken, in words.

    The unembedding is the run's own, or its next-token table (rank 1, `full` factors) where it has none. Factors and
    gate stay fresh: they are what a run of its own learns.

    Raises:
      ConfigError: it is no run, or of another tokenizer or another trunk, or it has not what this one freezes.
      CheckpointError: it has no complete checkpoint, or that is damaged.
    """
    run = load(config.init_from, mesh=mesh)
    require(
        run.tokenizer.to_json() == tokenizer.to_json(),
        f"init_from: {config.init_from} was trained with the tokenizer {run.tokenizer.to_json()} and this run has "
        f"{tokenizer.to_json()}. Give the same data.tokenizer.",
    )
    for name, here, there in differences(config.model, run.config.model):
        free = ("model", name) in RESUMABLE or name == "tie_embeddings"
        require(
            free,
            f"init_from: model.{name} is {shown(here)} and the run in {config.init_from} has {shown(there)}; a trunk "
            "is taken as it is. Give the run's own value.",
        )
    flat: dict[tuple[str, ...], Any] = flatten_dict(state.params)  # type: ignore[assignment]
    there = _parameters(run)
    taken = {path: there[path] for path in flat if (path[0] != "head" or path == TABLE) and path in there}
    for path, leaf in flat.items():
        needed = path[0] != "head" or is_frozen(config, path)
        if needed and (path not in taken or taken[path].shape != leaf.shape):
            found = f"{list(taken[path].shape)}" if path in taken else "none"
            raise ConfigError(
                f"init_from: {'.'.join(path)} is {list(leaf.shape)} here and the run in {config.init_from} has {found}"
                ". Begin from a run with the same trunk, and with head.target ntp, or rank 1 and full factors."
            )
    params: Any = unflatten_dict({**flat, **{path: _as(leaf, flat[path]) for path, leaf in taken.items()}})
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    fresh = [".".join(path) for path in flat if path not in taken]
    text = f"{len(taken)} parameters are those of step {run.step} of {config.init_from}; fresh: {', '.join(fresh)}"
    return dataclasses.replace(state, params=params, ema=ema), text


def _parameters(run: LoadedRun) -> dict[tuple[str, ...], Array]:
    """A run's parameters by path, with both tables: tied ones twice, and the unembedding that rank 1 stands for."""
    found: Any = flatten_dict(split(run.model)[1])
    head = run.config.head
    if run.config.model.tie_embeddings:
        found[("embed_VD",)] = found[TABLE]
    elif head.factors == "full" and head.target == "marginal" and head.rank == 1:
        u_DV = found[("head", "factors", "u_DRWV")][:, 0, 0]
        found[TABLE] = u_DV.T
    return found


def _as(array: Array, like: Array) -> Array:
    return jax.device_put(array, like.sharding)
