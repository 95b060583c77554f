"""Checks of a run before anything expensive happens, or an old run is touched."""

from __future__ import annotations

from typing import Any

from etils import epath
from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import Tokenizer, load_tokenizer
from mtp_jax.heads.registry import check_head
from mtp_jax.mesh import make_mesh
from mtp_jax.runs.layout import read_config
from mtp_jax.runs.paths import children, full_path
from mtp_jax.validate import ConfigError, require, to_dict

# Fields of model, head and data that a resumed run may change: they change no parameter's shape and no batch.
RESUMABLE = {
    *(("model", name) for name in ("dtype", "remat", "attention", "context_length")),
    *(("head", name) for name in ("ntp_weight", "gamma", "z_weight", "balance", "balance_weight", "init_noise")),
    *(("head", name) for name in ("loss_fraction",)),
    ("data", "cache_dir"),
}


def check_machine(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Mesh:
    """The mesh of a config. Raises `ConfigError` if the devices, the batch or the tokenizer do not fit it, or if it has
    a head that does not exist."""
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    config.check_tokenizer(tokenizer.vocab_size)
    check_head(config.head)
    mesh = make_mesh(config.mesh)
    config.check_mesh((mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]))
    return mesh


def check_run_dir(run_dir: epath.PathLike, *, resume: bool = False, overwrite: bool = False) -> epath.Path:
    """The path of a run directory that may be used, before anything expensive happens. Nothing is changed.

    Raises:
      ConfigError: it exists and is not empty, and neither `resume` nor `overwrite` says what to do; or both do; or
        there is nothing to resume; or `overwrite` would delete something that is not a run directory.
    """
    path = full_path(run_dir)
    if resume and overwrite:
        raise ConfigError("Both --resume and --overwrite are given; choose one.")
    require(not path.exists() or path.is_dir(), f"The run directory {path} is a file; give another --run-dir.")
    exists = bool(children(path))
    if resume and not exists:
        raise ConfigError(f"--resume was given and {path} has no run in it. Leave --resume out to start one.")
    if exists and not (resume or overwrite):
        raise ConfigError(
            f"The run directory {path} exists. Give --resume to go on with it, --overwrite to delete it and start "
            "again, or another --run-dir."
        )
    if exists and overwrite:
        try:
            read_config(path)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"--overwrite leaves {path} alone, for it is not a run of mtp_jax: {error}") from error
    return path


def check_same_run(config: TrainConfig, saved: TrainConfig, path: epath.Path) -> None:
    """Refuse to resume with another model, head or data: the parameters or the next batch would not be the run's."""

    def check(same: bool, name: str, new: Any, old: Any, why: str = "") -> None:
        require(
            same,
            f"--resume: {name} is {new!r} and the run in {path} has {old!r}{why}. Give the run's own value, "
            "or start another run with --run-dir.",
        )

    here, there = config.optimizer, saved.optimizer
    check(here.name == there.name, "optimizer.name", here.name, there.name, "; their states differ")
    new, old, why = here.skip_limit, there.skip_limit, "; with and without one the optimizer's states differ"
    check(bool(new) == bool(old), "optimizer.skip_limit", new, old, why)
    new, old, why = (
        config.ema_decay,
        saved.ema_decay,
        "; it keeps an average of its weights from its first step, or none",
    )
    check(bool(new) == bool(old), "ema_decay", new, old, why)
    for name in ("init_from", "freeze"):
        new, old = getattr(config, name), getattr(saved, name)
        check(new == old, name, new, old, "; a run begins once")
    for part in ("model", "head", "data"):
        new, old = to_dict(getattr(config, part)), to_dict(getattr(saved, part))
        for name in old:
            check(new[name] == old[name] or (part, name) in RESUMABLE, f"{part}.{name}", new[name], old[name])


def check_same_data(store: Store | Mixture, meta: dict[str, Any], path: epath.Path) -> None:
    """Refuse to resume on other training tokens than those of the checkpoint: its next batch would not be the run's."""
    saved = meta["data_sha256"]
    require(
        store.sha256 == saved,
        f"--resume: the training tokens in {store.path} have sha256 {store.sha256[:12]} and the run in {path} was "
        f"trained on {saved[:12]}; files, tokenizer or interpreter have changed. Bring the old ones back, or start "
        "another run with --run-dir.",
    )
