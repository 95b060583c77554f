"""The checkpoints of a run: written by Orbax in the background, sealed by a manifest, checked before they are read.

    RUN/checkpoints/STEP/          params, opt_state, and ema if the run keeps it (arrays); meta (JSON: step, config,
                                   tokenizer, data_sha256, versions, metrics); manifest.json, written last

A step is complete if it has its manifest; anything else is what a kill left, and is not seen. The step is also the data
position: batch n is a pure function of (seed, n).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mtp_jax import manifest
from mtp_jax.config import TrainConfig, to_dict
from mtp_jax.distributed import Meetings, from_all
from mtp_jax.manifest import DamagedError
from mtp_jax.paths import children, full_path, is_local
from mtp_jax.run_dir import CHECKPOINTS_DIR, run_tokenizer, versions
from mtp_jax.train.step import TrainState

T = TypeVar("T")
Step = int | Literal["latest", "best"]
META_FILE = "meta/metadata"  # as Orbax names it
SAVE_SECONDS = 20 * 60  # what Orbax gives a save, and how long its processes wait for each other


class CheckpointError(RuntimeError):
    """A run directory that cannot be read or written as asked. The message names it and the way out."""


class Checkpoints:
    """The checkpoints of one run directory. Close it (or leave its `with`) to finish what is being written.

    Every process of a run makes one and calls the same methods; process 0 seals, deletes, and says which steps exist.

    Args:
      run_dir: the run directory, local or in an object store.
      keep: write too, and keep so many of the newest steps and the one with the lowest held-out loss. What a killed
        process left unfinished is deleted.
      resumed_from: the step that the run goes on from. Later ones belong to a past that is given up: they are deleted
        when the next step is saved.
    """

    def __init__(self, run_dir: epath.PathLike, keep: int | None = None, resumed_from: int | None = None):
        self.run_dir = full_path(run_dir)
        self._root = self.run_dir / CHECKPOINTS_DIR
        self._keep, self._resumed_from = keep, resumed_from
        self._tokenizer: dict[str, Any] = {}
        self._losses: dict[int, float] = {}
        self._saving: tuple[int, Future[None]] | None = None
        self._failed = ""
        self._checkpointer = self._thread = None
        if keep is not None:
            self._meetings = Meetings()
            options = ocp.AsyncOptions(SAVE_SECONDS, lambda *, key, timeout_ms: self._meetings.meet(timeout_ms / 1000))
            self._checkpointer = ocp.AsyncCheckpointer(_handler(), async_options=options)
            self._thread = ThreadPoolExecutor(1, "seal")
            if jax.process_index() == 0:
                self._root.mkdir(parents=True, exist_ok=True)
                self._clean()
            for step in self.steps():
                with contextlib.suppress(DamagedError):
                    self._losses[step] = _loss(self._read_meta(step))

    # Writing

    def save(self, state: TrainState, config: TrainConfig, metrics: dict[str, Any], data_sha256: str) -> int:
        """Begin to save a state and return its step; the next call waits for this one.

        `data_sha256` is that of the training tokens: a run is resumed on the same ones or not at all. The caller has
        seen that the state's loss is finite. A step that is saved already is left as it is. A save that fails, for
        want of space say, leaves the steps before it and is spoken of by the next call of `save`, `wait` or `close`.
        If it fails on one of several processes, it fails on all.

        Raises:
          CheckpointError: a later step exists, and the run does not go on from an earlier one; or the save cannot be
            begun on this process, and the others wait for it.
        """
        step, checkpointer, thread = int(state.step), self._checkpointer, self._thread
        if checkpointer is None or thread is None:
            raise ValueError("These checkpoints were opened to be read; give `keep` to write.")
        self._finish()
        steps = self.steps()
        given_up = [s for s in steps if self._resumed_from is not None and s > self._resumed_from]
        if max(set(steps) - set(given_up), default=-1) > step:
            raise CheckpointError(
                f"Step {step} was not saved in {self.run_dir}: it holds steps {steps}. "
                "Resume from the latest, or start with --overwrite."
            )
        if step in steps and step not in given_up:
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
        arrays = {"params": state.params, "opt_state": state.opt_state}
        arrays |= {} if state.ema is None else {"ema": state.ema}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in arrays.items()}
        begun: Future[None] = Future()
        if given_up and (problem := self._on_first(lambda: self._give_up(given_up))):
            raise CheckpointError(f"Steps {given_up} of {self.run_dir} were given up and cannot be deleted: {problem}.")
        self._resumed_from = None
        problem = self._on_first(lambda: self._probe(step))
        try:
            if problem:
                raise OSError(problem)
            self._meetings = Meetings()
            checkpointer.save(self._dir(step), args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))
        except OSError as error:
            if jax.process_count() > 1 and not problem:
                raise CheckpointError(
                    f"Step {step} was not saved in {self.run_dir}: {_reason(error)} (process {jax.process_index()} of "
                    f"{jax.process_count()}). The last good step is {max(steps, default='none')}. The other processes "
                    "wait for this one, so all end. Start all of them again, with --auto-resume."
                ) from error
            begun.set_exception(error)
        else:
            begun = thread.submit(self._seal, step, _loss(meta))
        self._saving = step, begun
        return step

    def _give_up(self, steps: list[int]) -> None:
        """Delete later steps than the one that the run went on from, the newest first."""
        for step in reversed(steps):
            manifest.unseal(self._dir(step))

    def _probe(self, step: int) -> None:
        """See that a folder can be made: where Orbax fails to, the other processes wait for it for five minutes."""
        if is_local(self._root):
            probe = self._root / f"{step}.probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()

    def _on_first(self, work: Callable[[], None]) -> str:
        """Do something on process 0. Returns on all why that failed, or nothing."""
        problem = ""
        if jax.process_index() == 0:
            try:
                work()
            except Exception as error:  # whatever a file system raises: the others wait to hear of it
                problem = _reason(error)
        return from_all(problem)[0]

    def wait(self) -> int | None:
        """Wait until the last save is complete or has failed. Returns the newest complete step, or None."""
        self._finish()
        return self.latest_step()

    def close(self) -> None:
        """Finish and release."""
        self._finish()
        if self._thread is not None:
            self._thread.shutdown()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close. Raises `CheckpointError` if the last save failed: what the run came to is not saved."""
        self.close()
        if self._failed and kind is None:
            raise CheckpointError(f"{self._failed} Make room, and go on with --resume.")

    def _seal(self, step: int, loss: float) -> None:
        """In the background: wait for the arrays of all processes, seal the step, delete those that it replaces."""
        assert self._checkpointer is not None and self._keep is not None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:  # whatever Orbax raises: the others must hear of it
            raise self._meetings.failed(_reason(error), SAVE_SECONDS) from error
        self._meetings.meet(SAVE_SECONDS)
        if jax.process_index() == 0:
            manifest.seal(self._dir(step))
            self._losses[step] = loss
            steps = self._list()
            best = _best(self._losses, steps)
            for old in steps[: -self._keep]:
                if old != best:
                    manifest.unseal(self._dir(old))

    def _finish(self) -> None:
        """Wait for the save that goes on. If it failed: say why, and remove what it left."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        error = saving.exception()
        reason = next(filter(None, from_all("" if error is None else _reason(error))), "")
        if step in self.steps():
            self._failed = ""
            problem = reason and f"Older checkpoints than step {step} were not deleted in {self.run_dir}: {reason}."
        else:
            problem = self._failed = f"Step {step} was not saved in {self.run_dir}: {reason}."
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):
                    self._clean()
        if problem and jax.process_index() == 0:
            print(f"warning: {problem}", file=sys.stderr, flush=True)

    def _clean(self) -> None:
        """Delete what was not finished."""
        for path in children(self._root):
            if path.name.partition(".")[0].isdigit() and not (path.name.isdigit() and manifest.is_sealed(path)):
                path.rmtree()

    # Reading

    def steps(self) -> list[int]:
        """The complete steps, in order."""
        return json.loads(from_all(json.dumps(self._list() if jax.process_index() == 0 else []))[0])

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step of the lowest held-out loss (the newest of equals), or None.

        Raises `CheckpointError` if a step does not say its loss, being damaged.
        """
        steps = self.steps()
        return _best({step: _loss(self.meta(step)) for step in steps}, steps)

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

    def restore_params(self, target: Any, step: Step = "latest", weights: Literal["params", "ema"] = "params") -> Any:
        """The parameters alone, or their average, placed as `target` is. Raises as `restore` does."""
        return self._restore(step, {weights: target})[1][weights]

    def meta(self, step: Step = "latest") -> dict[str, Any]:
        """The JSON of a step: step, config, tokenizer, data_sha256, versions, metrics. Raises as `restore` does."""
        step = self._step(step)
        return self._undamaged(step, lambda: self._read_meta(step))

    def _restore(self, step: Step, trees: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        step = self._step(step)
        shard = (jax.process_index(), jax.process_count())
        self._undamaged(step, lambda: manifest.check(self._dir(step), trees, shard))
        args = {}
        for name, tree in trees.items():
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            self._check_arrays(step, name, target)
            placed = ocp.checkpoint_utils.construct_restore_args(target)
            args[name] = ocp.args.PyTreeRestore(target, restore_args=placed)
        largest = max((math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(trees)), default=0)
        with ocp.Checkpointer(_handler(largest)) as reader:
            found = reader.restore(self._dir(step), args=ocp.args.Composite(**args))
        return step, {name: found[name] for name in trees}

    def _check_arrays(self, step: int, name: str, target: Any) -> None:
        """Refuse arrays of another shape or dtype: Orbax would cast them, and say nothing."""
        path = self._dir(step) / name
        if not path.exists():
            raise CheckpointError(
                f"{self.run_dir} has no {name} in step {step}"
                + (": the run kept no averaged weights (ema_decay is 0). Load its params." if name == "ema" else ".")
            )
        metadata = ocp.PyTreeCheckpointHandler().metadata(path).tree
        stored, wanted = (ocp.tree.to_flat_dict(tree, sep="/") for tree in (metadata, target))
        for key in sorted({*stored, *wanted}):
            here, there = (_described(tree.get(key)) for tree in (wanted, stored))
            if here != there:
                raise CheckpointError(
                    f"Step {step} of {self.run_dir} has {there} as {name}/{key}, and {here} is to be restored. The "
                    "config is not that of the run, or the checkpoint is of another version of this program."
                )

    def _step(self, step: Step) -> int:
        self._finish()
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"{self.run_dir} holds no complete checkpoint: the run ended before its first save, or never was. "
                "Start it with `mtp-jax train EXPERIMENT.py --run-dir DIR`, and --overwrite if it is there."
                + self._unsealed()
            )
        if step == "best":
            step = self.best_step() or max(steps)
        if step == "latest":
            step = max(steps)
            lost = [s for s in unsealed_steps(self.run_dir) if s > step]
            if lost and jax.process_index() == 0:
                print(
                    f"warning: Step {lost[-1]} of {self.run_dir} has no manifest: its save was not finished, or the "
                    f"manifest is lost. The last good step is {step}.",
                    file=sys.stderr,
                    flush=True,
                )
        if step not in steps:
            raise CheckpointError(f"{self.run_dir} has no step {step}; it has {steps}.{self._unsealed()}")
        return step

    def _unsealed(self) -> str:
        found = unsealed_steps(self.run_dir)
        if not found:
            return ""
        return (
            f" Steps {found} have no {manifest.MANIFEST}: they were not finished, or were saved by a version without. "
            f"`mtp_jax.manifest.seal(etils.epath.Path({str(self._dir(found[-1]))!r}))` makes the last one complete as "
            "it is."
        )

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
        return json.loads(manifest.read(self._dir(step), META_FILE))

    def _dir(self, step: int) -> epath.Path:
        return self._root / str(step)

    def _list(self) -> list[int]:
        return manifest.sealed_steps(self._root)


