"""One writer of a run: a lock in its directory names the process that trains there, and no dead one holds it.

It is rewritten every few seconds. Who starts where that process would be seen knows at once whether it lives. Who
starts elsewhere, over a shared disk or a bucket, watches whether the lock still changes: no clocks are compared.
Reading a run needs no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from etils import epath

from mtp_jax.distributed import on_first
from mtp_jax.runs.paths import LOCK, is_local, make_folder, replace_file
from mtp_jax.validate import BusyError, ConfigError

BEAT_SECONDS = 15.0
BEATS_WATCHED = 4  # who shows none of them is dead


@contextlib.contextmanager
def one_writer(run_dir: epath.PathLike) -> Iterator[epath.Path]:
    """A context in which nobody else trains in a run directory. All processes of a run enter it, and process 0 locks.

    Raises:
      BusyError: another process trains there, which the message names.
      ConfigError: the directory cannot be written.
    """
    lock = _Lock(epath.Path(run_dir))
    try:
        on_first(lock.take)
        yield lock.run_dir
    finally:
        lock.release()


@contextlib.contextmanager
def one_maker(path: Path) -> Iterator[None]:
    """A context in which no other command makes the directory `path`. All processes enter it, and process 0 locks a
    file beside it, which the system lets go of when the process ends.

    Raises `BusyError` if another command makes it.
    """
    file = path.with_name(f".{path.name}.lock")
    lock = filelock.FileLock(file)

    def take() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise BusyError(
                f"Another command makes {path}: it holds {file}. Let it end, stop it, or give another --out."
            ) from None

    on_first(take)
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
            lock.release()


class _Lock:
    def __init__(self, run_dir: epath.Path):
        self.run_dir, self._file, self._made = run_dir, run_dir / LOCK, list[epath.Path]()
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._me: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "since": since, "beat": 0}
        self._me |= {"id": uuid.uuid4().hex, "place": _place(), "started": _started(pid)}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run lock")

    def take(self) -> None:
        """Become the writer. Raises `ConfigError` as `one_writer` does."""
        try:
            with contextlib.ExitStack() as stack:
                ordered = False
                if is_local(self.run_dir):
                    self._made = make_folder(self.run_dir)
                    guard = self.run_dir / f"{LOCK}.guard"
                    with contextlib.suppress(OSError, NotImplementedError):  # some disks have no such locks
                        stack.enter_context(filelock.FileLock(guard))
                        stack.callback(guard.unlink, missing_ok=True)
                        ordered = True
                self._refuse(self._living(self._read()))
                self._write()
                if not ordered:  # of those that start at the same time the last one has it
                    time.sleep(BEAT_SECONDS / 15)
                    holder = self._read() or {}
                    self._refuse(holder if holder.get("id") != self._me["id"] else None)
        except OSError as error:
            raise ConfigError(
                f"The run directory {self.run_dir} cannot be written ({error}). Make room, or give another --run-dir."
            ) from error
        self._thread.start()

    def release(self) -> None:
        """Leave the run to others, and no folder that was made for the lock alone."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(Exception):  # whatever a bucket raises: a lock that stays is seen to be a dead one's
            if (self._read() or {}).get("id") == self._me["id"]:
                self._file.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)

    def _living(self, holder: dict[str, Any] | None) -> dict[str, Any] | None:
        """The holder if it lives. One that would not be seen from here is watched."""
        if holder is None:
            return None
        if holder.get("place") == _place() and holder.get("started"):
            return holder if _started(holder["pid"]) == holder["started"] else None
        now, seconds = holder, BEATS_WATCHED * BEAT_SECONDS
        print(f"{self.run_dir} is locked by {_name(holder)}; looking for {seconds:.0f} s whether it lives", flush=True)
        end = time.monotonic() + seconds
        while now == holder and time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 15)
            now = self._read()
        if now == holder:
            print(f"Nothing was heard of {_name(holder)}: its lock is taken over", flush=True)
        return now if now != holder else None

    def _refuse(self, holder: dict[str, Any] | None) -> None:
        if holder is not None:
            raise BusyError(
                f"The run in {self.run_dir} is being trained by {_name(holder)}. Nothing was touched: wait until that "
                "process ends or stop it, or give another --run-dir."
            )

    def _beat(self) -> None:
        """Show that this process lives; end it if the run was taken over while it did not, suspended for minutes."""
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # whatever a disk or a bucket raises that is away for a while
                holder = self._read() or self._me
                if holder.get("id") != self._me["id"]:
                    what = f"{self.run_dir} was taken over by {_name(holder)}, for nothing was heard of this process"
                    print(f"mtp-jax: error: {what}. It ends; what is saved is complete.", file=sys.stderr, flush=True)
                    os._exit(1)
                self._me["beat"] += 1
                self._write()

    def _read(self) -> dict[str, Any] | None:
        try:
            values = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    def _write(self) -> None:
        replace_file(self._file, json.dumps(self._me))


def _name(holder: dict[str, Any]) -> str:
    return "process {} on host {}, since {}".format(*(holder.get(key, "?") for key in ("pid", "host", "since")))


def _place() -> str:
    """Where processes see each other: a boot of a machine, and there a container. Empty where that is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a living process was started, in ticks since the boot: numbers are given again. Empty if there is none."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else rest[18]
