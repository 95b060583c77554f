"""Ctrl-C and notices at any instant: heard whatever the process does, and nothing is cut in half."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from mtp_jax.runs.layout import read_config
from mtp_jax.train import loop
from mtp_jax.validate import PreemptedError
from support import REPOSITORY
from support.loop import change, interrupt
from support.runs import contents, logged, on_disk

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Swallows:
    """As a callback of the garbage collector, or a C++ library: what is raised in it is lost."""

    def __del__(self):
        with contextlib.suppress(KeyboardInterrupt):
            interrupt()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_every_notice_saves_and_says_start_again(config, fake, tmp_path, number):
    fake(during={3: lambda: signal.raise_signal(number)})
    with pytest.raises(PreemptedError, match="Step 3 is saved"):
        loop.train(config, tmp_path / "run")
    assert on_disk(tmp_path / "run") == [3] and signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_what_is_ignored_stays_ignored(config, fake, tmp_path, number):
    """As `nohup` does with SIGHUP, and a shell with Ctrl-C for what it runs in the background."""
    fake(during={3: lambda: signal.raise_signal(number)})
    before = signal.signal(number, signal.SIG_IGN)
    try:
        loop.train(config, tmp_path / "run")
        assert on_disk(tmp_path / "run") == [4, 8] and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_notice_that_the_caller_hears_stays_the_callers(config, fake, tmp_path):
    heard = []
    fake(during={3: lambda: signal.raise_signal(signal.SIGUSR1)})
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        loop.train(config, tmp_path / "run")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] and on_disk(tmp_path / "run") == [4, 8]


@pytest.mark.parametrize("where", ["init", "compile"])
def test_an_interrupt_that_got_lost_before_the_first_step_is_remembered(config, fake, tmp_path, monkeypatch, where):
    """The old run, which would have been deleted then, is there."""
    fake()
    loop.train(config, tmp_path / "run")
    before, trainer = contents(tmp_path / "run"), fake()
    real = getattr(trainer, where)

    def interrupted(*args, **options):
        Swallows()
        return real(*args, **options)

    monkeypatch.setattr(trainer, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run", overwrite=True)
    assert trainer.events == [] and contents(tmp_path / "run") == before


def test_an_interrupt_while_the_old_run_gives_way_leaves_a_whole_new_one(config, fake, tmp_path, monkeypatch, capsys):
    fake()
    loop.train(config, tmp_path / "run")
    trainer, real = fake(), loop.write_run

    def interrupted(*args):
        interrupt()
        real(*args)

    monkeypatch.setattr(loop, "write_run", interrupted)
    other = change(config, "optimizer", learning_rate=0.5)
    with pytest.raises(KeyboardInterrupt):
        loop.train(other, tmp_path / "run", overwrite=True)
    assert "Nothing was saved yet; start again with --overwrite" in capsys.readouterr().out
    assert read_config(tmp_path / "run").optimizer.learning_rate == 0.5
    assert trainer.events == [] and on_disk(tmp_path / "run") == [] and logged(tmp_path / "run", "train") == []


STUCK = """
import multiprocessing, sys, time, types
from mtp_jax import cli

class Stuck:
    def __del__(self):
        try:
            print("stuck", file=sys.stderr, flush=True)
            time.sleep(60)
        except BaseException:
            time.sleep(60)

def main(args):
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    print("begun")
    Stuck()

if __name__ == "__main__":
    cli.COMMANDS["stuck"] = "stuck", ""
    sys.modules["stuck"] = types.SimpleNamespace(main=main)
    cli.main(["stuck"])
"""


def test_a_command_that_is_stuck_in_a_library_ends_with_its_children(tmp_path):
    (tmp_path / "stuck_command.py").write_text(STUCK)
    command = [sys.executable, str(tmp_path / "stuck_command.py")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr and process.stderr.readline() == "stuck\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            # What the child holds open ends only with it.
            assert process.communicate(timeout=20) == ("begun\n", "")
        finally:
            process.kill()
