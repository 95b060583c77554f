"""What a run trains of its parameters, and what it leaves as it was."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mtp_jax.config import TrainConfig

Params = dict[str, Any]


def is_frozen(config: TrainConfig, path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` (its names from the root on) stays as it was.

    With a frozen trunk everything outside the head does, and of the head the unembedding where it is the target
    (`ntp`: the law that decoding preserves is then the same for all heads) or the input embedding.
    """
    if config.freeze == "none":
        return False
    return path[0] != "head" or (path[-1] == "unembed_VD" and freezes_table(config))


def freezes_table(config: TrainConfig) -> bool:
    """Whether the head's unembedding is frozen with the trunk."""
    return config.freeze == "trunk" and (config.head.target == "ntp" or config.model.tie_embeddings)


def partition(config: TrainConfig, params: Params) -> tuple[Params, Params]:
    """(what is trained, what is frozen), which `merge` puts together. Leaves may be anything."""
    if config.freeze == "none":
        return params, {}
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)  # type: ignore[assignment]
    frozen = {path: leaf for path, leaf in flat.items() if is_frozen(config, path)}
    return unflatten_dict({path: flat[path] for path in flat.keys() - frozen.keys()}), unflatten_dict(frozen)


def merge(trained: Params, frozen: Params) -> Params:
    """All parameters: the inverse of `partition`."""
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)}) if frozen else trained
