"""Run directories: Orbax checkpoints that say themselves what they are, and the way back from them.

    RUN/config.json, versions.json the resolved TrainConfig, and what it runs on; readable without any checkpoint
    RUN/tokenizer/                 the files of its tokenizer, if it has any
    RUN/checkpoints/STEP/          params, opt_state (arrays); meta (JSON: step, config, tokenizer, data, versions,
                                   metrics)
    RUN/metrics.jsonl, tensorboard/

The step is also the data position: batch n is a pure function of (seed, n). Saves are asynchronous and atomic.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from mtp_jax import __version__
from mtp_jax.config import ConfigError, MeshConfig, TrainConfig, from_dict, require, to_dict
from mtp_jax.data import Tokenizer
from mtp_jax.data.tokenizers import kept_tokenizer
from mtp_jax.decode.generate import Generation, for_decoding, generate
from mtp_jax.decode.text import continue_text
from mtp_jax.mesh import make_mesh
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.train.step import TrainState, build_model, split

CONFIG_FILE, TOKENIZER_DIR = "config.json", "tokenizer"
# What training, `generate --held-out` and `bench --report` leave in a run directory.
WRITTEN = (CONFIG_FILE, "versions.json", TOKENIZER_DIR, "checkpoints", "metrics.jsonl", "tensorboard", "*.partial")
WRITTEN += ("completions.html", "report.md", "report.json", "plots")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointError(RuntimeError):
    """A run directory that cannot be read or written as asked. The message names it and the way out."""


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


class Checkpoints:
    """The checkpoints of one run directory. Close it (or leave its `with`) to finish what is being written."""

    def __init__(self, run_dir: epath.PathLike, keep: int | None = None):
        self.run_dir = epath.Path(run_dir).expanduser().resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=keep is not None, create=keep is not None
        )
        self._tokenizer: dict[str, Any] = {}
        self._manager = ocp.CheckpointManager(self.run_dir / "checkpoints", options=options)

    def save(self, state: TrainState, config: TrainConfig, metrics: dict[str, Any], data_sha256: str) -> int:
        """Begin to save a state and return its step; the next call waits for this one.

        `data_sha256` is that of the training tokens: a run is resumed on the same ones or not at all. The caller has
        seen that the state's loss is finite. A step that is saved already is left as it is.

        Raises:
          CheckpointError: Orbax refused the step, for instance because a later one exists.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return step
        # Once: reading a large vocabulary takes a second.
        self._tokenizer = self._tokenizer or run_tokenizer(self.run_dir, config).to_json()
        meta = {
            "step": step,
            "config": to_dict(config),
            "tokenizer": self._tokenizer,
            "data_sha256": data_sha256,
            "versions": versions(),
            "metrics": metrics,
        }
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            meta=ocp.args.JsonSave(meta),
        )
        if not self._manager.save(step, args=items):
            raise CheckpointError(
                f"Orbax did not save step {step} in {self.run_dir}; it holds steps {self._manager.all_steps()}. "
                "Resume from the latest, or start with --overwrite."
            )
        return step

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """The whole state, placed as `target` (arrays, or shapes with shardings) is, on any mesh."""
        step = self._step(step)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(shapes.params), opt_state=ocp.args.StandardRestore(shapes.opt_state)
            ),
        )
        # As if it had been trained to here: the step lives where the rest of the state lives.
        return TrainState(jnp.asarray(step, jnp.int32), items["params"], items["opt_state"])

    def restore_params(self, target: Any, step: int | None = None) -> Any:
        """The parameters alone, placed as `target` is."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
        return self._manager.restore(self._step(step), args=args)["params"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON of a step: step, config, tokenizer, data_sha256, versions, metrics."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self._step(step), args=args)["meta"]

    def wait(self) -> None:
        """Wait until the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish and release."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self, step: int | None) -> int:
        steps = list(self._manager.all_steps())
        if not steps:
            raise CheckpointError(
                f"{self.run_dir} holds no complete checkpoint: the run ended before its first save, or never was. "
                "Start it with `mtp-jax train EXPERIMENT.py --run-dir DIR`, and --overwrite if it is there."
            )
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.run_dir} has no step {step}; it has {steps}.")
        return max(steps) if step is None else step


def write_config(run_dir: epath.PathLike, config: TrainConfig) -> None:
    """Write `config.json` and `versions.json` of a run that starts or goes on."""
    path = epath.Path(run_dir)
    path.mkdir(parents=True, exist_ok=True)
    for file, values in ((CONFIG_FILE, to_dict(config)), ("versions.json", versions())):
        _replace(path / file, json.dumps(values, indent=2) + "\n")


def write_tokenizer(run_dir: epath.PathLike, tokenizer: Tokenizer) -> None:
    """Write the files of a run's tokenizer into it, so that it loads wherever it goes; nothing if there are none."""
    path = epath.Path(run_dir) / TOKENIZER_DIR
    for file, data in tokenizer.files().items():
        path.mkdir(parents=True, exist_ok=True)
        _replace(path / file, data)


