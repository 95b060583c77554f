"""Signals that stop a run: it ends between two steps, the same two on all processes, with its state saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from mtp_jax.validate import PREEMPTED, PreemptedError


class StopSignals:
    """Signals as a flag that is looked at between steps, so that none is cut in half.

    Before `hold()`, where nothing is to be saved, they end what is being done at once: Ctrl-C with
    `KeyboardInterrupt`, SIGTERM with the process, whose status is 75. After it a second Ctrl-C interrupts at once.

    With several processes JAX hears SIGTERM and the notices of Cloud TPU, tells all processes, and lets them stop at
    one step; Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.seen: int | None = None
        """The signal that was seen."""
        self._held, self._looks = False, 0
        self._many = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def stop(self) -> bool:
        """Whether to stop here. Every process must ask as often as the others, and none may stop by itself."""
        if self._many and self.seen is None:
            self._looks += 1
            if multihost_utils.reached_preemption_sync_point(self._looks):
                self.seen = signal.SIGTERM
        return self.seen is not None

    def hold(self) -> None:
        """From here on signals wait to be looked at, and to the end: what is being closed is not cut off either."""
        self._held = True

    def end(self, kept: str) -> BaseException:
        """What a run that stopped for a signal ends with; `kept` says what is saved."""
        if self.seen != signal.SIGINT:
            return PreemptedError(f"Preempted. {kept}")
        print(f"Interrupted. {kept}", flush=True)
        return KeyboardInterrupt()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._many else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGINT and (self.seen or not self._held):
            raise KeyboardInterrupt
        elif not self._held:
            # An exception could get lost here: Python ignores those that are raised inside a callback.
            said = "mtp-jax: error: Preempted before the first step; what was saved before is complete."
            print(said, file=sys.stderr, flush=True)
            os._exit(PREEMPTED)
        else:
            self.seen = number
            again = " Press again to stop without saving." if number == signal.SIGINT else ""
            print(f"{signal.Signals(number).name}: saving after this step.{again}", flush=True)
