"""Base of a run: the run whose model stays as it is while a head is trained on it, and how the two are joined.

A run on a base stores its head alone. It names the base by path and step, and by a hash that another model has not.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from mtp_jax.config import TrainConfig
from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.model.config import ModelConfig
from mtp_jax.parameters import row
from mtp_jax.runs import manifest
from mtp_jax.runs.checkpoints import Checkpoints, Step
from mtp_jax.runs.layout import CHECKPOINTS_DIR, read_config, run_tokenizer, to_config
from mtp_jax.runs.paths import full_path
from mtp_jax.validate import ConfigError, require

Path = tuple[str, ...]
TABLE: Path = ("unembed_VD",)
FACTORS: Path = ("head", "factors", "u_DRWV")  # whose one factor is a next-token table
FREE = ("dtype", "remat", "attention", "context_length", "num_tokens")
"""Fields of the model that a head's run may have of its own: they change no parameter."""


@dataclass(frozen=True)
class Base:
    """A run that others train heads on: nothing of its arrays has been read.

    `sha256` is over its tensors, where it is an import, else over the files of its checkpoint. `source`: what an import
    read, with its revision.
    """

    path: epath.Path
    step: int
    config: TrainConfig
    tokenizer: Tokenizer
    sha256: str
    source: Mapping[str, str]

    def reference(self) -> dict[str, Any]:
        """What a run keeps of it, as JSON values."""
        return {"path": str(self.path), "step": self.step, "sha256": self.sha256, "source": dict(self.source)}

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """The config of a run on this base: what its model does not say is the base's, as its tokenizer is.

        Raises `ConfigError` if its model says something else, or its head is none that a pretrained model can have.
        """
        plain, given, own = ModelConfig(), config.model, self.config.model
        values = {}
        for name in (field.name for field in dataclasses.fields(ModelConfig)):
            here, there = getattr(given, name), getattr(own, name)
            values[name] = there if here == getattr(plain, name) else here
            require(
                values[name] == there or name in FREE,
                f"base: model.{name} is {here!r} and the run in {self.path} has {there!r}. Leave it out: it is the "
                "base's.",
            )
        wide = config.head.kind == "mixture" and config.head.factors in ("full", "lora")
        require(
            self.config.head.kind != "none" or not wide,
            f"HeadConfig.factors is {config.head.factors}, which has a vocabulary table for each offset, and the base "
            f"{self.path} is a pretrained model. Set factors to lowrank, shared or residual, which go through its own.",
        )
        require(
            self.config.head.kind != "none" or config.head.target == "ntp",
            f"HeadConfig.target is {config.head.target}, and the base {self.path} is a pretrained model: what is "
            "decoded would be the head's law, and not the model's own. Set target to ntp.",
        )
        # A tied table of a run whose head gives the next token is its embedding alone.
        apart = own.tie_embeddings and self.config.head.target == "marginal"
        require(
            config.head.target != "ntp" or (gives_next_token(self.config) and not apart),
            f"base: the run in {self.path} has no table that gives the next token. Take a run with head.target ntp, or "
            "with rank 1 and full factors, or an imported model.",
        )
        data = self.config.data
        data = dataclasses.replace(config.data, tokenizer=data.tokenizer, end_of_document=data.end_of_document)
        return dataclasses.replace(config, model=ModelConfig(**values), data=data)

    def params(self, target: Any, *, cast: bool = False) -> dict[str, Any]:
        """Its parameters, placed as `target` (shapes with shardings, by name) is, and cast to its dtypes if `cast`.

        Raises:
          ConfigError: it has not what is asked for.
          CheckpointError: its checkpoint is damaged.
        """
        flat: dict[Path, Any] = flatten_dict(target)  # type: ignore[assignment]
        stored = dict(flat)
        if derived := TABLE in flat and self._table_is_a_factor:
            like = stored.pop(TABLE)
            stored[FACTORS] = self._factors(like)
        arrays: dict[Path, Any] = flatten_dict(  # type: ignore[assignment]
            Checkpoints(self.path).restore_params(unflatten_dict(stored), self.step, cast=cast, some=True)
        )
        if derived:
            table_VD = arrays.pop(FACTORS)[:, 0, 0].T
            arrays[TABLE] = jax.device_put(table_VD.astype(flat[TABLE].dtype), flat[TABLE].sharding)
        return unflatten_dict(arrays)

    @property
    def _table_is_a_factor(self) -> bool:
        head = self.config.head
        return head.target == "marginal" and gives_next_token(self.config) and not self.config.model.tie_embeddings

    def _factors(self, like: Any) -> Any:
        """The shape of the factors that the table is part of, on the mesh of `like`."""
        shape, spec = (like.shape[1], 1, self.config.head.window, like.shape[0]), row(FACTORS[-1]).spec
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(like.sharding.mesh, spec))


