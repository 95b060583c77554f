"""The launcher of TPU VMs. Google's command is a stand-in that does on this machine what it does elsewhere."""

import shutil
import subprocess

import pytest

from support.launchers import LAUNCH, until

GCLOUD = """#!/usr/bin/env bash
# A slice of one worker, whose home is ./worker; ./slice holds its state.
echo "$*" >>calls
for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
case "$*" in
  *'queued-resources list'*) cat slice 2>/dev/null; sed -i s/PROVISIONING/ACTIVE/ slice 2>/dev/null; true ;;
  *'queued-resources create'*) [[ ! -e slice ]] && mkdir worker && echo PROVISIONING >slice ;;
  *'queued-resources delete'*) kill -KILL "$(cat worker/mtp_jax_job/pid)"; rm -r slice worker ;;
  *'tpu-vm scp'*) cp "$5" worker/mtp_jax.tar.gz ;;
  *'tpu-vm ssh'*) [[ $(cat slice) == ACTIVE ]] && cd worker && HOME=$PWD MEGASCALE_NUM_SLICES=4 bash -c "$command" ;;
  *'storage ls'*) ls "$RUNS" 2>/dev/null ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def tpu(box):
    """Launchers in a checkout of their own, which `install` packs."""
    box.command("gcloud", GCLOUD)
    box.command("sudo", '#!/usr/bin/env bash\n[[ ! -e "$PLANS/held" ]] || cat "$PLANS/held"\n')
    box.checkout = box.path / "checkout"
    shutil.copytree(LAUNCH, box.checkout / "launch")
    (box.checkout / ".gitignore").write_text("ignored\n")
    (box.checkout / "ignored").touch()
    subprocess.run(["git", "init", "--quiet", box.checkout], check=True)
    box.env |= {
        **{"TPU_NAME": "mine", "ZONE": "z", "ACCELERATOR_TYPE": "v6e-16", "RUNTIME_VERSION": "v2", "POLL": "0"},
        **{
            "RUN_DIR": "gs://bucket/runs/mine",
            "INSTALL": "touch installed",
            "SETUP": "ls installed >data",
            "RUNS": str(box.path / "runs"),
        },
    }
    return box


def tpu_vm(box, *args, **env):
    return box.run("tpu_vm.sh", *args, launch=box.checkout / "launch", **env)


def calls(box, what):
    return [line for line in (box.path / "calls").read_text().splitlines() if what in line]


def test_watch_creates_installs_runs_and_requeues_until_it_is_done(tpu):
    preempted = f"run=echo${{IFS}}SUSPENDED>{tpu.path}/slice forever"
    tpu.plan("75", preempted, "env=JAX_COMPILATION_CACHE_DIR env=MEGASCALE_NUM_SLICES env=MTP_JAX_COORDINATOR 0")
    status, output = tpu_vm(tpu, "watch", "--spot", "1", "--", "--steps", "5")
    assert status == 0, output
    assert tpu.tries() == 3 and len(calls(tpu, "create mine")) == 2 and len(calls(tpu, "delete mine")) == 1
    assert all("--spot" in line for line in calls(tpu, "create mine"))
    assert "the slice is SUSPENDED" in output and "restart 2 of 1000" in output and "costs money" in output
    worker = tpu.path / "worker"
    log = (worker / "mtp_jax_job" / "log").read_text()
    assert log.startswith("process 0 try 3 --auto-resume --steps 5\n")
    assert "CACHE_DIR is gs://bucket/runs/xla_cache\n" in log and "COORDINATOR is auto\n" in log
    assert "MEGASCALE_NUM_SLICES is \n" in log, "what an earlier slice left behind is gone"
    assert (worker / "mtp_jax" / "data").read_text() == "installed\n" and not (worker / "mtp_jax" / "ignored").exists()
    assert all("--worker=all" in line for line in calls(tpu, "tpu_worker.sh start") + calls(tpu, "scp"))


def test_watch_stops_when_the_run_fails(tpu):
    tpu.plan("1", "1", "1")
    status, output = tpu_vm(tpu, "watch", "--retries", "1")
    assert (status, tpu.tries()) == (1, 2) and "failure 2 in a row" in output
    assert not calls(tpu, "delete mine"), "nothing is deleted that may be looked at"


def test_watch_stops_when_installing_fails(tpu):
    assert tpu_vm(tpu, "watch", "--retries", "1", INSTALL="false")[0] == 1
    assert len(calls(tpu, "scp")) == 2 and tpu.tries() == 0


def test_run_logs_status_and_stop(tpu):
    tpu.plan("TERM=75 forever")
    for step in ("create", "install"):
        (tpu.path / "slice").exists() and (tpu.path / "slice").write_text("ACTIVE")
        assert tpu_vm(tpu, step)[0] == 0
    worker = ["bash", str(tpu.path / "worker" / "mtp_jax" / "launch" / "tpu_worker.sh")]
    env = tpu.env | {"HOME": str(tpu.path / "worker")}

    def state():
        return subprocess.run([*worker, "state"], env=env, capture_output=True, text=True).stdout.strip()

    (tpu.plans / "held").write_text(" 4711 4712\n")
    status, output = tpu_vm(tpu, "run")
    assert status == 1 and "the TPU is held by process 4711 4712; end it (ps -fp 4711,4712)" in output
    assert state() == "none"
    (tpu.plans / "held").unlink()
    assert tpu_vm(tpu, "run")[0] == 0
    tpu.ready()
    status, output = tpu_vm(tpu, "run")
    assert status == 1 and "the program runs already" in output and state() == "running"
    assert tpu_vm(tpu, "stop")[0] == 0
    assert tpu_vm(tpu, "stop")[0] == 0, "there is nothing left to stop"
    until(lambda: state() == "ended 75")
