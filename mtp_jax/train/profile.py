"""Profile of some training steps, recorded by JAX's profiler."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mtp_jax.config import ProfileConfig
from mtp_jax.distributed import warn

PROFILE_DIR = "profile"


class Profile:
    """Records the steps of `config` into `profile/` of a run directory; of several processes each into a folder of its
    own, `process_I`."""

    def __init__(self, config: ProfileConfig, run_dir: epath.PathLike):
        self._begin, self._end = config.range
        self._dir = epath.Path(run_dir) / PROFILE_DIR
        if jax.process_count() > 1:
            self._dir /= f"process_{jax.process_index()}"
        self._recording: tempfile.TemporaryDirectory[str] | None = None

    def before(self, step: int, state: Any) -> None:
        """Step number `step` (from 0) is about to begin, from `state`."""
        if self._recording and step >= self._end:
            self.stop(state)
        elif self._begin <= step < self._end and not self._recording:
            jax.block_until_ready(state)  # what was begun before is not recorded
            # To a bucket JAX would write with a client of its own, which is not that of the rest.
            self._recording = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._recording.name)

    def stop(self, state: Any) -> None:
        """End the recording, if there is one, when `state` is there."""
        if self._recording:
            jax.block_until_ready(state)
            recording, self._recording = self._recording, None
            try:
                jax.profiler.stop_trace()
                with recording as folder:
                    for file in filter(Path.is_file, Path(folder).rglob("*")):
                        target = self._dir / str(file.relative_to(folder))
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(file.read_bytes())
            except (OSError, RuntimeError) as error:  # a full disk ends no run; JAX has errors of its own
                warn(f"The profile was not written ({error}).")
                return
            if jax.process_index() == 0:
                print(f"profile of steps {self._begin}:{self._end} in {self._dir}", flush=True)
