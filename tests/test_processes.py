"""Workers end with their parent, however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mtp_jax.processes import ENDS_WITH_INPUT

PARENT = """
import concurrent.futures, multiprocessing, os, sys, time
from mtp_jax.data.preparation import _start_worker
from mtp_jax.train.forecast import _pretend

def busy(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    start, arguments = {"data": (_start_worker, ()), "forecast": (_pretend, (1, None))}[sys.argv[1]]
    pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, arguments)
    pool.submit(busy, 60).result()
"""


CHILD = """
import os, sys, time
from mtp_jax.processes import ENDS_WITH_INPUT, end_with_input
end_with_input()
print(os.getpid(), ENDS_WITH_INPUT in os.environ, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("killed", [True, False])
def test_who_has_a_pipe_of_its_parent_is_told_to_save_when_that_ends(killed):
    """A run of a sweep; what it starts itself is not told."""
    env = {**os.environ, ENDS_WITH_INPUT: "1"}
    command = [sys.executable, "-c", CHILD, "60" if killed else "0.5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as child:
        assert child.stdout.readline().split()[1] == "False"
        if killed:
            child.stdin.close()  # what the system does when a process ends
        assert child.wait(30) == (-signal.SIGTERM if killed else 0)


def test_other_processes_do_not_end_with_their_input():
    done = subprocess.run([sys.executable, "-c", CHILD, "0.5"], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "worker, number", [("data", signal.SIGKILL), ("data", signal.SIGHUP), ("forecast", signal.SIGKILL)]
)
def test_a_worker_ends_with_its_parent(tmp_path, worker, number):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, tmp_path / "parent.py", worker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(number)
        parent.wait()
        try:
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the worker outlives its parent")
