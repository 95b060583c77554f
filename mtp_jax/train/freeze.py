"""Freezing: which parameters a run trains, and which stay as they were."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mtp_jax.config import TrainConfig
from mtp_jax.parameters import row

Params = dict[str, Any]


def is_frozen(config: TrainConfig, path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` (its names from the root on) stays as it was: with a frozen trunk all that is not
    the head's, and in any case what has no gradient."""
    return not row(path[-1]).trained or (config.freeze == "trunk" and path[0] != "head")


def partition(config: TrainConfig, params: Params) -> tuple[Params, Params]:
    """(what is trained, what is frozen), which `merge` puts together. Leaves may be anything."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)  # type: ignore[assignment]
    frozen = {path: leaf for path, leaf in flat.items() if is_frozen(config, path)}
    return unflatten_dict({path: flat[path] for path in flat.keys() - frozen.keys()}), unflatten_dict(frozen)


def merge(trained: Params, frozen: Params) -> Params:
    """All parameters: the inverse of `partition`."""
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)}) if frozen else trained
