"""Memory of a process: what a piece of code holds at most, beside what was there before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from support import REPOSITORY

BEGIN = """
import gc, json, sys, threading, time
import jax, jax.numpy as jnp
import mtp_jax, mtp_jax.runs.loading, mtp_jax.interop.importing, mtp_jax.interop.exporting
jnp.zeros(1).block_until_ready()

def held():
    gc.collect()
    return anonymous()

def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def sample():
    while True:
        seen.append(anonymous())
        time.sleep(0.002)

seen, begun = [], anonymous()
threading.Thread(target=sample, daemon=True).start()
"""
# What is freed goes back to the system at once: a heap that keeps it, as much as the threads happened to need, is not
# what the code holds.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measured(code: str, *args: Any, devices: int = 1) -> dict[str, int]:
    """Run Python in a process of its own and return bytes of anonymous memory: `peak`, beside what JAX needs by itself,
    and what the code puts into a dictionary `found`. It may call `held()`, and finds `args` in `sys.argv`."""
    end = "\nprint(json.dumps({'peak': max(seen) - begun, **found}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}\nfound = {{}}\n{code}{end}", *map(str, args)],
        cwd=REPOSITORY,
        env={**os.environ, **GIVEN_BACK, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
