"""Experiment files: Python with a module-level `CONFIG`."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path

from mtp_jax.config import ConfigError, TrainConfig


def load_experiment(file: str) -> TrainConfig:
    """The `CONFIG` of an experiment file.

    Raises:
      ConfigError: there is no such file (the nearest one is named), or it has no `CONFIG` of type `TrainConfig`.
    """
    path = Path(file)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a Python file with a CONFIG."
        raise ConfigError(f"there is no experiment {file!r}; {hint}")
    spec = importlib.util.spec_from_file_location(f"mtp_jax_experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file; give the path of one with a CONFIG.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{file} has no CONFIG of type mtp_jax.TrainConfig at module level (found {config!r}).")
    return config


def split_file(args: list[str], command: str) -> tuple[str, list[str]]:
    """The experiment file, which comes first, and the options."""
    if not args or args[0].startswith("-"):
        raise ConfigError(f"mtp-jax {command} needs an experiment file first, such as experiments/code_cpu.py.")
    return args[0], args[1:]