def run_tokenizer(run_dir: epath.PathLike, config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run: its own copy, or what the config names where it has none (`bytes`, or no run yet)."""
    own = epath.Path(run_dir).expanduser() / TOKENIZER_DIR
    return kept_tokenizer(own, config.data.tokenizer, config.data.end_of_document)


def _replace(path: epath.Path, data: str | bytes) -> None:
    """Write a file in one go, so that a kill right here leaves the old one; object stores do nothing else."""
    aside = path if "://" in str(path) else path.with_name(f"{path.name}.partial")
    aside.write_bytes(data.encode() if isinstance(data, str) else data)
    if aside != path:
        aside.replace(path)


def clear_run(run_dir: epath.PathLike) -> None:
    """Delete what a run writes, and nothing else that may lie in its directory."""
    for name in WRITTEN:
        for path in epath.Path(run_dir).glob(name):
            path.rmtree() if path.is_dir() else path.unlink()


def on_mesh(shapes: Any, mesh: Mesh) -> Any:
    """Abstract arrays of a traced function, as shapes that lie on a mesh of devices."""

    def place(a: Any) -> jax.ShapeDtypeStruct:
        spec = jax.P() if a.sharding is None else a.sharding.spec
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


def read_config(run_dir: epath.PathLike) -> TrainConfig:
    """The config of a run directory. Raises `ConfigError` if there is none."""
    path = epath.Path(run_dir).expanduser() / CONFIG_FILE
    require(path.exists(), f"{run_dir} is not a run directory: it has no {CONFIG_FILE}. Give what --run-dir was.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). Give what --run-dir was.") from error
    # Other programs have a config.json too.
    ours = isinstance(values, dict) and {"model", "head", "data"} <= set(values)
    require(ours, f"{path} is not the config of a run: it has no model, head and data. Give what --run-dir was.")
    return from_dict(TrainConfig, values)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to use. `model` wants `mesh` in scope (`with jax.set_mesh(run.mesh): ...`)."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: TrainConfig
    mesh: Mesh
    step: int
    meta: dict[str, Any]

    @functools.cached_property
    def decoder(self) -> LanguageModel:
        """The model laid out for decoding."""
        with jax.set_mesh(self.mesh):
            return for_decoding(self.model)

    def generate(self, prompts: str | list[str], *, stop: str | Sequence[str] = (), **options: Any) -> str | list[str]:
        """Continue text, up to the end of a document or the first of the strings `stop`, which is cut off.

        Options are those of `mtp_jax.generate`.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        with jax.set_mesh(self.mesh):
            out = continue_text(self.decoder, self.tokenizer, texts, stop, **self._defaults(options))
        return out[0] if isinstance(prompts, str) else out

    def generate_tokens(self, prompts: list[Any], **options: Any) -> Generation:
        """Continue token ids; see `mtp_jax.generate`."""
        with jax.set_mesh(self.mesh):
            return generate(self.decoder, prompts, **self._defaults(options))

    def _defaults(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"stop_tokens": (self.tokenizer.end_of_document,), **options}


def load(run_dir: epath.PathLike, step: int | None = None, mesh: MeshConfig | Mesh | None = None) -> LoadedRun:
    """Reload a run wherever it was trained: no config, mesh or knowledge of its origin is needed.

    Args:
      run_dir: a directory that `mtp-jax train` wrote, local or in an object store.
      step: which checkpoint; the latest by default.
      mesh: where to put it: a mesh, or a config over all devices; one device by default.

    Raises:
      ConfigError: it is not a run directory, or the mesh does not fit.
      CheckpointError: it has no such step.
    """
    read_config(run_dir)
    if mesh is None:
        mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    elif isinstance(mesh, MeshConfig):
        mesh = make_mesh(mesh)
    with Checkpoints(run_dir) as checkpoints, jax.set_mesh(mesh):
        meta = checkpoints.meta(step)
        config = from_dict(TrainConfig, meta["config"])
        config.check_widths((mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]))
        tokenizer = run_tokenizer(run_dir, config)
        if tokenizer.to_json() != meta["tokenizer"]:
            raise ConfigError(
                f"{run_dir} was trained with the tokenizer {meta['tokenizer']} and {config.data.tokenizer!r} is now "
                f"{tokenizer.to_json()}."
            )
        build = functools.partial(build_model, config, jax.random.key(0))
        graph = nnx.graphdef(jax.eval_shape(build))
        target = jax.eval_shape(jax.jit(lambda: split(build())[1]))
        params = checkpoints.restore_params(on_mesh(target, mesh), meta["step"])
    return LoadedRun(nnx.merge(graph, params), tokenizer, config, mesh, meta["step"], meta)
