"""Parameters that a run trains, and those that have no gradient."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mtp_jax.parameters import row

Params = dict[str, Any]


def partition(params: Params) -> tuple[Params, Params]:
    """(what is trained, what has no gradient), which `merge` puts together. Leaves may be anything."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)  # type: ignore[assignment]
    fixed = {path: leaf for path, leaf in flat.items() if not row(path[-1]).trained}
    return unflatten_dict({path: flat[path] for path in flat.keys() - fixed.keys()}), unflatten_dict(fixed)


def merge(*parts: Params) -> Params:
    """All parameters of disjoint parts: the inverse of `partition`."""
    return unflatten_dict({path: leaf for part in parts for path, leaf in flatten_dict(part).items()})
