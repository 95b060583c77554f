"""Checkpoint writer: saves a run's steps with Orbax in the background, seals them, and deletes those they replace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mtp_jax.config import TrainConfig
from mtp_jax.distributed import Meetings, from_all, warn
from mtp_jax.runs import manifest
from mtp_jax.runs.checkpoints import BLOCK_BYTES, CheckpointError, Checkpoints, Step, array_handler, best_of, loss_of
from mtp_jax.runs.layout import run_tokenizer, versions
from mtp_jax.runs.manifest import DamagedError
from mtp_jax.runs.paths import children, is_local, make_folder
from mtp_jax.state import TrainState
from mtp_jax.validate import to_dict

SAVE_SECONDS = 20 * 60  # what Orbax gives a save, and how long its processes wait for each other


class CheckpointWriter(Checkpoints):
    """The checkpoints of a run that goes on. Close it, or leave its `with`, to finish what is being written.

    Every process of a run makes one and calls the same methods; process 0 seals and deletes. What a killed process left
    unfinished is deleted when it is made.

    Args:
      run_dir: the run directory, local or in an object store.
      keep: how many of the newest steps are kept, beside the one of the lowest held-out loss.
      resumed_from: the step that the run goes on from. Later ones belong to a past that is given up: they are deleted
        when the next step is saved.
      on_host: the state lies in this machine's memory, and is written from there: nothing is copied first.
    """

    def __init__(self, run_dir: epath.PathLike, keep: int, resumed_from: int | None = None, *, on_host: bool = False):
        super().__init__(run_dir)
        self._keep, self._resumed_from = keep, resumed_from
        self._tokenizer: dict[str, Any] = {}
        self._losses: dict[int, float] = {}
        self._saving: tuple[int, Future[None]] | None = None
        self._failed = ""
        self._meetings = Meetings()
        self._on_host = on_host
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._thread = ThreadPoolExecutor(1, "seal")
        if jax.process_index() == 0:
            make_folder(self._root)
            self._clean()
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                self._losses[step] = loss_of(self._read_meta(step))

    def save(
        self, state: TrainState, config: TrainConfig, metrics: dict[str, Any], data_sha256: str, **known: Any
    ) -> int:
        """Begin to save a state, but for its base, and return its step; the next call waits for this one.

        `data_sha256` is that of the training tokens: a run is resumed on the same ones or not at all. `known` are JSON
        values that its JSON has too: of the base, say. The caller has
        seen that the state's loss is finite. A step that is saved already is left as it is. A save that fails, for
        want of space say, leaves the steps before it and is spoken of by the next call of `save`, `wait` or `close`.
        If it fails on one of several processes, it fails on all.

        Raises:
          CheckpointError: a later step exists, and the run does not go on from an earlier one; or the save cannot be
            begun on this process, and the others wait for it.
        """
        step = int(state.step)
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
            **known,
        }
        arrays = {"params": state.params, "opt_state": state.opt_state}
        arrays |= {} if state.ema is None else {"ema": state.ema}
        items = {name: _saved(tree) for name, tree in arrays.items() if jax.tree.leaves(tree)}
        begun: Future[None] = Future()
        if given_up and (problem := self._on_first(lambda: self._give_up(given_up))):
            raise CheckpointError(f"Steps {given_up} of {self.run_dir} were given up and cannot be deleted: {problem}.")
        self._resumed_from = None
        problem = self._on_first(lambda: self._probe(step))
        try:
            if problem:
                raise OSError(problem)
            self._meetings = Meetings()
            saver = self._checkpointer = self._checkpointer or self._make(arrays)
            saver.save(self._plain_dir(step), args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))
        except OSError as error:
            if jax.process_count() > 1 and not problem:
                raise CheckpointError(
                    f"Step {step} was not saved in {self.run_dir}: {_reason(error)} (process {jax.process_index()} of "
                    f"{jax.process_count()}). The last good step is {max(steps, default='none')}. The other processes "
                    "wait for this one, so all end. Start all of them again, with --auto-resume."
                ) from error
            begun.set_exception(error)
        else:
            begun = self._thread.submit(self._seal, step, loss_of(meta))
        self._saving = step, begun
        return step

    def _make(self, arrays: Any) -> ocp.AsyncCheckpointer:
        """What saves arrays of this size."""
        options = ocp.AsyncOptions(SAVE_SECONDS, lambda *, key, timeout_ms: self._meetings.meet(timeout_ms / 1000))
        largest = max(a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(arrays))
        return ocp.AsyncCheckpointer(array_handler(largest, on_host=self._on_host), async_options=options)

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
        self._thread.shutdown()
        if self._checkpointer:
            self._checkpointer.close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close. Raises `CheckpointError` if the last save failed: what the run came to is not saved."""
        self.close()
        if self._failed and kind is None:
            raise CheckpointError(f"{self._failed} Make room, and go on with --resume.")

    def _seal(self, step: int, loss: float) -> None:
        """In the background: wait for the arrays of all processes, seal the step, delete those that it replaces."""
        assert self._checkpointer
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:  # whatever Orbax raises: the others must hear of it
            raise self._meetings.failed(_reason(error), SAVE_SECONDS) from error
        self._meetings.meet(SAVE_SECONDS)
        if jax.process_index() == 0:
            manifest.seal(self._dir(step))
            self._losses[step] = loss
            steps = manifest.sealed_steps(self._root)
            best = best_of(self._losses, steps)
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
        if problem:
            warn(problem)

    def _clean(self) -> None:
        """Delete what was not finished."""
        for path in children(self._root):
            if path.name.partition(".")[0].isdigit() and not (path.name.isdigit() and manifest.is_sealed(path)):
                path.rmtree()

    def _step(self, step: Step) -> int:
        self._finish()  # what is being saved is there to be read
        return super()._step(step)


def _saved(tree: Any) -> ocp.args.PyTreeSave:
    return ocp.args.PyTreeSave(tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=BLOCK_BYTES), tree))


def _reason(error: BaseException) -> str:
    """The first line of an error, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
