"""Sinks of metrics outside of the run directory: Weights & Biases and MLflow, where they are installed.

Projects, servers and keys are those of each library's own environment variables. A run keeps the id that the service
knows it by in `wandb.json` or `mlflow.json`, and takes it up again when it is resumed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from etils import epath

from mtp_jax.runs.paths import is_local, replace_file
from mtp_jax.validate import require

PROJECT = "mtp_jax"
HELD = 1000  # records that wait for a service, at most
PATIENCE = 30.0  # seconds that the end of a run waits for one
LIMITS = 100, 6000  # MLflow's: parameters in a call, letters of a value


class Sink:
    """A service that is given the numbers by a thread of its own: a slow one, or one that is gone, holds nothing up.

    What goes wrong there is raised as `OSError` by the next call of `log` or `close`. A record that fails is lost to
    the service; the next one is tried. What it has of an earlier process is not logged again.

    Args:
      run_dir: where the id is kept.
      config: the run's, as a dictionary.
      earlier: of a run that is resumed, the last step that was logged by kind; None: the run is new.
    """

    name: ClassVar[str]

    def __init__(self, run_dir: epath.PathLike, config: Mapping[str, Any], earlier: Mapping[str, int] | None = None):
        self._dir, self._config = epath.Path(run_dir), config
        self._dir.mkdir(parents=True, exist_ok=True)
        self._file = self._dir / f"{self.name}.json"
        self._id, logged = (None, {}) if earlier is None else _kept(self._file)
        # A run that goes back twice had gone further than its own metrics tell.
        kinds = {*logged, *(earlier or {})} if self._id else ()
        self._logged = {kind: max(logged.get(kind, -1), (earlier or {}).get(kind, -1)) for kind in kinds}
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(HELD)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics of a step over, as `<kind>/<name>`."""
        if step > self._logged.get(kind, -1):
            try:
                self._queue.put_nowait((step, {f"{kind}/{name}": value for name, value in metrics.items()}))
            except queue.Full:
                self._error = self._error or TimeoutError(f"{HELD} records wait for it; others are lost")
        self._check()

    def close(self) -> None:
        """End the run at the service, for which it has `PATIENCE` seconds."""
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=PATIENCE)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._error = self._error or TimeoutError(f"it was not done after {PATIENCE:g} s")
        self._check()

    def _check(self) -> None:
        error, self._error = self._error, None
        if error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _work(self) -> None:
        """The thread: begin, hand over what comes, end."""
        begun = False
        with self._kept_error():
            self._id = self._begin(self._id)
            begun = True
            replace_file(self._file, json.dumps({"id": self._id, "logged": self._logged}) + "\n")
        while (record := self._queue.get()) is not None:
            with self._kept_error():
                if begun:
                    self._send(*record)
        with self._kept_error():
            if begun:
                self._end()

    @contextlib.contextmanager
    def _kept_error(self) -> Any:
        try:
            yield
        except Exception as error:  # each library has its own
            self._error = self._error or error

    def _begin(self, run_id: str | None) -> str:
        """Take up the run of that id, or begin one. Returns its id."""
        raise NotImplementedError

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class WandbSink(Sink):
    """Weights & Biases. Its own files go to `<run_dir>/wandb`, or where $WANDB_DIR says.

    It refuses steps below the last one, so each is passed. What is printed stays the run's own: nothing is captured.
    """

    name = "wandb"

    def _begin(self, run_id: str | None) -> str:
        import wandb  # type: ignore[import-not-found]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or self._dir.name,
            id=run_id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or (str(self._dir) if is_local(self._dir) else None),
            config=dict(self._config),
            allow_val_change=True,
            settings={"console": "off", "finish_timeout": PATIENCE / 2},
        )
        return self._run.id

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def _end(self) -> None:
        self._run.finish()


class MlflowSink(Sink):
    """MLflow. Parameters cannot change there: those of a resumed run are what it began with."""

    name = "mlflow"

    def _begin(self, run_id: str | None) -> str:
        import mlflow  # type: ignore[import-not-found]

        self._mlflow = mlflow
        if run_id:
            return mlflow.start_run(run_id=run_id).info.run_id
        if not (os.environ.get("MLFLOW_EXPERIMENT_NAME") or os.environ.get("MLFLOW_EXPERIMENT_ID")):
            mlflow.set_experiment(PROJECT)
        run_id = mlflow.start_run(run_name=os.environ.get("MLFLOW_RUN_NAME") or self._dir.name).info.run_id
        params, (count, letters) = list(_flat(self._config)), LIMITS
        for first in range(0, len(params), count):
            mlflow.log_params({name: str(value)[:letters] for name, value in params[first : first + count]})
        return run_id  # type: ignore[return-value]

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def _end(self) -> None:
        self._mlflow.end_run()


SINKS: dict[str, type[Sink]] = {sink.name: sink for sink in (WandbSink, MlflowSink)}


def check_sinks(names: Iterable[str]) -> None:
    """Raise `ConfigError` unless the libraries of these sinks are installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        require(
            # A folder of that name, as these libraries leave them, is a package without an origin.
            spec is not None and spec.origin is not None,
            f"log_to has {name!r}, which is not installed; `pip install 'mtp_jax[{name}]'`, or leave it out.",
        )


def _kept(file: epath.Path) -> tuple[str | None, dict[str, int]]:
    """(id, last steps by kind) that a run keeps, if it does: other words in there stand in the way of no resume."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        values = json.loads(file.read_text())
        return str(values["id"]), {str(kind): int(step) for kind, step in values["logged"].items()}
    return None, {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
