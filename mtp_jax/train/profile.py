"""Profile of some training steps, recorded by JAX's profiler."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mtp_jax.config import ProfileConfig
from mtp_jax.runs.paths import is_local

PROFILE_DIR = "profile"


class Profile:
    """Records the steps of `config` into `profile/` of a run directory; of several processes each into a folder of its
    own, `process_I`."""

    def __init__(self, config: ProfileConfig, run_dir: epath.PathLike):
        self._begin, self._end = config.range
        self._dir = epath.Path(run_dir) / PROFILE_DIR
        if jax.process_count() > 1:
            self._dir /= f"process_{jax.process_index()}"
        self._aside: tempfile.TemporaryDirectory[str] | None = None
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Step number `step` (from 0) is about to begin, from `state`."""
        if self._running and step >= self._end:
            self.stop(state)
        elif self._begin <= step < self._end and not self._running:
            jax.block_until_ready(state)  # what was begun before is not recorded
            if not is_local(self._dir):  # JAX would write with a client of its own, which is not that of the rest
                self._aside = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._aside.name if self._aside else str(self._dir))
            self._running = True

    def stop(self, state: Any) -> None:
        """End the recording, if there is one, when `state` is there."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
            if self._aside:
                with self._aside as folder:
                    _copy(Path(folder), self._dir)
                self._aside = None
            if jax.process_index() == 0:
                print(f"profile of steps {self._begin}:{self._end} in {self._dir}", flush=True)


def _copy(folder: Path, to: epath.Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            target = to / str(file.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
