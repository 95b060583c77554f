"""Experiment files: Python with a module-level `CONFIG`, or with `SWEEPS`, a sweep for each size of machine.

FILE.py names the CONFIG, FILE.py@SIZE a sweep (FILE.py the first one), and FILE.py@SIZE/RUN the config of one of its
runs.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from mtp_jax.config import TrainConfig
from mtp_jax.sweep.config import NamedSweep, Sweep
from mtp_jax.validate import ConfigError, require


def load_experiment(text: str) -> TrainConfig:
    """The config that FILE.py or FILE.py@SIZE/RUN names.

    Raises:
      ConfigError: there is no such file or run (the nearest one is named), or it has no `CONFIG` of type `TrainConfig`.
    """
    file, _, within = text.partition("@")
    if within:
        size, _, run = within.partition("/")
        require(bool(run), f"{text} is a sweep; give one of its runs, as in {text}/RUN (mtp-jax sweep {text} --list).")
        named = load_sweep(f"{file}@{size}")
        require(run in named.runs, f"{text} is no run of the sweep; {_near(run, named.runs)}")
        return named.config(run)
    module = _module(file)
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        hint = f" It has sweeps: see mtp-jax sweep {file} --list." if hasattr(module, "SWEEPS") else ""
        raise ConfigError(f"{file} has no CONFIG of type mtp_jax.TrainConfig at module level (found {config!r}).{hint}")
    return config


def load_sweep(text: str) -> NamedSweep:
    """The sweep that FILE.py@SIZE names, or the first one of FILE.py. Raises `ConfigError` as `load_experiment`."""
    file, _, size = text.partition("@")
    module = _module(file)
    sweeps = getattr(module, "SWEEPS", None)
    if not (isinstance(sweeps, dict) and sweeps and all(isinstance(sweep, Sweep) for sweep in sweeps.values())):
        raise ConfigError(f"{file} has no SWEEPS, a dict of mtp_jax.Sweep by size, at module level (found {sweeps!r}).")
    size = size or next(iter(sweeps))
    require(size in sweeps, f"{file} has no sweep {size!r}; {_near(size, sweeps)}")
    title = (module.__doc__ or Path(file).stem).strip().partition("\n")[0]
    return NamedSweep(file, size, title, sweeps[size])


def split_file(args: list[str], command: str, example: str = "experiments/code_cpu.py") -> tuple[str, list[str]]:
    """The experiment file, which comes first, and the options."""
    if not args or args[0].startswith("-"):
        raise ConfigError(f"mtp-jax {command} needs an experiment file first, such as {example}.")
    return args[0], args[1:]


def default_run_dir(text: str) -> str:
    """Where the run of FILE.py or FILE.py@SIZE/RUN goes by itself."""
    file, _, within = text.partition("@")
    return str(Path("runs", Path(file).stem, *within.split("/", 1)) if within else Path("runs", Path(file).stem))


def _module(file: str) -> ModuleType:
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
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script: it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _near(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {found[0]!r}?" if found else f"there are {', '.join(names)}."
