"""One run, one writer: who is refused, who takes a dead one's lock over, and what a lock leaves alone."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from mtp_jax.commands.train import _what_is_there
from mtp_jax.runs import lock
from mtp_jax.runs.layout import clear_run
from mtp_jax.runs.lock import one_writer
from mtp_jax.runs.paths import LOCK, children
from mtp_jax.train import loop
from mtp_jax.validate import ConfigError
from support import REPOSITORY, tiny
from support.loop import FakeTrainer
from support.processes import Processes, experiment, metrics
from support.runs import on_disk

HOLD = """
import sys, time
from mtp_jax.runs.lock import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run_dir(tmp_path):
    return epath.Path(tmp_path / "run")


@pytest.fixture
def quick_beats(monkeypatch):
    """Beats that come soon: a watch takes half a second."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.12)


@contextlib.contextmanager
def seen_from_elsewhere(monkeypatch):
    """A context in which this process looks from another machine, or from another container."""
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_place", lambda: "elsewhere")
        yield


def write_lock(run_dir, **changes):
    """The lock of a process that is not seen from here, or as `changes` say."""
    run_dir.mkdir(exist_ok=True)
    values = {"host": "far", "pid": 7, "since": "noon", "beat": 3, "id": "other", "place": "there", "started": "1"}
    (run_dir / LOCK).write_text(json.dumps(values | changes))


def take(run_dir):
    with one_writer(run_dir):
        assert json.loads((run_dir / LOCK).read_text())["pid"] == os.getpid()


# The holder lives


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "options", [{}, {"resume": True}, {"overwrite": True}, {"overwrite": True, "unfinished": True}]
)
def test_a_second_start_of_any_kind_is_refused_and_the_first_goes_on(tmp_path, monkeypatch, options):
    run, link, seen = tmp_path / "run", tmp_path / "link", []
    link.symlink_to(run)
    config = tiny.text_run(tiny.text_data(tmp_path))

    def second():
        file = (run / "metrics.jsonl").stat().st_ino
        with pytest.raises(ConfigError) as refused:
            loop.train(config, link, **options)
        seen.append(str(refused.value))
        assert (run / "metrics.jsonl").stat().st_ino == file and not list(run.glob("lost-*"))

    monkeypatch.setattr(loop, "make_trainer", lambda config, **_: FakeTrainer(during={2: second, 6: second}))
    loop.train(config, run)
    assert on_disk(run) == [4, 8] and [r["step"] for r in metrics(run)] == list(range(1, 9))
    if options:  # without any it is told of the run that is there
        assert all(f"being trained by process {os.getpid()} on host" in said and "since" in said for said in seen), seen
    assert not list(run.glob(f"{LOCK}*"))


def test_of_many_starts_at_the_same_moment_one_goes_on(run_dir, monkeypatch):
    def read_slowly(self, read=lock._Lock._read):
        found = read(self)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(lock._Lock, "_read", read_slowly)
    held, refused, together, ended = [], [], threading.Barrier(8), threading.Barrier(8)

    def start():
        together.wait()
        try:
            with one_writer(run_dir):
                held.append(1)
                ended.wait(30)
        except ConfigError as error:
            refused.append(str(error))
            ended.wait(30)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7 and all(f"process {os.getpid()}" in said for said in refused)


def test_a_holder_elsewhere_that_is_heard_of_is_not_disturbed(run_dir, quick_beats, monkeypatch, capsys):
    with one_writer(run_dir):
        with seen_from_elsewhere(monkeypatch), pytest.raises(ConfigError, match=f"trained by process {os.getpid()} on"):
            take(run_dir)
        assert json.loads((run_dir / LOCK).read_text())["beat"] > 0
    assert "looking for" in capsys.readouterr().out and not run_dir.exists()


@pytest.mark.slow
def test_several_processes_have_one_lock_and_a_second_start_of_all_is_refused(root):
    file, options = (
        experiment(root, "many"),
        ("--steps", "100000", "--checkpoint-every", "100000", "--eval-every", "100000"),
    )
    with Processes(file, root / "many", *options) as first:
        first.wait_for_step(2)
        (root / "again").symlink_to(root / "many")
        with Processes(file, root / "again", "--overwrite") as second:
            assert second.wait() == [2, 2], second.said()
        pid = first.processes[0].pid
        assert all(f"trained by process {pid} on host" in second.said(i) for i in range(2)), second.said()
        first.wait_for_step(len(metrics(root / "many")) + 2)


# The holder is dead


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_holds_nothing(run_dir, reaped, capsys):
    process = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} on host"):
            take(run_dir)
    finally:
        process.kill()
        if reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    take(run_dir)
    process.wait()
    process.stdout.close()
    assert capsys.readouterr().out == "", "it is known at once"


def test_a_number_that_was_given_again_is_another_process(run_dir, capsys):
    write_lock(run_dir, pid=os.getpid(), place=lock._place(), started="1")
    take(run_dir)
    assert capsys.readouterr().out == "", "it is known at once"


def test_a_silent_lock_of_another_machine_is_taken_over_with_a_word(run_dir, quick_beats, capsys):
    write_lock(run_dir)
    take(run_dir)
    assert "Nothing was heard of process 7 on host far, since noon: its lock is taken over" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "17", "{}"])
def test_a_lock_that_is_half_there_is_in_nobodys_way(run_dir, quick_beats, text):
    run_dir.mkdir()
    (run_dir / LOCK).write_text(text)
    take(run_dir)


def test_a_process_that_was_suspended_ends_when_its_run_was_taken_over(run_dir, quick_beats, monkeypatch, capsys):
    ended = threading.Event()

    def end(status):
        assert status == 1
        ended.set()
        raise OSError

    monkeypatch.setattr(os, "_exit", end)
    with one_writer(run_dir):
        write_lock(run_dir)
        assert ended.wait(10)
    assert json.loads((run_dir / LOCK).read_text())["host"] == "far", "the other's lock stays"
    assert "was taken over by process 7 on host far" in capsys.readouterr().err


# What a lock leaves alone


def test_a_lock_is_no_content_of_a_run(run_dir):
    with one_writer(run_dir / "deep"):
        assert children(run_dir / "deep") == [] and _what_is_there(str(run_dir / "deep"))["resume"] is False
        clear_run(run_dir / "deep")
        with pytest.raises(ConfigError):
            take(run_dir / "deep")
    assert not run_dir.exists(), "folders that were made for it alone"


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    config = tiny.text_run(tiny.text_data(tmp_path), init_from=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        loop.train(config, tmp_path / "a/run")
    assert not (tmp_path / "a").exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/file/run cannot be written")):
        take(epath.Path(tmp_path / "file/run"))


BUCKET = """
import threading, time
from etils import epath
from mtp_jax.runs import lock
from mtp_jax.validate import ConfigError

lock.BEAT_SECONDS = 1.5
run_dir, together, ended, held, refused = epath.Path("gs://bucket/runs/locked"), *map(threading.Barrier, (2, 2)), [], []

def start():
    together.wait()
    try:
        with lock.one_writer(run_dir):
            held.append(1)
            ended.wait(60)
    except ConfigError as error:
        refused.append(str(error))
        ended.wait(60)

threads = [threading.Thread(target=start) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(held) == len(refused) == 1 and "is being trained by process" in refused[0], (held, refused)
assert not lock._Lock(run_dir)._file.exists()
with lock.one_writer(run_dir):
    lock._place = lambda: "elsewhere"
    try:
        lock._Lock(run_dir).take()
        raise SystemExit("a living holder was not seen")
    except ConfigError as error:
        print(error)
"""


def test_a_bucket_has_one_writer_too_be_it_asked_at_the_same_moment_or_from_elsewhere(here):
    status, said = here.run("-c", BUCKET)
    assert status == 0 and "looking for 6 s" in said, said
    assert not here.bucket.unknown and not [name for name in here.bucket.objects if "locked" in name]
