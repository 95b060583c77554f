"""Commands in processes of their own, and the JSON that they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NoReturn

from support import REPOSITORY


def user(*args: object) -> str:
    """What `mtp-jax` prints in a process of its own, where it must succeed."""
    command = [sys.executable, "-m", "mtp_jax", *map(str, args)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refuse(constant: str) -> NoReturn:
    """Infinities and NaN, which strict JSON has not."""
    raise ValueError(f"{constant} is not JSON")


def last_line(output: str) -> Any:
    """The last line, which is strict JSON."""
    return json.loads(output.splitlines()[-1], parse_constant=refuse)
