"""Workers end with their parent, however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

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
