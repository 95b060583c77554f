"""Checkpoints of a run, read: checked against their manifest, restored on any mesh. `mtp_jax.runs.writer` writes them.

    RUN/checkpoints/STEP/          params, opt_state, and ema if the run keeps it (arrays); meta (JSON: step, config,
                                   tokenizer, data_sha256, versions, metrics); manifest.json, written last

A step is complete if it has its manifest; anything else is what a kill left, and is not seen. The step is also the data
position: batch n is a pure function of (seed, n).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mtp_jax.distributed import from_all, on_first, warn
from mtp_jax.runs import manifest
from mtp_jax.runs.layout import CHECKPOINTS_DIR, META_FILE
from mtp_jax.runs.manifest import DamagedError
from mtp_jax.runs.paths import full_path, plain_path
from mtp_jax.state import TrainState

T = TypeVar("T")
Step = int | Literal["latest", "best"]
BLOCK_BYTES = 2**26  # an array is written in blocks of so many: a device that keeps a part of it reads little more


class CheckpointError(RuntimeError):
    """A run directory that cannot be read or written as asked. The message names it and the way out."""


class Checkpoints:
    """The complete checkpoints of a run directory, local or in an object store. Nothing is changed.

    Every process of a run makes one and calls the same methods; process 0 says which steps exist.
    """

    def __init__(self, run_dir: epath.PathLike):
        self.run_dir = full_path(run_dir)
        self._root = self.run_dir / CHECKPOINTS_DIR

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def steps(self) -> list[int]:
        """The complete steps, in order."""
        return on_first(lambda: manifest.sealed_steps(self._root))

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step of the lowest held-out loss (the newest of equals), or None.

        Raises `CheckpointError` if a step does not say its loss, being damaged.
        """
        steps = self.steps()
        return best_of({step: loss_of(self.meta(step)) for step in steps}, steps)

    def restore(self, target: TrainState, step: Step = "latest") -> TrainState:
        """The whole state, placed as `target` (arrays, or shapes with shardings) is, on any mesh.

        Raises:
          CheckpointError: there is no such step; or it is damaged: the message names the file and the last good step;
            or its arrays are not those of `target`.
        """
        trees = {"params": target.params, "opt_state": target.opt_state}
        step, found = self._restore(step, trees | ({} if target.ema is None else {"ema": target.ema}))
        # As if it had been trained to here: the step lives where the rest of the state lives.
        return TrainState(jnp.asarray(step, jnp.int32), found["params"], found["opt_state"], found.get("ema"))

    def restore_params(
        self,
        target: Any,
        step: Step = "latest",
        weights: Literal["params", "ema"] = "params",
        *,
        cast: bool = False,
        some: bool = False,
    ) -> Any:
        """The parameters alone, or their average, placed as `target` is, and cast to its dtypes if `cast` says so.
        `some`: the target is some of them, and nothing else is read. Raises as `restore` does."""
        return self._restore(step, {weights: target}, cast, some)[1][weights]

    def meta(self, step: Step = "latest") -> dict[str, Any]:
        """The JSON of a step: step, config, tokenizer, data_sha256, versions, metrics. Raises as `restore` does."""
        step = self._step(step)
        return self._undamaged(step, lambda: self._read_meta(step))

    def _restore(
        self, step: Step, trees: dict[str, Any], cast: bool = False, some: bool = False
    ) -> tuple[int, dict[str, Any]]:
        step = self._step(step)
        shard = (jax.process_index(), jax.process_count())
        self._undamaged(step, lambda: manifest.check(self._dir(step), trees, shard))
        args, largest = {}, 0
        for name, tree in trees.items():
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            largest = max(largest, self._check_arrays(step, name, target, cast, some))
            placed = ocp.checkpoint_utils.construct_restore_args(target)
            args[name] = ocp.args.PyTreeRestore(target, placed, partial_restore=some)
        with ocp.Checkpointer(array_handler(largest)) as reader:
            found = reader.restore(self._plain_dir(step), args=ocp.args.Composite(**args))
        return step, {name: found[name] for name in trees}

    def _check_arrays(self, step: int, name: str, target: Any, cast: bool, some: bool) -> int:
        """Refuse arrays of another shape or dtype, which Orbax would cast and say nothing. Returns the most bytes that
        are read for one device's part of one."""
        if not (self._dir(step) / name).exists():
            raise CheckpointError(
                f"{self.run_dir} has no {name} in step {step}"
                + (": the run kept no averaged weights (ema_decay is 0). Load its params." if name == "ema" else ".")
            )
        metadata = ocp.PyTreeCheckpointHandler().metadata(self._plain_dir(step) / name).tree
        stored, wanted = (ocp.tree.to_flat_dict(tree, sep="/") for tree in (metadata, target))
        for key in sorted(wanted if some else {*stored, *wanted}):
            here, there = (_described(tree.get(key)) for tree in (wanted, stored))
            if here != there and not (cast and here.partition("[")[2] == there.partition("[")[2]):
                raise CheckpointError(
                    f"Step {step} of {self.run_dir} has {there} as {name}/{key}, and {here} is to be restored. The "
                    "config is not that of the run, or the checkpoint is of another version of this program."
                )
        return max((_read_bytes(wanted[key], stored[key].storage.chunk_shape) for key in wanted), default=0)

    def _step(self, step: Step) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"{self.run_dir} holds no complete checkpoint: the run ended before its first save, or never was. "
                "Start it with `mtp-jax train EXPERIMENT.py --run-dir DIR --auto-resume`."
                + manifest.how_to_seal(self._root)
            )
        if step == "best":
            step = self.best_step() or max(steps)
        if step == "latest":
            step = max(steps)
            lost = [s for s in manifest.unsealed_steps(self._root) if s > step]
            if lost:
                warn(
                    f"Step {lost[-1]} of {self.run_dir} has no manifest: its save was not finished, or the manifest is "
                    f"lost. The last good step is {step}."
                )
        if step not in steps:
            raise CheckpointError(
                f"{self.run_dir} has no step {step}; it has {steps}.{manifest.how_to_seal(self._root)}"
            )
        return step

    def _undamaged(self, step: int, verify: Callable[[], T]) -> T:
        """What `verify` returns. Raises `CheckpointError` with the way out if it finds damage, on any process."""
        found, error = None, ""
        try:
            found = verify()
        except DamagedError as damage:
            error = str(damage)
        error = next(filter(None, from_all(error)), "")
        if not error:
            return found  # type: ignore[return-value]
        good = next((s for s in reversed(self.steps()) if s != step and self._is_good(s)), None)
        way_out = "No other step of this run is good: bring the file back, or start again with --overwrite."
        if good is not None:
            way_out = (
                f"The last good step is {good}. Go on from it with `mtp-jax train EXPERIMENT.py --run-dir "
                f"{self.run_dir} --resume --from-step {good}`; load it with --step {good}, or "
                f"mtp_jax.load({str(self.run_dir)!r}, step={good})."
            )
        raise CheckpointError(f"Step {step} of {self.run_dir} is damaged: {error} {way_out}")

    def _is_good(self, step: int) -> bool:
        try:
            manifest.check(self._dir(step))
        except DamagedError:
            return False
        return True

    def _read_meta(self, step: int) -> dict[str, Any]:
        manifest.check(self._dir(step), ["meta"])
        return json.loads((self._dir(step) / META_FILE).read_text())

    def _dir(self, step: int) -> epath.Path:
        return self._root / str(step)

    def _plain_dir(self, step: int) -> epath.Path:
        """The same for Orbax. It is asked for each time, for directories of temporary files are emptied."""
        return plain_path(self.run_dir) / CHECKPOINTS_DIR / str(step)


