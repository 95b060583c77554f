"""Checks of a run before anything expensive happens, or an old run is touched."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath
from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import Tokenizer, load_tokenizer
from mtp_jax.heads.config import AGAINST_TARGET
from mtp_jax.heads.registry import check_head
from mtp_jax.mesh import make_mesh
from mtp_jax.runs.base import FREE, Base
from mtp_jax.runs.layout import CHECKPOINTS_DIR, holds_run, why_no_run
from mtp_jax.runs.manifest import how_to_seal, sealed_steps
from mtp_jax.runs.paths import full_path
from mtp_jax.validate import ConfigError, differences, require

# Fields of model, head and data that a resumed run may change: they change no parameter's shape and no batch.
_OF_HEAD = (
    *("ntp_weight", "gamma", "z_weight", "balance", "balance_weight", "init_noise", "loss_fraction"),
    *("nll_weight", "draft_temperature", *AGAINST_TARGET),
)
RESUMABLE = {
    *(f"model.{name}" for name in FREE),
    *(f"head.{name}" for name in _OF_HEAD),
    "data.cache_dir",
}
# Other fields that it may not change, and why; those of `SWITCHES` may, but not to 0 or from it.
FIXED = {
    "optimizer.name": "their states differ",
    "optimizer.skip_limit": "with and without one the optimizer's states differ",
    "ema_decay": "it keeps an average of its weights from its first step, or none",
    "head.temperature": "the law that its head learns is at that temperature",
    "init_from": "a run begins once",
    "base": "a run begins once",
}
SWITCHES = {"optimizer.skip_limit", "ema_decay", "base"}


def check_machine(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Mesh:
    """The mesh of a config. Raises `ConfigError` if the devices, the batch or the tokenizer do not fit it, or if it has
    a head that does not exist."""
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    config.with_tokenizer(tokenizer.vocab_size)
    check_head(config.head)
    mesh = make_mesh(config.mesh)
    config.check_mesh((mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]))
    return mesh


def check_run_dir(
    run_dir: epath.PathLike, *, resume: bool = False, overwrite: bool = False, unfinished: bool = False
) -> epath.Path:
    """The path of a run directory that may be used, before anything expensive happens. Nothing is changed.

    Raises:
      ConfigError: there is a run, and neither `resume` nor `overwrite` says what to do; or both do; or there is nothing
        to resume; or what is there is no run; or, with `unfinished`, it has a whole step.
    """
    path = full_path(run_dir)
    require(not (resume and overwrite), "Both --resume and --overwrite are given; choose one.")
    require(not path.exists() or path.is_dir(), f"The run directory {path} is a file; give another --run-dir.")
    if not holds_run(path):
        require(not resume, f"--resume was given and {path} has no run in it. Leave --resume out to start one.")
        return path
    steps = sealed_steps(path / CHECKPOINTS_DIR)
    problem = why_no_run(path)
    require(
        not problem,
        f"The run directory {path} exists and is left alone, for it is not a run of mtp_jax: {problem} Give another "
        f"--run-dir.{how_to_seal(path / CHECKPOINTS_DIR)}",
    )
    require(
        not (unfinished and steps),
        f"The run in {path} has saved a step since this one began to start. Give the same command again: it goes on.",
    )
    require(
        bool(steps) or resume or overwrite,
        f"The run directory {path} exists, and no step in it is complete. Give --auto-resume to start its run again, "
        f"--overwrite to delete it, or another --run-dir.{how_to_seal(path / CHECKPOINTS_DIR)}",
    )
    require(
        resume or overwrite,
        f"The run directory {path} exists. Give --resume to go on with it, --overwrite to delete it and start again, "
        "or another --run-dir.",
    )
    return path


def check_same_run(config: TrainConfig, saved: TrainConfig, path: epath.Path) -> None:
    """Refuse to resume with another model, head or data: the parameters or the next batch would not be the run's."""
    for name, new, old in differences(config, saved):
        part, why = name.partition(".")[0], f"; {FIXED[name]}" if name in FIXED else ""
        fixed = name in FIXED or (part in ("model", "head", "data") and name not in RESUMABLE)
        way = "one as the run does" if name in SWITCHES else "the run's own value"
        require(
            not fixed or (name in SWITCHES and bool(new) == bool(old)),
            f"--resume: {name} is {new!r} and the run in {path} was trained with {old!r}{why}. Give {way}, or start "
            "another run with --run-dir.",
        )


def check_same_base(base: Base, meta: dict[str, Any], path: epath.Path) -> None:
    """Refuse to resume a head on another model than the checkpoint's."""
    saved = meta["base"]["sha256"]
    require(
        base.sha256 == saved,
        f"--resume: the base {base.path} has sha256 {base.sha256[:12]} and the head in {path} was trained on "
        f"{saved[:12]}. Bring that one back, or start another run with --run-dir.",
    )


def check_cache(config: TrainConfig, store: Store | Mixture, base: Base | None) -> None:
    """Refuse hidden states in the data that are not those that this run's trunk would give."""
    states = store.hidden
    if states is None:
        return
    made = states["base"]
    where = f"The hidden states in {store.path} are"
    if base is None:
        raise ConfigError(f"{where} of the base {made['path']}, and this run has none. Give --base {made['path']}.")
    require(
        made["sha256"] == base.sha256,
        f"{where} of a base with sha256 {made['sha256'][:12]} ({made['path']}), and {base.path} has "
        f"{base.sha256[:12]}. Give its own base, or cache them again.",
    )
    for name, here in (
        ("seq_len", config.data.seq_len),
        ("computed_in", config.model.dtype),
        ("taps", [*config.head.taps]),
    ):
        field = {"seq_len": "data.seq_len", "computed_in": "model.dtype"}.get(name, "the head's taps")
        require(
            states[name] == here,
            f"{where} made with {name} {states[name]!r}, and {field} is {here!r}. Give the same, or cache them again.",
        )


def learnt_from(config: TrainConfig, store: Store | Mixture) -> TrainConfig:
    """The config of a head that learns a base's law from texts that were sampled: at their temperature. Refuses another
    one. What is the target itself, or is trained with it, learns the same law as it."""
    if not config.base or config.head.target != "ntp":
        return config
    sampled = store.sampled
    if not sampled or not sampled["temperature"]:
        return config
    here, there = config.head.temperature, sampled["temperature"]
    require(
        here in (1.0, there),
        f"HeadConfig.temperature is {here} and the texts in {store.path} were sampled at {there}, which a head learns "
        "from them. Leave it out: it is theirs.",
    )
    return dataclasses.replace(config, head=dataclasses.replace(config.head, temperature=there))


def as_learnt(config: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """The config of a run that goes on, with the temperature that its head has from its texts, if it says none."""
    if not config.base or config.head.temperature != 1.0:
        return config
    return dataclasses.replace(config, head=dataclasses.replace(config.head, temperature=saved.head.temperature))


def check_same_data(store: Store | Mixture, meta: dict[str, Any], path: epath.Path) -> None:
    """Refuse to resume on other training tokens than those of the checkpoint: its next batch would not be the run's."""
    saved = meta["data_sha256"]
    require(
        store.sha256 == saved,
        f"--resume: the training tokens in {store.path} have sha256 {store.sha256[:12]} and the run in {path} was "
        f"trained on {saved[:12]}; files, tokenizer or interpreter have changed. Bring the old ones back, or start "
        "another run with --run-dir.",
    )
