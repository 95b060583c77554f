"""Session of training: the clock of a process, the signals that stop it, and the watchdog over it and its peers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from mtp_jax.distributed import Distributed, Watchdog
from mtp_jax.output import safe_output
from mtp_jax.train.clock import Clock
from mtp_jax.train.signals import StopSignals


@dataclass(frozen=True)
class TrainSession:
    """What a process of a run keeps from its first line to its last."""

    clock: Clock
    signals: StopSignals
    watchdog: Watchdog

    @contextlib.contextmanager
    def phase(self, what: str, step: int, *, patient: bool = True) -> Iterator[None]:
        """A context in which no step is made: the clock loses its time to `what`, and the watchdog tells of it.

        A `patient` phase may take any time. Until the next phase or step the watchdog counts what follows to this one.
        """
        self.signals.look()
        self.watchdog.at(what, step, patient=patient)
        with self.clock.losing(what):
            yield
        self.signals.look()


@contextlib.contextmanager
def open_session(options: Distributed) -> Iterator[TrainSession]:
    """A context in which signals are heard, lost processes are noticed, and nobody has to read what is printed."""
    clock = Clock()
    with safe_output(), StopSignals() as signals, Watchdog(options) as watchdog:
        try:
            yield TrainSession(clock, signals, watchdog)
        except Exception as error:
            # An exchange that fails for want of a process may raise either.
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                watchdog.blame()
            raise


def say(text: str) -> None:
    """Print on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)
