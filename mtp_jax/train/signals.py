"""Signals that stop a command: at once where nothing is half written, and a run between two steps, the same two on all
processes, with its state saved.

Importing it needs no JAX.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

from mtp_jax.validate import PREEMPTED, PreemptedError

INTERRUPTED = 130  # exit status
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and the notices: a machine or a time limit ends, a terminal is closed."""

_listening = False


@contextlib.contextmanager
def listening(hear: Callable[[int], None], numbers: Iterable[int]) -> Iterator[None]:
    """A context in which a thread calls `hear` with each of these signals, whatever the main thread does.

    Python's handlers wait for the main thread, which may be in a library for minutes, and an exception of theirs is
    lost in a callback of the garbage collector and ends JAX with a segmentation fault. An inner context must have all
    the `numbers` of the outer ones. In another thread than the main one it does nothing.
    """
    global _listening
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wanted = set(numbers)

    def listen() -> None:
        while byte := os.read(reader, 1):
            if byte[0] in wanted:
                hear(byte[0])
        os.close(reader)

    threading.Thread(target=listen, daemon=True, name="signals").start()
    outer, _listening = _listening, True
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _nothing) for number in wanted if _is_free(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        _listening = outer
        os.close(writer)


def _nothing(*_: object) -> None:
    """The handler of a signal that a thread hears."""


def _is_free(number: int) -> bool:
    """Whether a signal may be taken: not if it is ignored (`nohup`), nor if the user's own code hears it."""
    handler = signal.getsignal(number)
    if number in (signal.SIGINT, signal.SIGTERM):
        return handler not in (signal.SIG_IGN, None)
    return handler in (signal.SIG_DFL, _nothing)


def leave(number: int) -> None:
    """End this process for a signal at once, its children first. What is written is complete, or begun anew."""

    def last_words() -> None:
        if number != signal.SIGINT:
            print("mtp-jax: error: Preempted; what was saved before is complete.", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
                if stream.isatty():
                    os.write(stream.fileno(), b"\x1b[?25h\n")  # the cursor, which a bar has hidden
        with contextlib.suppress(Exception):  # or its tracker warns of semaphores
            sys.modules["multiprocessing.util"]._run_finalizers(0)

    # The main thread may hold the stream, and wait for who reads.
    words = threading.Thread(target=last_words, daemon=True)
    words.start()
    words.join(1)
    with contextlib.suppress(Exception):
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)


class StopSignals:
    """Signals as a flag that is looked at between steps, so that none is cut in half.

    Before `hold()`, where nothing is to be saved, they end what is being done: a command with its process, at once. In
    a user's own process Ctrl-C raises `KeyboardInterrupt`, at the next `look()` if not `at_once()`; the others end the
    process, whose status is 75. After it a second Ctrl-C interrupts at once.

    With several processes JAX hears SIGTERM and the notices of Cloud TPU, tells all processes, and lets them stop at
    one step; the other signals are passed on as SIGTERM.
    """

    def __init__(self) -> None:
        import jax

        self.seen: int | None = None
        """The signal that was seen."""
        self._held, self._pressed, self._at_once, self._looks = False, False, False, 0
        self._many = jax.process_count() > 1
        self._command = _listening
        self._lock = threading.RLock()
        self._stack = contextlib.ExitStack()

    def stop(self) -> bool:
        """Whether to stop here. Every process must ask as often as the others, and none may stop by itself."""
        if self._many and self.seen is None:
            from jax.experimental import multihost_utils

            self._looks += 1
            if multihost_utils.reached_preemption_sync_point(self._looks):
                self.seen = signal.SIGTERM
        return self.seen is not None

    def look(self) -> None:
        """Raise the `KeyboardInterrupt` of a Ctrl-C before `hold()` that has raised none."""
        if self.seen is not None and not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context without JAX, in which Ctrl-C may raise anywhere."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def hold(self) -> None:
        """From here on signals wait to be looked at, and to the end: what is being closed is not cut off either."""
        with self._lock:
            self.look()
            self._held = True

    def end(self, kept: str) -> BaseException:
        """What a run that stopped for a signal ends with; `kept` says what is saved."""
        if self.seen != signal.SIGINT:
            return PreemptedError(f"Preempted. {kept}")
        print(f"Interrupted. {kept}", flush=True)
        return KeyboardInterrupt()

    def __enter__(self) -> StopSignals:
        numbers = [number for number in STOPS if not (self._many and number == signal.SIGTERM)]
        if self._command:
            self._stack.enter_context(listening(self._hear, numbers))
        elif threading.current_thread() is threading.main_thread():
            for number in filter(_is_free, numbers):
                before = signal.signal(number, lambda number, _: self._hear(number))
                self._stack.callback(signal.signal, number, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _hear(self, number: int) -> None:
        with self._lock:
            interrupt = number == signal.SIGINT
            again, self._pressed = interrupt and self._pressed, interrupt or self._pressed
            if self._many and not again:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            at_once = again or not self._held
            if at_once and (self._command or not interrupt):
                leave(number)
            self.seen = number
            if at_once and (again or self._at_once):
                raise KeyboardInterrupt
        doing = "ending when this is done" if at_once else "saving after this step"
        with contextlib.suppress(RuntimeError):  # it has interrupted another print
            hint = f" Press again to stop {'at once' if at_once else 'without saving'}." if interrupt else ""
            print(f"{signal.Signals(number).name}: {doing}.{hint}", flush=True)