def gives_next_token(config: TrainConfig) -> bool:
    """Whether a run has a table that gives the next token. One that only factors go through does not."""
    head = config.head
    return head.target == "ntp" or (head.factors == "full" and head.rank == 1)


def open_base(run_dir: epath.PathLike, step: Step = "latest") -> Base:
    """The run in `run_dir` as a base.

    Raises:
      ConfigError: it is no run, or one that has a base itself.
      CheckpointError: it has no such step.
    """
    path = full_path(run_dir)
    read_config(path)
    meta = Checkpoints(path).meta(step)
    config = to_config(meta["config"], f"The config of step {meta['step']} in {path}")
    require(not config.base, f"base: {path} is a head on {config.base} itself. Give that one.")
    tokenizer = run_tokenizer(path, config)
    imported = meta.get("imported") or {}
    sha256 = imported.get("sha256") or manifest.digest(path / CHECKPOINTS_DIR / str(meta["step"]), "params")
    source = {name: imported[name] for name in ("source", "revision") if name in imported}
    config = config.with_tokenizer(tokenizer.vocab_size)
    return Base(path, meta["step"], config, tokenizer, sha256, source)


def is_there(run_dir: epath.PathLike) -> bool:
    """Whether a run has a step that others can begin from."""
    return bool(manifest.sealed_steps(full_path(run_dir) / CHECKPOINTS_DIR))


def step_of(meta: Mapping[str, Any], path: epath.PathLike) -> Step:
    """Which step of its base a checkpoint's head was trained on, if that is kept in `path`; else the latest: a base
    that was moved may have been imported again."""
    kept = meta.get("base", {}).get("step")
    return kept if kept in Checkpoints(path).steps() else "latest"


def base_of(meta: Mapping[str, Any], run_dir: epath.PathLike, given: epath.PathLike | None = None) -> Base:
    """The base that a run's checkpoint names, or the same one where it is `given`, having been moved.

    Raises `ConfigError` if it is not there, or is another model.
    """
    kept = meta["base"]
    path = kept["path"] if given is None else given
    try:
        found = open_base(path, kept["step"] if given is None else step_of(meta, path))
    except ConfigError as error:
        source = kept["source"].get("source")
        again = f" `mtp-jax import {source} --revision {kept['source'].get('revision')} --out DIR` makes it again."
        raise ConfigError(
            f"{run_dir} is a head on the model in {path}: {error} Say where it is with --base DIR, or "
            f"mtp_jax.load({str(run_dir)!r}, base=DIR).{again if source else ''}"
        ) from error
    require(
        found.sha256 == kept["sha256"],
        f"{run_dir} is a head on a model with sha256 {kept['sha256'][:12]}, and the one in {path} has "
        f"{found.sha256[:12]}: it is another. Give its own with --base DIR, or base=DIR in Python.",
    )
    return found


def tensors_sha256(params: Any, known: int) -> str:
    """The hash of a model's tensors, by name: dtype, shape and bytes, without the padding of the vocabulary."""
    sha = hashlib.sha256()
    for path, array in _in_order(params):
        values = np.asarray(array)
        values = values[:known] if path[-1].endswith("_VD") else values
        sha.update(f"{'.'.join(path)} {values.dtype} {list(values.shape)}\n".encode())
        sha.update(np.ascontiguousarray(values).view(np.uint8).data)
    return sha.hexdigest()


def _in_order(params: Any) -> Iterator[tuple[Path, Any]]:
    flat: dict[Path, Any] = flatten_dict(params)  # type: ignore[assignment]
    yield from sorted(flat.items())
