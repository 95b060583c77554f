"""Several real processes on this machine: they learn what one learns, stop together, and end when one is lost."""

import itertools
import re
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mtp_jax import distributed
from mtp_jax.config import MeshConfig
from mtp_jax.distributed import Distributed, Meetings, Watchdog, on_first
from mtp_jax.runs.manifest import sealed_steps
from mtp_jax.validate import ConfigError
from support.processes import Processes, experiment, losses, metrics


@pytest.fixture(scope="module")
def alone(root):
    """What one process learns in 20 steps."""
    with Processes(experiment(root, "alone"), root / "alone", count=1) as one:
        assert one.wait() == [0], one.said()
    return losses(root / "alone")


@pytest.fixture(scope="module")
def together(root):
    """What two processes learn, undisturbed; and what they said."""
    with Processes(experiment(root, "together"), root / "together", "--steps", "200") as two:
        assert two.wait() == [0, 0], two.said()
        return losses(root / "together"), [two.said(0), two.said(1)]


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_two_processes_learn_what_one_learns(root, alone, together):
    (train, evaluation), (first, second) = together
    assert_close((train[:20], evaluation[:4]), alone)
    assert "step 200/200" in first and ", 2 processes)" in first
    noise = re.compile(r"connecting to|Gloo|^Prepared|^\d*$")
    assert not [line for line in second.splitlines() if not noise.search(line)], "process 0 alone logs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, mesh",
    [
        (2, 2, MeshConfig(1, 2, 2)),
        (2, 1, MeshConfig(1, 1, 2)),  # both read the whole batch
        (4, 1, MeshConfig(2, 2, 1)),
    ],
)
def test_any_processes_learn_what_one_learns_and_others_go_on(root, alone, count, devices, mesh):
    """Saved by these, gone on with by one, and then by two."""
    name = f"{count}x{devices}-{mesh.data}-{mesh.fsdp}-{mesh.tensor}"
    file = experiment(root, name, mesh)
    with Processes(file, root / name, count=count, devices=devices) as some:
        assert some.wait() == [0] * count and f", {count} processes)" in some.said(0), some.said()
    assert_close(losses(root / name), alone)
    for others, steps in ((1, 22), (2, 24)):
        options = ["--resume", "--steps", str(steps), "--mesh.data", "-1", "--mesh.fsdp", "1", "--mesh.tensor", "1"]
        with Processes(file, root / name, *options, count=others) as some:
            assert some.wait() == [0] * others and f"resuming at step {steps - 2}" in some.said(0), some.said()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_to_one_stops_all_at_one_step_and_the_same_command_goes_on(root, together, number):
    run_dir, file = root / f"preempted-{number}", experiment(root, f"preempted-{number}")
    with Processes(file, run_dir, "--auto-resume", "--steps", "200") as two:
        two.wait_for_step(6)
        two.processes[1].send_signal(number)
        assert two.wait() == [75, 75], two.said()
        (step,) = {int(n) for i in range(2) for n in re.findall(r"Preempted\. Step (\d+) is saved", two.said(i))}
        assert 6 <= step == max(sealed_steps(run_dir / "checkpoints")) < 200
    with Processes(file, run_dir, "--auto-resume", "--steps", "200") as two:
        assert two.wait() == [0, 0] and f"resuming at step {step}" in two.said(0), two.said()
    assert losses(run_dir) == together[0], "the same bits"


