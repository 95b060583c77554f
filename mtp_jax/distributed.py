"""Processes of one run: how they find each other, what one decides for all, and how they end when one is lost.

JAX's runtime connects them and runs one program on all. A process that dies or hangs leaves the others waiting in an
exchange that never comes; here each says every few seconds where it is, sees where the others are, and ends, naming
the one that is lost.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mtp_jax.validate import ConfigError, positive, require, typed

T = TypeVar("T")
BEATS_KEPT = 4  # how many times within `lost_seconds` a process says that it is there
CONNECT_SECONDS = 300


@dataclass(frozen=True)
class Distributed:
    """Which of how many processes this one is. Without a coordinator there is one process."""

    coordinator: str = ""
    """HOST:PORT of process 0; or auto, on Cloud TPU, GKE, SLURM and Open MPI. [$MTP_JAX_COORDINATOR]"""
    num_processes: int = 0
    """How many processes there are; not needed with auto. [$MTP_JAX_NUM_PROCESSES]"""
    process_id: int = -1
    """Which one this is, from 0; not needed with auto. [$MTP_JAX_PROCESS_ID]"""
    lost_seconds: float = 30.0
    """A process that was not heard of for so long is lost: the others end with status 1."""
    stalled_seconds: float = 600.0
    """As long may a step take, or a batch of an evaluation. Then all end, and say where each one was."""

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "lost_seconds", "stalled_seconds")
        given = self.num_processes != 0 or self.process_id != -1
        if self.coordinator == "":
            require(
                not given,
                f"--distributed.num-processes is {self.num_processes} and process-id is {self.process_id}, and no "
                "coordinator is given; set --distributed.coordinator (or $MTP_JAX_COORDINATOR) to HOST:PORT of process "
                "0, or to auto.",
            )
        elif self.coordinator != "auto" or given:
            require(
                self.coordinator == "auto" or re.fullmatch(r".+:\d+", self.coordinator) is not None,
                f"--distributed.coordinator is {self.coordinator!r}; it must be HOST:PORT of process 0, or auto.",
            )
            require(
                0 <= self.process_id < self.num_processes,
                f"--distributed.process-id is {self.process_id} and num-processes is {self.num_processes}; the id "
                "must be at least 0 and below their number.",
            )

    @classmethod
    def from_environment(cls) -> Distributed:
        """What the launcher said. Raises `ConfigError` on a number that is none."""

        def number(name: str, default: int) -> int:
            text = os.environ.get(name) or str(default)
            require(re.fullmatch(r"-?\d+", text) is not None, f"${name} is {text!r}; it must be a number.")
            return int(text)

        coordinator = os.environ.get("MTP_JAX_COORDINATOR", "")
        return cls(coordinator, number("MTP_JAX_NUM_PROCESSES", 0), number("MTP_JAX_PROCESS_ID", -1))


def connect(options: Distributed) -> None:
    """Find the other processes and wait for them. Call it before anything asks JAX for its devices.

    Raises `ConfigError` if they are not all there within five minutes.
    """
    if not options.coordinator:
        return
    import jax

    # A dead process is to be named by `Watchdog`, before JAX's own watch aborts this one.
    given: dict[str, Any] = {"heartbeat_timeout_seconds": int(4 * options.lost_seconds) + 60}
    if options.num_processes:
        given |= {"num_processes": options.num_processes, "process_id": options.process_id}
    if options.coordinator != "auto":
        given["coordinator_address"] = options.coordinator
    me = f"process {options.process_id} of {options.num_processes}" if options.num_processes else "this process"
    print(f"{me} on {socket.gethostname()}: connecting to {options.coordinator}", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(**given, initialization_timeout=CONNECT_SECONDS, shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{me} did not find the others at {options.coordinator} ({str(error).splitlines()[0]}). All must be "
            f"started within {CONNECT_SECONDS} s of each other, with one coordinator and one number of processes, and "
            "reach its port."
        ) from error


def _client() -> Any:
    from jax._src import distributed  # where Orbax finds it too; there is no public way

    return distributed.global_state.client


_numbers = itertools.count()


def on_first(decide: Callable[[], T]) -> T:
    """What `decide` returns on process 0 (JSON values), on every process; if it raises, so do all."""
    import jax

    if jax.process_count() == 1:
        return decide()
    key = f"mtp_jax/first/{next(_numbers)}"
    if jax.process_index() > 0:
        said = json.loads(_client().blocking_key_value_get(key, 3_600_000))
        if "error" in said:
            raise ConfigError(said["error"])
        return said["value"]
    try:
        value = decide()
    except Exception as error:
        problem = str(error) if isinstance(error, ConfigError) else f"Process 0 failed: {error!r}"
        _client().key_value_set(key, json.dumps({"error": problem}))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def from_all(text: str) -> list[str]:
    """What each process has to say, in their order, on all of them. All must ask at the same point."""
    import jax

    if jax.process_count() == 1:
        return [text]
    name = f"mtp_jax/all/{next(_numbers)}"
    if text:  # most have nothing to say, and what is said is kept for good
        _client().key_value_set(f"{name}/{jax.process_index()}", text)
    _client().wait_at_barrier(name, 3_600_000)
    said = dict(_client().key_value_dir_get(f"{name}/"))
    return [said.get(f"{name}/{process}", "") for process in range(jax.process_count())]


def all_done() -> None:
    """Wait until every process has come here, however much longer one of them works. All must come to the same point;
    a process that dies ends the wait of the others."""
    import jax

    if jax.process_count() == 1:
        return
    name = f"mtp_jax/done/{next(_numbers)}"
    _client().key_value_set(f"{name}/{jax.process_index()}", "done")
    for process in range(jax.process_count()):
        while not _has_come(f"{name}/{process}"):
            pass


def _has_come(key: str, milliseconds: int = 600_000) -> bool:
    """Whether a key is set within a time."""
    import jax

    try:
        return bool(_client().blocking_key_value_get(key, milliseconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return False


def warn(text: str) -> None:
    """Print a warning on process 0."""
    import jax

    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


class MeetingError(RuntimeError):
    """What failed on one process, which the message names, and therefore on all."""


class Meetings:
    """Where background threads of all processes wait for each other: nothing passes between devices, which train.

    All processes make one for each piece of work, in the same order, and come to the same meetings. One that has failed
    comes to its next one, says so, and that is the last for all.
    """

    def __init__(self) -> None:
        self._name, self._held, self._over = f"mtp_jax/meetings/{next(_numbers)}", 0, False

    def failed(self, problem: str, seconds: float) -> MeetingError:
        """The error of this process, which has failed; the others have heard of it, if they did not fail before."""
        import jax

        if jax.process_count() == 1 or self._over:
            return MeetingError(problem)
        problem += f" (process {jax.process_index()} of {jax.process_count()}, host {socket.gethostname()})"
        with contextlib.suppress(Exception):  # whatever the runtime raises: this process has failed anyway
            self.meet(seconds, problem)
        return MeetingError(problem)

    def meet(self, seconds: float, problem: str = "") -> None:
        """Wait for the others, or say what has failed. Raises `MeetingError` if one comes to say so."""
        import jax

        if jax.process_count() == 1:
            return
        # What is said belongs to this meeting alone: who fails right after it is heard at the next, and comes there.
        name = f"{self._name}/{self._held}"
        self._held += 1
        try:
            if problem:
                _client().key_value_set(f"{name}/{jax.process_index()}", problem)
            _client().wait_at_barrier(name, int(1000 * seconds))
            if problems := _client().key_value_dir_get(f"{name}/"):
                raise MeetingError(min(problems)[1])
        except Exception:
            self._over = True
            raise


class Watchdog:
    """Tells the other processes where this one is, and ends it when one of them is lost or stuck.

    Nothing else can: a process that waits in an exchange with a dead one runs no Python. As a context manager; in a run
    of one process it does nothing.
    """

    def __init__(self, options: Distributed, end: Callable[[str], None] | None = None):
        import jax

        self._options, self._end = options, end or _end
        self._me, self._count = jax.process_index(), jax.process_count()
        self._place = ("starting", 0)
        self._since = time.monotonic()
        self._stopping = threading.Event()
        self._heard = self._since  # when process 0, which keeps what all say, last answered
        # What each last said, and when that was new.
        self._peers: dict[int, tuple[str, float]] = dict.fromkeys(range(self._count), ("", self._since))
        self._patient = True

    def at(self, what: str, step: int, *, patient: bool = False) -> None:
        """This process begins to do `what` at `step`. `patient`: it may take any time, as compiling does."""
        self._place, self._since, self._patient = (what, step), time.monotonic(), patient

    def blame(self) -> None:
        """An exchange has failed here: wait until it is known who is lost, and end. Returns if nobody is."""
        if self._count > 1:
            self._stopping.wait(1.5 * self._options.lost_seconds)

    def __enter__(self) -> Watchdog:
        if self._count > 1:
            self._beat()
            interval = self._options.lost_seconds / BEATS_KEPT
            for work in (self._beat, self._judge):
                threading.Thread(target=self._repeat, args=(work, interval), daemon=True, name=work.__name__).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()

    def _repeat(self, work: Callable[[], None], interval: float) -> None:
        while not self._stopping.wait(interval):
            work()

    def _beat(self) -> None:
        """Say where this process is, and hear where the others are. It blocks for as long as process 0 is away."""
        now = time.monotonic()
        said = {"host": socket.gethostname(), "at": self._place, "for": now - self._since, "beat": now}
        try:
            _client().key_value_set(f"mtp_jax/alive/{self._me}", json.dumps(said), allow_overwrite=True)
            found = _client().key_value_dir_get("mtp_jax/alive/")
        except Exception:  # whatever the runtime raises: `_judge` counts the time since it last answered
            return
        now = self._heard = time.monotonic()
        for key, text in found:
            peer = int(key.rpartition("/")[2])
            if self._peers.get(peer, ("", 0))[0] != text:
                self._peers[peer] = text, now

    def _judge(self) -> None:
        """End this process if another is lost, or all wait for one that is stuck."""
        now, limit = time.monotonic(), self._options.lost_seconds
        lost = {peer: now - when for peer, (_, when) in self._peers.items() if peer != self._me and now - when > limit}
        if now - self._heard > limit:
            lost = {0: now - self._heard}
        if lost:
            names = ", ".join(f"{self._name(peer)} for {silent:.0f} s" for peer, silent in sorted(lost.items()))
            self._end(f"nothing was heard of {names}")
        elif not self._patient and now - self._since > self._options.stalled_seconds:
            places = {peer: json.loads(text) for peer, (text, _) in self._peers.items() if text}
            first = min((place["at"][1] for place in places.values()), default=0)
            behind = [peer for peer, place in places.items() if place["at"][1] == first]
            each = "; ".join(
                f"{self._name(peer)}: {place['at'][0]} at step {place['at'][1]} for {place['for']:.0f} s"
                for peer, place in sorted(places.items())
            )
            blame = f"; behind the others: {', '.join(map(self._name, behind))}" if len(behind) < len(places) else ""
            self._end(f"no step was made for {now - self._since:.0f} s ({each}{blame})")

    def _name(self, peer: int) -> str:
        said = self._peers[peer][0]
        return f"process {peer} of {self._count} (host {json.loads(said)['host'] if said else 'not known'})"


def _end(reason: str) -> None:
    """End this process at once: it may wait in an exchange, and its threads with it."""
    print(
        f"mtp-jax: error: {reason}. This process ends too; what is saved is complete. Start all of them again, with "
        "--auto-resume.",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(1)