def array_handler(largest: int, *, on_host: bool = False) -> ocp.CompositeCheckpointHandler:
    """For arrays of which a device has `largest` bytes at most: about so many are copied at once, not the whole state.

    `on_host`: those that are saved lie on a CPU.
    """
    # Where there is a GPU, Orbax copies to memory that it reads faster, and a CPU's arrays too.
    pinned = False if on_host else None
    at_once: Any = (max(largest, BLOCK_BYTES) + 1) / 10**9  # it wants more than the largest
    # Floats hardly get smaller, and compressing them takes six times the processor time that saving them does.
    arrays: dict[str, Any] = {
        name: ocp.PyTreeCheckpointHandler(
            use_compression=False,
            save_concurrent_gb=at_once,
            restore_concurrent_gb=at_once,
            enable_pinned_host_transfer=pinned,
        )
        for name in ("params", "opt_state", "ema")
    }
    return ocp.CompositeCheckpointHandler(**arrays, meta=ocp.JsonCheckpointHandler())


def loss_of(meta: dict[str, Any]) -> float:
    """The held-out loss that the JSON of a step says, or the negative of the expected tokens per forward where
    it says those; infinite where it says neither."""
    metrics = meta["metrics"]
    expected = -float(metrics.get("expected_tokens", math.nan))
    return expected if math.isfinite(expected) else float(metrics.get("loss", math.inf))


def best_of(losses: dict[int, float], steps: list[int]) -> int | None:
    """The step of the lowest finite loss, the newest of equals; None if there is none."""
    known = [step for step in steps if math.isfinite(losses.get(step, math.inf))]
    return min(known, key=lambda step: (losses[step], -step), default=None)


def _read_bytes(array: Any, block: tuple[int, ...]) -> int:
    """What is read for a device's part of an array that is stored in such blocks."""
    part = array.sharding.shard_shape(array.shape)
    whole = (-(-n // b) * b for n, b in zip(array.shape, block, strict=True))
    # A part that does not begin where a block does has one more of them.
    some = (-(-n // b) * b + b * (n % b > 0) for n, b in zip(part, block, strict=True))
    return math.prod(map(min, whole, some)) * array.dtype.itemsize


def _described(array: Any) -> str:
    return "nothing" if array is None else f"{np.dtype(array.dtype).name}{list(array.shape)}"
