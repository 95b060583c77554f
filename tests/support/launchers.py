"""The launchers, and a stand-in for the program that they start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SWEEPS = ["sweep.sbatch", "gke_sweep.sh"]
SCRIPTS = ["local.sh", "local_multi.sh", "slurm.sbatch", "tpu_vm.sh", "gke.sh", *SWEEPS]
MANIFESTS = ["gke.yaml", "gke_sweep.yaml"]
FILES = [*SCRIPTS, "common.sh", "gke_common.sh", "tpu_worker.sh"]
DIRECTORY = {name: "SWEEP_DIR" if name in SWEEPS else "RUN_DIR" for name in SCRIPTS}
REQUIRED = {name: ["EXPERIMENT", DIRECTORY[name]] for name in SCRIPTS}
REQUIRED["tpu_vm.sh"] = ["TPU_NAME", "ZONE"]
for _name in ("gke.sh", "gke_sweep.sh"):
    REQUIRED[_name] = ["JOB_NAME", "IMAGE", *REQUIRED[_name]]
SUBCOMMAND = {"tpu_vm.sh": ["run"], "gke.sh": ["apply"], "gke_sweep.sh": ["apply"]}

PROGRAM = """#!/usr/bin/env bash
# Stand-in for mtp-jax: does line n of $PLANS/<process> the nth time it is started, and exits with the last word of it.
me=${MTP_JAX_PROCESS_ID:-0}
n=$(($(cat "$PLANS/tries.$me" 2>/dev/null || echo 0) + 1))
echo "$n" >"$PLANS/tries.$me"
while [[ $1 != --run-dir ]]; do shift; done
echo "process $me try $n ${*:3}"
for word in $(sed -n "${n}p" "$PLANS/$me"); do
  case $word in
    step=*) mkdir -p "$2/checkpoints/${word#*=}" ;;
    env=*) name=${word#*=} && echo "$name is ${!name}" ;;
    run=*) eval "${word#*=}" ;;
    TERM=*|INT=*) trap "echo process $me got ${word%=*}; exit ${word#*=}" "${word%=*}" ;;
    deaf) trap '' TERM INT ;;
    forever) touch "$PLANS/ready.$me"; for _ in {1..1200}; do sleep 0.05; done; exit 99 ;;
    after=*) sleep "${word#*=}" ;;
    *) exit "$word" ;;
  esac
done
"""


class Box:
    """A directory with the stand-in program, its plans, and a PATH that other stand-ins can be put on."""

    def __init__(self, path: Path):
        self.path, self.plans, self.run_dir, self.bin = path, path / "plans", path / "runs" / "mine", path / "bin"
        self.started: list[subprocess.Popen] = []
        for folder in (self.plans, self.bin):
            folder.mkdir()
        self.command("program", PROGRAM)
        self.env = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(path),
            "PLANS": str(self.plans),
            "EXPERIMENT": "experiment.py",
            "RUN_DIR": str(self.run_dir),
            "MTP_JAX_PROGRAM": str(self.bin / "program"),
            "RESTART_DELAY": "0",
        }

    def command(self, name: str, text: str) -> None:
        """Put a script of this name on the PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def plan(self, *lines: str, process: int = 0) -> None:
        """What a process does the first time it is started, the second time, and so on."""
        (self.plans / str(process)).write_text("\n".join(lines) + "\n")

    def tries(self, process: int = 0) -> int:
        """How often the program was started."""
        file = self.plans / f"tries.{process}"
        # A shell makes the file before it writes the number.
        return int(file.read_text() or 0) if file.exists() else 0

    def start(self, script: str, *args: str, launch: Path = LAUNCH, **env: str) -> subprocess.Popen:
        """A launcher that goes on while the test does."""
        command = ["bash", str(launch / script), *args]
        # A session of its own, so that nothing is signalled but what the launcher signals.
        launcher = subprocess.Popen(
            command,
            cwd=self.path,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(launcher)
        return launcher

    def close(self) -> None:
        """Kill what a failed test left running, so that it fails alone."""
        for launcher in self.started:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
            end(launcher)

    def run(self, script: str, *args: str, **options: Any) -> tuple[int, str]:
        """(status, output) of a launcher that ends by itself."""
        return end(self.start(script, *args, **options))

    def ready(self, processes: int = 1) -> None:
        """Wait until so many processes are where their plan says `forever`."""
        until(lambda: all((self.plans / f"ready.{i}").exists() for i in range(processes)))

    def log(self, process: int) -> str:
        """What one of several processes said."""
        return (self.path / "logs" / "mine" / f"process-{process}.log").read_text()


def end(process: subprocess.Popen, timeout: float = 60) -> tuple[int, str]:
    """(status, output) of a launcher, once it ends."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def until(what: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "this does not happen"
        time.sleep(0.02)


def dry(script: str, *args: str, **env: str) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a launcher in an environment of nothing but `env`."""
    done = subprocess.run(
        ["/usr/bin/env", "-i", *(f"{k}={v}" for k, v in env.items()), "bash", str(LAUNCH / script), *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
    )
    return done.returncode, done.stdout, done.stderr


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.lower().replace("_", "-")


def documented(script: str) -> list[str]:
    """The settings that the head of a script lists."""
    head = dry(script, "--help")[1]
    return re.findall(r"^  ([A-Z][A-Z0-9_]+)  *\S", head, re.MULTILINE)