def unsealed_steps(run_dir: epath.Path) -> list[int]:
    """The steps of a run that Orbax has finished and that lack their manifest, in order.

    Their arrays are all there, and nobody knows whether they are what was written.
    """
    paths = [path for path in children(run_dir / CHECKPOINTS_DIR) if path.name.isdigit()]
    unsealed = [path for path in paths if not manifest.is_sealed(path)]
    return sorted(int(path.name) for path in unsealed if ocp.utils.is_checkpoint_finalized(path))


def _handler(largest: int = 0) -> ocp.CompositeCheckpointHandler:
    """For arrays of at most `largest` bytes, of which some at a time are read: not the whole state once more."""
    # Floats hardly get smaller, and compressing them takes six times the processor time that saving them does.
    arrays: dict[str, Any] = {
        name: ocp.PyTreeCheckpointHandler(use_compression=False, restore_concurrent_gb=1 + 2 * largest // 10**9)
        for name in ("params", "opt_state", "ema")
    }
    return ocp.CompositeCheckpointHandler(**arrays, meta=ocp.JsonCheckpointHandler())


def _loss(meta: dict[str, Any]) -> float:
    return float(meta["metrics"].get("loss", math.inf))


def _best(losses: dict[int, float], steps: list[int]) -> int | None:
    known = [step for step in steps if math.isfinite(losses.get(step, math.inf))]
    return min(known, key=lambda step: (losses[step], -step), default=None)


def _described(array: Any) -> str:
    return "nothing" if array is None else f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _reason(error: BaseException) -> str:
    """The first line of an error, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
