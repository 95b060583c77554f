"""Checks of config fields, and configs as plain values. Imports neither JAX nor Flax.

Every message names the field, the value found, the value allowed and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, the values and the way out."""


PREEMPTED = 75  # exit status; no unhandled signal gives it


class PreemptedError(RuntimeError):
    """SIGTERM, or a notice that the machine is taken away. What is saved is complete; the command exits with 75."""


def require(ok: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def each(value: Any) -> Sequence[Any]:
    """The values of a field that may have one for each row."""
    return value if hasattr(value, "__len__") else (value,)


# What many fields have in common. Each raises `ConfigError` with the field's name, its value and what is allowed.


def at_least(config: Any, least: float, *names: str) -> None:
    """Refuse a value of these fields that is less."""
    for name in names:
        for value in each(getattr(config, name)):
            require(value >= least, f"{type(config).__name__}.{name} is {value}; it must be at least {least}.")


def choices(config: Any) -> None:
    """Refuse a value that is not among those of a `Literal` field."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, allowed = getattr(config, name), typing.get_args(hint)
        require(
            typing.get_origin(hint) is not Literal or value in allowed,
            f"{type(config).__name__}.{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.",
        )


def positive(config: Any, *names: str) -> None:
    """Refuse a value of these fields that is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} is {value}; it must be positive.")


def fraction(config: Any, *names: str, closed: bool = True) -> None:
    """Refuse a value of these fields outside [0, 1], or [0, 1) if not `closed`."""
    for name in names:
        for value in each(getattr(config, name)):
            require(
                0 <= value < 1 or (closed and value == 1),
                f"{type(config).__name__}.{name} is {value}; it must lie in [0, 1{']' if closed else ')'}.",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def differences(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in `a`, value in `b`) of every field in which two configs of one type differ."""
    for name in (f.name for f in dataclasses.fields(a)):
        here, there = getattr(a, name), getattr(b, name)
        if dataclasses.is_dataclass(here) and type(here) is type(there):
            yield from differences(here, there, f"{prefix}{name}.")
        elif here != there:
            yield f"{prefix}{name}", here, there


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`. Raises `ConfigError` on a field that `cls` does not have, with the nearest name."""
    hints = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(hints)}."
        require(name in hints, f"{cls.__name__} has no field {name!r}{hint}")
        nested = dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
        kwargs[name] = from_dict(hints[name], value) if nested else tuple(value) if isinstance(value, list) else value
    return cls(**kwargs)
