"""Warm start: a run that begins with the model of another."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.runs.base import FACTORS, FREE, TABLE, gives_next_token
from mtp_jax.runs.loading import LoadedRun, load
from mtp_jax.state import TrainState, split
from mtp_jax.validate import ConfigError, differences, require


def begin_from(config: TrainConfig, state: TrainState, tokenizer: Tokenizer, mesh: Mesh) -> tuple[TrainState, str]:
    """A fresh `state` with the model of the run `config.init_from`, and what was taken, in words. The head stays fresh.

    Raises:
      ConfigError: it is no run, or of another tokenizer or another trunk, or it has not what this one needs.
      CheckpointError: it has no complete checkpoint, or that is damaged.
    """
    run = load(config.init_from, mesh=mesh)
    require(
        run.tokenizer.to_json() == tokenizer.to_json(),
        f"init_from: {config.init_from} was trained with the tokenizer {run.tokenizer.to_json()} and this run has "
        f"{tokenizer.to_json()}. Give the same data.tokenizer.",
    )
    for name, here, there in differences(config.model, run.config.model):
        free = name in FREE or (name == "tie_embeddings" and there)
        why = "one table would have to stand for two" if name == "tie_embeddings" else "a trunk is taken as it is"
        require(
            free,
            f"init_from: model.{name} is {here!r} and the run in {config.init_from} has {there!r}; {why}. Give the "
            "run's own value.",
        )
    flat: dict[tuple[str, ...], Any] = flatten_dict(state.params)  # type: ignore[assignment]
    there = _parameters(run, config.model.tie_embeddings)
    # A tied table of a run whose head gives the next token is its embedding alone.
    apart = config.model.tie_embeddings and run.config.head.target == "marginal"
    if config.head.target == "ntp" and (apart or not gives_next_token(run.config)):
        there.pop(TABLE, None)
    taken = {path: there[path] for path in flat if path[0] != "head" and path in there}
    for path, leaf in flat.items():
        fresh = path == TABLE and config.head.target == "marginal"
        if path[0] != "head" and (path not in taken or taken[path].shape != leaf.shape) and not fresh:
            found = f"{list(taken[path].shape)}" if path in taken else "none"
            table = " that gives the next token" if path == TABLE else ""
            raise ConfigError(
                f"init_from: {'.'.join(path)} is {list(leaf.shape)} here and the run in {config.init_from} has {found}"
                f"{table}. Begin from a run with the same trunk, and with head.target ntp, or rank 1 and full factors."
            )
    params: Any = unflatten_dict(
        {**flat, **{path: jax.device_put(leaf, flat[path].sharding) for path, leaf in taken.items()}}
    )
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    fresh = [".".join(path) for path in flat if path not in taken]
    text = f"{len(taken)} parameters are those of step {run.step} of {config.init_from}; fresh: {', '.join(fresh)}"
    return dataclasses.replace(state, params=params, ema=ema), text


def _parameters(run: LoadedRun, tied: bool) -> dict[tuple[str, ...], Array]:
    """A run's parameters by path, for one that is `tied` or not: then with a tied table twice, and with the table that
    full factors of rank 1 stand for."""
    found: Any = flatten_dict(split(run.model)[1])
    if tied:
        return found
    if run.config.model.tie_embeddings:
        found[("embed_VD",)] = jnp.copy(found[TABLE])  # the step donates each of the two
    if run.config.head.target == "marginal" and gives_next_token(run.config):
        found[TABLE] = found[FACTORS][:, 0, 0].T
    return found
