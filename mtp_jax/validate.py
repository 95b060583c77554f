"""Checks of config fields, and configs as plain values. Imports neither JAX nor Flax.

Every message names the field, the value found, the value allowed and the way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, the values and the way out."""


class BusyError(ConfigError):
    """Another process trains in the run directory. Nothing was touched."""


REFUSED, PREEMPTED = 2, 75  # exit statuses: a mistake of the caller's, and what no unhandled signal gives


class PreemptedError(RuntimeError):
    """SIGTERM, or a notice that the machine is taken away. What is saved is complete; the command exits with 75."""


def require(ok: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def unescape(text: str) -> str:
    r"""`text` with newlines, tabs and returns where a command line says `\n`, `\t` and `\r`."""
    return text.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")


def each(value: Any) -> Sequence[Any]:
    """The values of a field that may have one for each row."""
    return value if hasattr(value, "__len__") else (value,)


def typed(config: Any) -> None:
    """Give every field of a config the type that it is declared with: the first line of its `__post_init__`.

    Scalars and 0-d arrays of NumPy and JAX become Python's, paths strings, lists tuples, and 1e3 the integer 1000. What
    would have another value then, or is of another kind, is a `ConfigError`.
    """
    hints = _hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _as(hints[name], value))
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"{type(config).__name__}.{name} is {value!r}; it must be {_words(hints[name])}."
            ) from None


def integer(name: str, value: Any, least: int) -> int:
    """A whole number that a function was given, read as `typed` reads those of configs."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if (found := _as(int, value)) >= least:
            return found
    raise ConfigError(f"{name} is {value!r}; it must be an integer and at least {least}.")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _as(hint: Any, value: Any) -> Any:
    """`value` as what a type hint says. Raises `TypeError` or `ValueError` if it is something else."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (Union, types.UnionType):
        for one in args:
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                return _as(one, value)
        raise TypeError
    if kind in (tuple, Sequence):
        if isinstance(value, str | bytes):
            raise TypeError
        return tuple(_as(args[0], each) for each in value)
    if kind is Mapping:
        return {_as(args[0], key): _as(args[1], each) for key, each in dict(value).items()}
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if kind is Literal and isinstance(value, str) and value in args:
        return str(value)
    if kind is str and isinstance(value, str | os.PathLike):
        return str(os.fspath(value))
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if kind is int and value != int(value):
            raise ValueError
        return int(value) if kind is int else value
    if kind is not int and isinstance(kind, type) and isinstance(value, kind):
        return value
    raise TypeError


def _words(hint: Any) -> str:
    """A type hint as a person says it."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return f"{'one of ' * (len(args) > 1)}{', '.join(map(repr, args))}"
    if kind in (Union, types.UnionType):
        return " or ".join(map(_words, args))
    if kind in (tuple, Sequence):
        return f"a sequence of which each is {_words(args[0])}"
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string", types.NoneType: "None"}
    return names.get(kind, f"a {getattr(kind, '__name__', kind)}")


# What many fields have in common. Each raises `ConfigError` with the field's name, its value and what is allowed.


def at_least(config: Any, least: float, *names: str) -> None:
    """Refuse a value of these fields that is less."""
    for name in names:
        for value in each(getattr(config, name)):
            require(value >= least, f"{type(config).__name__}.{name} is {value}; it must be at least {least}.")


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
    hints = _hints(cls)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(hints)}."
        require(name in hints, f"{cls.__name__} has no field {name!r}{hint}")
        nested = dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
        kwargs[name] = from_dict(hints[name], value) if nested else value
    return cls(**kwargs)
