"""The launchers of this machine: what becomes of programs that end, fail, hang or save."""

import re
import signal
import time

import pytest

from support.launchers import end, until

# When a run is started again


def test_status_75_is_started_again_until_it_is_done(box):
    box.plan("step=1 75", "75", "env=JAX_COMPILATION_CACHE_DIR 0")
    status, output = box.run("local.sh")
    assert (status, box.tries()) == (0, 3)
    assert f"JAX_COMPILATION_CACHE_DIR is {box.path}/.cache/mtp_jax/xla" in output
    assert "restart 1 of 1000, newest checkpoint 1" in output


def test_restarts_are_bounded(box):
    box.plan("75", "75", "75", "75")
    status, output = box.run("local.sh", "--max-restarts", "2")
    assert (status, box.tries()) == (75, 3) and "restarted 2 times (MAX_RESTARTS)" in output


def test_a_failure_stops_one_process_and_status_is_its_own(box):
    box.plan("3", "0")
    status, output = box.run("local.sh")
    assert (status, box.tries()) == (3, 1) and "failed with status 3, failure 1 in a row (RETRIES = 0)" in output


def test_failures_are_repeated_only_so_often_without_a_new_checkpoint(box):
    box.plan("1", "134", "step=9 1", "1", "1", "0")
    status, output = box.run("local.sh", "--retries", "2")
    assert (status, box.tries()) == (1, 5), output
    assert output.count("retry 1 of 2") == 2 and output.count("retry 2 of 2") == 2, "step 9 begins a new count"
    assert "failed with status 1, failure 3 in a row, newest checkpoint 9" in output


@pytest.mark.parametrize("status", [2, 126, 127, 130, 143])
def test_what_would_fail_the_same_again_is_not_repeated(box, status):
    box.plan(str(status), "0")
    assert box.run("local.sh", "--retries", "5")[0] == status and box.tries() == 1


def test_partial_checkpoints_are_no_progress(box):
    box.plan("step=2 1", "step=3.orbax-checkpoint-tmp 1", "1")
    output = box.run("local.sh", "--retries", "1")[1]
    assert box.tries() == 2 and "failure 2 in a row, newest checkpoint 2" in output


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_reaches_the_program_and_nothing_starts_again(box, name):
    box.plan(f"{name}=75 forever", "0")
    launcher = box.start("local.sh", "--retries", "3")
    box.ready()
    launcher.send_signal(getattr(signal, f"SIG{name}"))
    status, output = end(launcher)
    assert (status, box.tries()) == (75, 1) and f"process 0 got {name}" in output


def test_a_closed_terminal_saves(box):
    box.plan("TERM=75 forever")
    launcher = box.start("local.sh")
    box.ready()
    launcher.send_signal(signal.SIGHUP)
    assert end(launcher)[0] == 75


# Several processes


def test_processes_are_told_who_they_are(box):
    words = "env=MTP_JAX_COORDINATOR env=MTP_JAX_NUM_PROCESSES env=MTP_JAX_PROCESS_ID env=CUDA_VISIBLE_DEVICES"
    for i in range(3):
        box.plan(f"{words} env=JAX_PLATFORMS 0", process=i)
    status, output = box.run("local_multi.sh", "--processes", "3", "--devices", "gpu", "--", "--steps", "4")
    assert status == 0
    logs = [box.log(i) for i in range(3)]
    until(lambda: box.log(0) == output)
    addresses = {re.search(r"COORDINATOR is (127\.0\.0\.1:2\d{4})\n", log)[1] for log in logs}
    assert len(addresses) == 1
    for i, log in enumerate(logs):
        assert log.startswith(f"process {i} try 1 --auto-resume --steps 4\n")
        assert "NUM_PROCESSES is 3\n" in log and f"PROCESS_ID is {i}\n" in log
        assert f"CUDA_VISIBLE_DEVICES is {i}\n" in log and "JAX_PLATFORMS is \n" in log
    assert "process 1" not in output, "only process 0 is on the terminal"


def test_on_the_cpu_no_gpu_is_touched(box):
    box.plan("env=JAX_PLATFORMS 0")
    assert "JAX_PLATFORMS is cpu" in box.run("local_multi.sh", "--processes", "1")[1]


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        (["0", "0"], 0),
        (["75", "75"], 75),
        (["0", "75"], 75),
        (["after=0.6 134", "7"], 7),
        (["9", "after=0.6 134"], 9),
        (["75", "after=0.6 1"], 1),
        (["0", "3"], 3),
    ],
)
def test_the_status_of_several(box, plans, expected):
    for i, plan in enumerate(plans):
        box.plan(plan, process=i)
    assert box.run("local_multi.sh", "--retries", "0", "--max-restarts", "0")[0] == expected


def test_several_are_started_again_together_with_logs_appended(box):
    box.plan("step=3 75", "0")
    box.plan("75", "0", process=1)
    status, output = box.run("local_multi.sh")
    assert status == 0 and "restart 1 of 1000, newest checkpoint 3" in output
    for i in range(2):
        until(lambda i=i: "try 2" in box.log(i))
        assert [line.split(" --")[0] for line in box.log(i).splitlines()] == [f"process {i} try {n}" for n in (1, 2)]


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_reaches_all(box, name):
    for i in range(3):
        box.plan(f"{name}=75 forever", "0", process=i)
    launcher = box.start("local_multi.sh", "--processes", "3")
    box.ready(3)
    launcher.send_signal(getattr(signal, f"SIG{name}"))
    assert end(launcher)[0] == 75
    assert all(f"process {i} got {name}" in box.log(i) and box.tries(i) == 1 for i in range(3))


def test_the_others_have_time_to_end_and_are_killed_after_it(box):
    box.plan("after=1 134")
    box.plan("after=0.3 7", process=1)
    box.plan("deaf forever", process=2)
    begun = time.monotonic()
    status, output = box.run("local_multi.sh", "--processes", "3", "--grace", "2", "--retries", "0")
    assert status == 7 and time.monotonic() - begun > 2
    assert "process 0 ended with status 134" in output, "it ended by itself"
    assert "process 2 has not ended in 2 s (GRACE): killed" in output and "process 2 ended with status 137" in output
