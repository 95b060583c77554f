"""Speed: what counts as training, and what takes no time."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from mtp_jax.mesh import make_mesh
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.train import clock, loop
from mtp_jax.train.costs import Costs, costs
from mtp_jax.train.loggers import read_metrics
from mtp_jax.train.session import TrainSession
from mtp_jax.train.signals import StopSignals
from support.loop import FakeTrainer

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def now(monkeypatch):
    """The time, in seconds, as a list of one number that only the test changes; each device can do 1000 FLOP/s."""
    now = [100.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(clock, "peak_flops", lambda device: 1000.0)
    return now


def make_clock(config):
    cost = Costs(0, 0, 0, trunk_flops=30.0, head_flops=20.0, plain_flops=35.0)
    made = clock.Clock()
    return made, lambda step: clock.Speedometer(made, step, config, cost, make_mesh(config.mesh))


def test_speed_is_that_of_the_steps_since_the_last_record(config, now):
    made, start = make_clock(config)
    with made.losing("compiling"):
        now[0] += 10
    speed = start(4)
    now[0] += 2
    # 128 tokens of 50 FLOPs in 2 seconds, on 8 devices; 10 of 12 seconds were lost.
    expected = {"tokens": 5 * 128, "tokens_per_second": 64, "mfu": 64 * 50 / 8000, "compile_seconds": 10}
    assert speed.read(5) == {**expected, "goodput": pytest.approx(2 / 12), "memory_gib": None}
    now[0] += 1
    with made.losing("evaluating"):
        now[0] += 30
    with made.losing("evaluating"):
        now[0] += 5
    with made.losing("waiting for data", stops=False):  # the devices go on
        now[0] += 2
    now[0] += 1
    expected = {"tokens": 9 * 128, "tokens_per_second": 128, "mfu": 128 * 50 / 8000, "compile_seconds": None}
    assert speed.read(9) == {**expected, "goodput": pytest.approx(4 / 51), "memory_gib": None}
    now[0] += 1
    assert set(speed.read(9)) == {"tokens", "goodput", "memory_gib", "compile_seconds"}, "no step, no speed"
    now[0] += 1
    assert speed.read(10)["tokens_per_second"] == 64
    assert made.lost == {"compiling": 10, "evaluating": 35, "waiting for data": 2}
    assert made.summary() == "goodput 11.3% of 53.0 s; lost: evaluating 35.0, compiling 10.0, waiting for data 2.0 s"


def test_a_device_that_says_so_tells_its_memory_and_one_whose_peak_is_not_known_has_no_mfu(config, now, monkeypatch):
    monkeypatch.setattr(clock, "peak_flops", lambda device: None)
    _, start = make_clock(config)
    speed = start(0)
    speed.device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**29})
    now[0] += 1
    found = speed.read(1)
    assert found["tokens_per_second"] == 128 and found["mfu"] is None and found["memory_gib"] == 1.5


def test_a_phase_is_told_to_the_watchdog_and_lost_to_the_clock_even_if_it_fails(now):
    places = []
    watchdog = SimpleNamespace(at=lambda what, step, patient: places.append((what, step, patient)))
    session = TrainSession(clock.Clock(), StopSignals(), watchdog)
    with session.phase("saving", 3):
        now[0] += 4
    with pytest.raises(OSError), session.phase("evaluating", 3, patient=False):
        now[0] += 2
        raise OSError
    assert places == [("saving", 3, True), ("evaluating", 3, False)]
    assert session.clock.lost == {"saving": 4, "evaluating": 2} and session.clock.stopped == 6


@pytest.mark.parametrize("log_every", [1, 3])
def test_compiling_evaluating_and_saving_take_no_time(config, fake, tmp_path, now, monkeypatch, log_every):
    """On a device that works while the host goes on: compiling takes 40 s, a step 2, a held-out batch 25, a save 9."""
    save, fetch, done = CheckpointWriter.save, jax.device_get, [0.0]

    def work(seconds):
        done[0] = max(now[0], done[0]) + seconds
        return done[0]

    def wait(until):
        now[0] = max(now[0], until)

    def slow_save(*args):
        wait(work(9))
        return save(*args)

    def slow_fetch(tree):
        if isinstance(tree, dict) and "finished" in tree:
            wait(tree.pop("finished"))
        return fetch(tree)

    monkeypatch.setattr(CheckpointWriter, "save", slow_save)
    monkeypatch.setattr(jax, "device_get", slow_fetch)
    config = dataclasses.replace(config, log_every=log_every, eval_every=2)
    cost = costs(config, FakeTrainer().init().params)
    for steps, resume in ((5, False), (8, True)):
        trainer = fake()
        step, evaluate = trainer.step, trainer.evaluate

        def slow_step(state, batch, step=step):
            state, metrics = step(state, batch)
            return state, {**metrics, "finished": work(2)}

        def slow_evaluate(*args, evaluate=evaluate):
            wait(work(25))
            return evaluate(*args)

        def slow_compile(state, batch, trainer=trainer):
            wait(work(40))
            return trainer

        monkeypatch.setattr(trainer, "step", slow_step)
        monkeypatch.setattr(trainer, "evaluate", slow_evaluate)
        monkeypatch.setattr(trainer, "compile", slow_compile)
        loop.train(dataclasses.replace(config, steps=steps), tmp_path / "run", resume=resume)
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert [record["step"] for record in records] == ([1, 2, 3, 4, 5, 6, 7, 8] if log_every == 1 else [1, 3, 5, 6, 8])
    for record in records:
        assert record["tokens_per_second"] == pytest.approx(64)
        assert record["mfu"] == pytest.approx(64 * (cost.trunk_flops + cost.head_flops) / 8000)
        assert record.get("compile_seconds") == (40 if record["step"] in (1, 6) else None)