@pytest.mark.slow
@pytest.mark.parametrize("number, lost", [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_lost_process_ends_the_others_and_the_same_command_goes_on(root, alone, number, lost):
    """Killed, or stopped so that it lives and says nothing."""
    name = f"lost-{number}-{lost}"
    file = experiment(root, name)
    options = ["--auto-resume", "--distributed.lost-seconds", "8", "--steps", "100000", "--log-every", "20"]
    with Processes(file, root / name, *options) as two:
        two.wait_for_step(20)
        two.processes[lost].send_signal(number)
        begun, other = time.monotonic(), two.processes[1 - lost]
        status = other.wait(timeout=60)
        assert time.monotonic() - begun < 60
        if lost == 0 and status == -signal.SIGABRT:  # JAX saw it first: process 0 is where all of them are connected
            assert "the leader task was preempted/died" in two.said(1), two.said()
        else:
            assert status == 1, two.said()
            assert f"nothing was heard of process {lost} of 2 (host " in two.said(1 - lost), two.said()
    saved = max(sealed_steps(root / name / "checkpoints"))
    with Processes(file, root / name, "--auto-resume", "--steps", str(saved + 5)) as two:
        assert two.wait() == [0, 0] and f"resuming at step {saved}" in two.said(0), two.said()


@pytest.mark.slow
def test_a_save_that_fails_on_one_process_fails_on_all_and_training_goes_on(root, alone):
    """The system forbids one process larger files, for a while."""
    run_dir, file = root / "full", experiment(root, "full", MeshConfig(1, 2, 1))
    with Processes(file, run_dir, "--steps", "120", "--eval-every", "20", "--checkpoint-every", "20") as two:
        two.wait_for_step(25)
        before = resource.prlimit(two.processes[1].pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        while not (failed := re.findall(r"Step (\d+) was not saved in .*\n", two.said(0))):
            assert all(p.poll() is None for p in two.processes), two.said()
            time.sleep(0.05)
        resource.prlimit(two.processes[1].pid, resource.RLIMIT_FSIZE, before)
        assert two.wait() == [0, 0], two.said()
        assert re.search(r"was not saved in .*File too large.* \(process 1 of 2, host .*\)\.\n", two.said(0)), (
            two.said()
        )
        assert two.said().count("was not saved in") == len(set(failed)), "process 0 alone says it"
    assert_close((losses(run_dir)[0][:20],), (alone[0],))
    assert [r["step"] for r in metrics(run_dir)] == list(range(1, 121)), "no step was lost"
    steps = sealed_steps(run_dir / "checkpoints")
    assert steps[-1] == 120 and not {int(step) for step in failed} & set(steps)
    assert sorted(map(str, steps)) == sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# One process plays the parts


class Store:
    """What the processes' runtime keeps for them."""

    def __init__(self):
        self.values, self.barriers, self.lock = {}, {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def blocking_key_value_get(self, key, timeout):
        return self.values[key]

    def wait_at_barrier(self, key, timeout):
        with self.lock:
            barrier = self.barriers.setdefault(key, threading.Barrier(3))
        barrier.wait(timeout / 1000)


@pytest.fixture
def play(monkeypatch):
    """A function that makes this process the i-th of three, with one store, and the clock as a list."""
    import jax

    store, now = Store(), [0.0]
    monkeypatch.setattr(distributed, "_client", lambda: store)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])

    def be(i, **options):
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(jax, "process_index", lambda: i)
        ended = []
        return Watchdog(Distributed(**options), ended.append), ended

    return be, now, store


def test_a_silent_process_is_named(play):
    be, now, _ = play
    (first, ended), (second, _), (third, _) = be(0), be(1), be(2)
    for _ in range(5):
        now[0] += 8
        for one in (first, second, third):
            one._beat()
        first._judge()
    assert not ended
    for _ in range(5):
        now[0] += 8
        for one in (first, third):
            one._beat()
        first._judge()
    assert re.fullmatch(r"nothing was heard of process 1 of 3 \(host .*\) for 32 s", ended[0])


def test_a_process_that_never_spoke_is_named(play):
    be, now, _ = play
    (first, ended), (second, _) = be(0), be(1)
    for _ in range(5):
        now[0] += 8
        for one in (first, second):
            one._beat()
        first._judge()
    assert ended[0] == "nothing was heard of process 2 of 3 (host not known) for 32 s"


def test_the_process_that_keeps_what_all_say_is_named_when_it_is_gone(play, monkeypatch):
    be, now, store = play
    (first, _), (second, ended) = be(0), be(1)
    first._beat()
    second._beat()
    monkeypatch.setattr(store, "key_value_set", lambda *args, **options: 1 / 0)
    for _ in range(4):
        now[0] += 8
        second._beat()
        second._judge()
    assert re.fullmatch(r"nothing was heard of process 0 of 3 \(host .*\) for 32 s", ended[0])


def test_the_process_that_all_wait_for_is_named(play):
    be, now, _ = play
    everyone = [be(i, stalled_seconds=100) for i in range(3)]
    for i, (one, _) in enumerate(everyone):
        one.at("training" if i != 2 else "evaluating", 7 if i != 2 else 6)
    for _ in range(13):
        now[0] += 8
        for one, _ in everyone:
            one._beat()
        everyone[0][0]._judge()
    (message, *_) = everyone[0][1]
    assert "no step was made for 104 s" in message and "process 2 of 3" in message.split("behind the others:")[1]
    assert "evaluating at step 6 for" in message and "process 0 of 3" not in message.split("behind the others:")[1]


def test_what_may_take_long_is_waited_for(play):
    be, now, _ = play
    (one, ended), *others = [be(i, stalled_seconds=100) for i in range(3)]
    one.at("compiling", 0, patient=True)
    for _ in range(100):
        now[0] += 8
        for watchdog in (one, *(other for other, _ in others)):
            watchdog._beat()
        one._judge()
    assert not ended


def test_what_the_first_process_decides_holds_for_all(play):
    be, _, _ = play

    def refuse():
        raise ConfigError("no such run")

    for decide, expected in ((lambda: {"resume": True}, {"resume": True}), (refuse, None)):
        number = next(distributed._numbers)
        for i in range(3):
            be(i)
            distributed._numbers = iter([number + 1])
            if expected is None:
                with pytest.raises(ConfigError, match="no such run"):
                    on_first(decide if i == 0 else pytest.fail)
            else:
                assert on_first(decide if i == 0 else pytest.fail) == expected
        distributed._numbers = itertools.count(number + 2)


@pytest.mark.parametrize("failing", [{}, {1: 0}, {1: 1}, {0: 2}, {0: 1, 2: 1}, {0: 0, 2: 1}, {0: 3, 1: 3, 2: 3}])
def test_who_fails_between_meetings_fails_all_at_the_next(play, monkeypatch, failing):
    """By process: after how many of three meetings it fails, if it does. Nobody waits for one that does not come."""
    import jax

    be, _, _ = play
    be(0)
    here = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: here.i)
    meetings = []
    for _ in range(3):
        monkeypatch.setattr(distributed, "_numbers", iter([7]))
        meetings.append(Meetings())

    def work(i):
        here.i = i
        try:
            for number in range(3):
                if failing.get(i) == number:
                    raise OSError(f"no room at {i}")
                meetings[i].meet(10)
            return "done"
        except Exception as error:
            return str(meetings[i].failed(str(error), 10))

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(work, range(3)))
    first = min(failing.values(), default=3)
    blamed = [i for i, number in failing.items() if number == first and first < 3]
    if not blamed:
        assert ended == ["done"] * 3
    for i in range(3) if blamed else ():
        assert f"no room at {i if i in blamed else blamed[0]} (process " in ended[i], ended


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_processes=2), "no coordinator is given"),
        (dict(process_id=0), "no coordinator is given"),
        (dict(coordinator="host"), "'host'; it must be HOST:PORT"),
        (dict(coordinator="host:80"), "process-id is -1 and num-processes is 0"),
        (dict(coordinator="host:80", num_processes=2, process_id=2), "process-id is 2 and num-processes is 2"),
        (dict(coordinator="auto", num_processes=2), "process-id is -1"),
        (dict(lost_seconds=0), "lost_seconds is 0"),
    ],
)
def test_a_process_that_does_not_know_which_it_is_is_refused(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Distributed(**options)


def test_the_launcher_speaks_through_the_environment(monkeypatch):
    assert Distributed.from_environment() == Distributed()
    for name, value in {"COORDINATOR": "a:1", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"MTP_JAX_{name}", value)
    assert Distributed.from_environment() == Distributed("a:1", 4, 3)
    monkeypatch.setenv("MTP_JAX_PROCESS_ID", "x")
    with pytest.raises(ConfigError, match=r"\$MTP_JAX_PROCESS_ID is 'x'"):
        Distributed.from_environment()
