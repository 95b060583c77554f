"""Real runs that are killed, preempted and started again end as if nothing had happened."""

import contextlib
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from etils import epath

import mtp_jax
from mtp_jax.commands.train import _what_is_there
from mtp_jax.runs.manifest import seal, sealed_steps
from mtp_jax.state import split
from support.processes import Processes, experiment, losses, metrics


def parameters(run_dir):
    return jax.device_get(split(mtp_jax.load(run_dir).model)[1])


def assert_same_run(run_dir, straight):
    """Bit for bit: the parameters, and every loss on the way."""
    assert losses(run_dir) == losses(straight)
    assert [r["step"] for r in metrics(run_dir)] == [r["step"] for r in metrics(straight)]
    jax.tree.map(np.testing.assert_array_equal, parameters(run_dir), parameters(straight))


def survive(file, run_dir, kills, steps, options):
    """Start the command again and again, and kill it `kills` times: while it starts, trains, saves, or cleans up.

    A kill comes after a time that is drawn, or at a step that is drawn from its share of the steps, whichever comes
    first: however fast the machine, no run ends before its kill.
    """
    dice = random.Random(0)
    for number in range(kills):
        before = metrics(run_dir)
        with Processes(file, run_dir, "--auto-resume", *options, count=1) as one:
            (process,) = one.processes
            last = int(steps * (number + dice.uniform(0.3, 1)) / (kills + 1))
            starting = number % 4 == 0
            wait, start = dice.uniform(0, 8 if starting else 1.5), time.monotonic()
            while time.monotonic() < start + wait and process.poll() is None:
                time.sleep(0.01)
                lines = metrics(run_dir)
                if lines != before and lines and lines[-1]["step"] >= last:
                    time.sleep(dice.uniform(0, 0.05))
                    break
                if not starting and len(lines) <= len(before):
                    start = time.monotonic()
            assert process.poll() is None, one.said()
            process.send_signal(signal.SIGKILL)
    with Processes(file, run_dir, "--auto-resume", *options, count=1) as one:
        assert one.wait() == [0], one.said()


@pytest.mark.parametrize("kills, steps", [(1, 200), pytest.param(30, 8000, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_was_not(root, kills, steps):
    file = experiment(root, f"killed{kills}", grad_accumulation=2)
    options = ["--steps", str(steps), "--eval-every", "40", "--checkpoint-every", "20", "--log-every", "10"]
    with Processes(file, root / f"straight{kills}", *options, count=1) as one:
        assert one.wait(600) == [0], one.said()
    survive(file, root / f"killed{kills}", kills, steps, options)
    assert_same_run(root / f"killed{kills}", root / f"straight{kills}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(root, number, status):
    """Twice: at some step, and at a later one. (A signal in an evaluation: `test_signals`.)"""
    name = f"signal{status}"
    file = experiment(root, name)
    straight, run_dir = root / f"{name}-straight", root / name
    options = ["--steps", "400", "--checkpoint-every", "100000", "--eval-every", "40"]
    with Processes(file, straight, *options, count=1) as one:
        assert one.wait() == [0], one.said()
    stopped = []
    for least in (10, 40):
        with Processes(file, run_dir, "--auto-resume", *options, count=1) as one:
            one.wait_for_step(least)
            one.processes[0].send_signal(number)
            assert one.wait(60) == [status], one.said()
            (step,) = sealed_steps(run_dir / "checkpoints")[-1:]
            assert f"Step {step} is saved in {run_dir}; go on with --resume" in one.said()
        stopped.append(step)
    assert 10 <= stopped[0] < stopped[1] < 400
    with Processes(file, run_dir, "--auto-resume", *options, count=1) as one:
        assert one.wait() == [0], one.said()
    assert_same_run(run_dir, straight)


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_with_75(root):
    """While it imports, initialises or compiles: as soon as that returns. Nothing was saved, so it starts again."""
    file = experiment(root, "early")
    for seconds in (3.0, 4.5):
        with Processes(file, root / "early", "--auto-resume", count=1) as one:
            path = root / "early.0.log"
            end = time.monotonic() + 60
            while "new run" not in path.read_text() and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(seconds / 10)
            with contextlib.suppress(ProcessLookupError):
                one.processes[0].send_signal(signal.SIGTERM)
            assert one.wait(60) in ([75], [0]), one.said()
            assert "Traceback" not in one.said()
    with Processes(file, root / "early", "--auto-resume", count=1) as one:
        assert one.wait() == [0], one.said()


def contents(run_dir):
    return {path.relative_to(run_dir): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_steps_that_lost_their_manifests_are_set_aside_and_the_run_starts_again(root):
    """All that their run left is there, as a run directory of its own."""
    file, run_dir = experiment(root, "unsealed"), root / "unsealed"
    with Processes(file, run_dir, count=1) as one:
        assert one.wait() == [0], one.said()
    learned, steps = parameters(run_dir), sealed_steps(run_dir / "checkpoints")
    assert len(steps) > 1
    for step in steps:
        (run_dir / f"checkpoints/{step}/manifest.json").unlink()
    before = contents(run_dir)
    with Processes(file, run_dir, "--auto-resume", "--steps", "5", count=1) as one:
        assert one.wait() == [0] and f"Steps {steps} of {run_dir} have no manifest.json" in one.said(), one.said()
        assert f"moved to {run_dir}/lost-1" in one.said()
    assert sealed_steps(run_dir / "checkpoints") == [5] and contents(run_dir / "lost-1") == before
    seal(epath.Path(run_dir / f"lost-1/checkpoints/{steps[-1]}"))
    jax.tree.map(np.testing.assert_array_equal, parameters(run_dir / "lost-1"), learned)


def test_what_a_kill_in_the_first_save_left_is_not_kept_unless_a_step_is_whole(tmp_path):
    def there():
        return _what_is_there(str(tmp_path / "run"))

    assert there() == {"resume": False, "overwrite": False}
    first = tmp_path / "run/checkpoints/5"
    (first / "params").mkdir(parents=True)
    assert there() == {"resume": False, "overwrite": True, "unfinished": True}
    first.rename(tmp_path / "run/checkpoints/5.orbax-checkpoint-tmp-0")
    assert there() == {"resume": False, "overwrite": True, "unfinished": True}
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/config.json").write_text("{}")
    assert there() == {"resume": False, "overwrite": True, "unfinished": True}
    first.mkdir(parents=True)
    seal(epath.Path(first))
    assert there() == {"resume": True, "overwrite": False}
