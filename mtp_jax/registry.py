"""Registry lookup, with an answer that helps when the name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from mtp_jax.validate import ConfigError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, field: str) -> T:
    """`registry[name]`. Raises `ConfigError` on an unknown name: it cites `field`, the nearest name and all names."""
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? It" if near else "it"
    raise ConfigError(f"{field} is {name!r}; {hint} can be {', '.join(sorted(registry))}.")
