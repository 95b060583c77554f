"""Run directories: what lies in one, by which names, and the way to write and read it.

RUN/config.json, versions.json the resolved TrainConfig, and what it runs on; readable without any checkpoint
RUN/tokenizer/                 the files of its tokenizer, if it has any
RUN/checkpoints/STEP/          a checkpoint, as `mtp_jax.runs.checkpoints` describes it
RUN/metrics.jsonl, tensorboard/
RUN/wandb.json, mlflow.json    the ids that services know the run by, as `mtp_jax.train.sinks` keeps them
RUN/.mtp_jax.lock              who trains there now, as `mtp_jax.runs.lock` describes it
RUN/lost-N/                    a run directory of its own, that `--auto-resume` did not delete
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from etils import epath

from mtp_jax import __version__
from mtp_jax.config import TrainConfig
from mtp_jax.data.tokenizers import Tokenizer, kept_tokenizer
from mtp_jax.distributed import warn
from mtp_jax.runs.manifest import MANIFEST, is_sealed, sealed_steps, unseal, unsealed_steps
from mtp_jax.runs.paths import children, full_path, is_link, make_folder, replace_file
from mtp_jax.validate import ConfigError, from_dict, require, to_dict

CONFIG_FILE, TOKENIZER_DIR, CHECKPOINTS_DIR = "config.json", "tokenizer", "checkpoints"
META_FILE = "meta/metadata"  # of a checkpoint, as Orbax names it
# What training, `generate --held-out` and `bench --report` leave in a run directory, in the order of its deletion: what
# a kill leaves of that is a run until all else is gone.
WRITTEN = ("completions.html", "report.md", "report.json", "plots", "profile", "tensorboard", "metrics.jsonl")
SINK_FILES = ("wandb.json", "mlflow.json")
WRITTEN += ("wandb", *SINK_FILES, CHECKPOINTS_DIR, TOKENIZER_DIR, CONFIG_FILE, "versions.json")
WRITTEN += tuple(f"{name}.partial" for name in ("metrics.jsonl", *SINK_FILES, CONFIG_FILE, "versions.json"))
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, and the git commit of the code."""
    found = {"mtp_jax": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | ({"commit": commit} if (commit := _commit()) else {})


def _commit() -> str | None:
    """The commit of the checkout that this file is tracked in, with `-dirty` where it was changed."""

    def git(*args: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's repository.
    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    return git("describe", "--always", "--dirty", "--abbrev=12") if tracked else None


def write_config(run_dir: epath.PathLike, config: TrainConfig) -> None:
    """Write `config.json` and `versions.json` of a run that starts or goes on."""
    path = epath.Path(run_dir)
    make_folder(path)
    for file, values in ((CONFIG_FILE, to_dict(config)), ("versions.json", versions())):
        replace_file(path / file, json.dumps(values, indent=2) + "\n")


def write_run(config: TrainConfig, path: epath.Path, tokenizer: Tokenizer, overwrite: bool, unfinished: bool) -> None:
    """Begin or go on with a run directory: what `overwrite` gives up is deleted, or moved aside if it was `unfinished`
    and Orbax had finished a step of it: only its manifest is missing, which may have been lost.

    It holds the files of its tokenizer, if there are any, so that it loads wherever it goes.
    """
    json.dumps(to_dict(config))  # what cannot be written is known before anything is deleted
    files = tokenizer.files()
    if overwrite and unfinished and (steps := unsealed_steps(path / CHECKPOINTS_DIR)):
        aside = set_aside(path)
        last = aside / CHECKPOINTS_DIR / str(steps[-1])
        warn(
            f"Steps {steps} of {path} have no {MANIFEST}: it is lost, or the run was killed before it was written. "
            f"That run is moved to {aside}, and a new one begins. If they are good, "
            f"`mtp_jax.runs.manifest.seal(etils.epath.Path({str(last)!r}))` makes the last one complete as it is, and "
            f"--run-dir {aside} --resume goes on from it. If nobody needs them, delete {aside}."
        )
    elif overwrite and holds_run(path):
        clear_run(path)
    try:
        write_config(path, config)
        for file, data in files.items():
            (path / TOKENIZER_DIR).mkdir(parents=True, exist_ok=True)
            replace_file(path / TOKENIZER_DIR / file, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}). Make room, or give another --run-dir.") from error


def run_tokenizer(run_dir: epath.PathLike, config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run: its own copy, or what the config names where it has none (`bytes`, or no run yet)."""
    own = full_path(run_dir) / TOKENIZER_DIR
    return kept_tokenizer(own, config.data.tokenizer, config.data.end_of_document)


def clear_run(run_dir: epath.PathLike) -> None:
    """Delete what a run writes, and nothing else that may lie in its directory.

    A link to a folder stays, and what is behind it but checkpoints: others may have theirs there.
    """
    for name in WRITTEN:
        path = epath.Path(run_dir) / name
        for step in filter(is_sealed, children(path) if name == CHECKPOINTS_DIR else []):
            unseal(step)  # a kill damages none that is left
        if not is_link(path):
            path.rmtree() if path.is_dir() else path.unlink(missing_ok=True)
        elif path.is_file():
            path.unlink()


def set_aside(run_dir: epath.PathLike) -> epath.Path:
    """Move what a run wrote into a run directory of its own, `lost-N` in the old one, and return that.

    The config stays too, and checkpoints move last: a kill on the way leaves a run that can be started again, and steps
    that are seen and set aside then.
    """
    path = epath.Path(run_dir)
    aside = next(found for n in itertools.count(1) if not (found := path / f"lost-{n}").exists())
    aside.mkdir()
    (path / CONFIG_FILE).copy(aside / CONFIG_FILE)
    for name in sorted(WRITTEN, key=lambda name: name == CHECKPOINTS_DIR):
        if name != CONFIG_FILE and (path / name).exists():
            (path / name).rename(aside / name)
    return aside


def holds_run(run_dir: epath.PathLike) -> bool:
    """Whether there is a run, whole or not: a config or checkpoints. Logs of a launcher, and what a kill left of a
    first write, are none."""
    path = epath.Path(run_dir)
    return (path / CONFIG_FILE).exists() or bool(children(path / CHECKPOINTS_DIR))


def why_no_run(run_dir: epath.PathLike) -> str:
    """Why a directory that holds something is no run, of this version or another; nothing if it is one."""
    file, values, problem = _config_values(run_dir)
    # Other programs have such configs too.
    if problem or file.name != CONFIG_FILE or (file.parent / "versions.json").exists():
        return problem
    try:
        to_config(values, str(file))
    except ConfigError as error:
        return f"{file} does not fit this version of mtp_jax, and no versions.json names another ({error.__cause__})."
    return ""


def read_config(run_dir: epath.PathLike) -> TrainConfig:
    """The config of a run directory. Raises `ConfigError` if there is none, or one of another version.

    Checkpoints that were copied alone have their own.
    """
    file, values, problem = _config_values(run_dir)
    require(not problem, f"{problem} Give what --run-dir was.")
    return to_config(values, str(file))


def _config_values(run_dir: epath.PathLike) -> tuple[epath.Path, Any, str]:
    """(the file that has the config of a run, its values, what is wrong with it)."""
    path = full_path(run_dir)
    file, values, steps = path / CONFIG_FILE, None, sealed_steps(path / CHECKPOINTS_DIR)
    if not file.exists():
        if not steps:
            return file, None, f"{run_dir} is not a run directory: it has no {CONFIG_FILE}."
        file = path / CHECKPOINTS_DIR / str(steps[-1]) / META_FILE
    try:
        values = json.loads(file.read_bytes())
        values = values if file.name == CONFIG_FILE else values["config"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        return file, None, f"{file} cannot be read, or is not JSON ({error})."
    # Other programs have a config.json too.
    if not isinstance(values, dict) or not {"model", "head", "data"} <= set(values):
        return file, None, f"{file} is not the config of a run: it has no model, head and data."
    return file, values, ""


def to_config(values: Any, what: str) -> TrainConfig:
    """The config that `values` say. Raises `ConfigError`, with what they are, if they are none."""
    try:
        return from_dict(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(
            f"{what} does not fit this version of mtp_jax: {error} If it is of an older one, delete the run, give "
            "--overwrite, or another --run-dir."
        ) from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{what} has a value of a wrong type ({error}).") from error
