"""Output that nobody reads any more, or that has no room: what is computed and stored goes on."""

import subprocess
import sys
import types

import pytest

from mtp_jax import cli
from mtp_jax.data.store import Store
from mtp_jax.output import safe_output
from support import REPOSITORY
from support.streams import GONE, gone


@pytest.mark.parametrize("target", ["/dev/full", "a pipe", "closed"])
def test_a_store_is_made_whoever_reads(tmp_path, target):
    (tmp_path / "a.txt").write_text("a small text|" * 5 + "|".join(map(str, range(50))))
    options = ["--source", f"{tmp_path}/a.txt", "--separator", "|", "--out", f"{tmp_path}/store", "--processes", "1"]
    shell = {"/dev/full": '"$@" > /dev/full 2>&1', "closed": '"$@" >&- 2>&-', "a pipe": '"$@" 2>&1 | true'}[target]
    command = [sys.executable, "-m", "mtp_jax", "data", "prepare", *options]
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {shell}", "-", *command], cwd=REPOSITORY)
    assert done.returncode == 0 and Store.open(tmp_path / "store").train.names


@pytest.fixture
def command(monkeypatch):
    """A function that runs a command of another's name, and returns its exit status."""

    def run(name, main):
        monkeypatch.setitem(sys.modules, "made_up", types.SimpleNamespace(main=main))
        monkeypatch.setitem(cli.COMMANDS, name, ("made_up", ""))
        try:
            cli.main([name])
        except SystemExit as end:
            return end.code
        return 0

    return run


@pytest.mark.parametrize("kind", GONE)
def test_the_status_is_that_of_the_command_whoever_reads(command, kind):
    def preempted(args):
        print("text")
        raise cli.PreemptedError("saved")

    def refused(args):
        raise cli.ConfigError("a mistake")

    with gone(kind):
        assert command("train", preempted) == 75 and command("sweep", preempted) == 75
        assert command("eval", refused) == command("data", refused) == 2


def test_what_a_terminal_does_not_have_is_escaped_and_nothing_else_is_lost(command, tmp_path, monkeypatch):
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert command("eval", lambda args: print("größe 模 \udce9 end")) == 0
    assert (tmp_path / "log").read_text() == "gr\\xf6\\xdfe \\u6a21 \\udce9 end\n"


@pytest.mark.parametrize("name, status", [("eval", 1), ("bench", 1), ("train", 0), ("data", 0)])
def test_results_that_a_full_disk_has_not_taken_are_not_done(command, name, status):
    with gone("full_disk"):
        assert command(name, lambda args: print("loss 1.5")) == status


@pytest.mark.parametrize("name, lines", [("generate", 1), ("eval", 1), ("bench", 3), ("sweep", 3)])
def test_only_what_does_nothing_but_print_ends_with_its_reader(command, name, lines):
    tried = []

    def main(args):
        for number in range(3):
            tried.append(number)
            print("text", flush=True)

    with gone("no_reader"):
        assert command(name, main) == 0
    assert len(tried) == lines


def test_what_has_room_again_is_printed(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        real, problems = stream.write, [OSError(28, "No space left on device")]
        kept = types.SimpleNamespace(write=lambda text: real(text) if not problems else _raise(problems.pop()))
        kept.flush = stream.flush
        before, sys.stdout = sys.stdout, kept
        try:
            with safe_output() as output:
                print("lost", end="")
                print("kept", end="")
                assert "No space" in str(output.lost)
        finally:
            sys.stdout = before
    assert (tmp_path / "log").read_text() == "kept"


def _raise(error):
    raise error
