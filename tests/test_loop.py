"""The loop: what it writes and when, and that whatever stops it leaves a run that goes on.

Most tests give the loop a trainer that takes no time, so that they see the loop and nothing else.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

import mtp_jax
from mtp_jax import manifest
from mtp_jax.checkpoint import CheckpointError, Checkpoints
from mtp_jax.config import (
    ConfigError,
    MeshConfig,
    PreemptedError,
    ProfileConfig,
)
from mtp_jax.data import ByteTokenizer, batches, held_out_batches
from mtp_jax.data.sources import is_held_out
from mtp_jax.mesh import make_mesh
from mtp_jax.run_dir import read_config, set_aside, versions, write_config
from mtp_jax.train import checks, clock, loop
from mtp_jax.train.checks import RESUMABLE
from mtp_jax.train.costs import Costs, costs
from mtp_jax.train.evaluate import evaluate, evaluate_run, named
from mtp_jax.train.loggers import read_metrics
from mtp_jax.train.step import TrainState

WINDOW, RANK = 3, 2


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What is looked at here is the loop; faster code would take longer to compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 8 steps, saved and evaluated every 4."""
    root = tmp_path_factory.mktemp("data")
    return tiny.text_run(tiny.text_data(root), mesh=MeshConfig(2, 2, 2))


class FakeTrainer:
    """Steps that take no time. The loss of step n is n, or what `metrics` says; `during[n]` is called in step n."""

    def __init__(self, metrics=None, during=None):
        self.metrics, self.during, self.events = metrics or {}, during or {}, []

    def init(self):
        return self.state(0)

    def state(self, step):
        params = {name: jnp.full(2, step, jnp.float32) for name in ("blocks", "norm", "head", "embed_VD")}
        return TrainState(jnp.asarray(step, jnp.int32), params, {"moment": jnp.full(2, -step, jnp.float32)})

    def step(self, state, batch):
        n = int(state.step) + 1
        self.events.append(f"step {n}")
        self.during.get(n, lambda: None)()
        metrics = {"loss": n, "loss_offset": [n / 3] * WINDOW, "loss_first_token": n / 3}
        metrics |= {"gate_share": [0.5, 0.5], "gate_entropy": 0.7, "grad_norm": 1.0, "learning_rate": 0.1}
        metrics = {name: np.asarray(value, np.float32) for name, value in (metrics | self.metrics.get(n, {})).items()}
        return self.state(n), metrics

    def compile(self, state, batch):
        return self

    def evaluate(self, params, batch, count_W):
        self.events.append("eval")
        loss = np.float32(params["head"][0])
        return loss, {"loss_offset": np.full(WINDOW, loss / 3), "gate_share": np.array([1.0, 0.0])}


@pytest.fixture
def fake(monkeypatch):
    """A function that makes a `FakeTrainer` and lets the loop have it."""

    def make(**options):
        trainer = FakeTrainer(**options)
        monkeypatch.setattr(loop, "make_trainer", lambda config: trainer)
        return trainer

    return make


def interrupt():
    signal.raise_signal(signal.SIGINT)


def on_disk(run_dir):
    """The steps that are saved."""
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def logged(run_dir, kind):
    return [record["step"] for record in read_metrics(run_dir) if record["kind"] == kind]


def contents(path):
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}


# What it writes, and when


def test_the_run_is_written_at_the_steps_that_the_config_says(config, fake, tmp_path, capsys):
    fake()
    config = dataclasses.replace(config, steps=10, log_every=3, eval_every=4, checkpoint_every=3, keep_checkpoints=2)
    last = loop.train(config, tmp_path / "run")
    assert logged(tmp_path / "run", "train") == [1, 3, 6, 9, 10]
    assert logged(tmp_path / "run", "eval") == [3, 4, 6, 8, 9, 10]
    assert on_disk(tmp_path / "run") == [3, 9, 10], "the newest two, and the best: the loss of the fake rises"
    assert read_config(tmp_path / "run") == config
    assert json.loads((tmp_path / "run" / "versions.json").read_text()) == versions()
    # Two batches of which each gives half: the fake gives the whole twice.
    assert last["loss"] == 20 and last["gate_effective"] == 0.25
    for record in read_metrics(tmp_path / "run"):
        if record["kind"] == "train":
            assert record["loss"] == record["step"] and record["tokens"] == 8 * 16 * record["step"]
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert [checkpoints.meta(step)["metrics"]["loss"] for step in (9, 10)] == [18, 20]
    output = capsys.readouterr().out
    assert "new run, 10 steps of 8 x 16 tokens" in output and "predicted cost" in output
    assert re.search(r"^compiled in \d+\.\d s$", output, re.MULTILINE)


def test_the_metrics_of_a_step_are_fetched_while_the_next_one_runs(config, fake, tmp_path, monkeypatch):
    trainer, fetch, save = fake(), jax.device_get, Checkpoints.save

    def record_fetch(tree):
        if isinstance(tree, dict) and "loss" in tree:
            trainer.events.append(f"fetch {int(tree['loss'])}")
        return fetch(tree)

    def record_save(self, state, *rest):
        trainer.events.append(f"save {int(state.step)}")
        return save(self, state, *rest)

    monkeypatch.setattr(jax, "device_get", record_fetch)
    monkeypatch.setattr(Checkpoints, "save", record_save)
    config = dataclasses.replace(config, steps=6, eval_every=6, eval_batches=1, checkpoint_every=4)
    loop.train(config, tmp_path / "run")
    # A step that is saved waits for its own metrics first, and for its parameters': they may say that it must not be.
    assert trainer.events == [
        *("step 1", "step 2", "fetch 1", "step 3", "fetch 2", "step 4", "fetch 3", "fetch 4", "eval", "save 4"),
        *("step 5", "step 6", "fetch 5", "fetch 6", "eval", "save 6"),
    ]


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_alone_writes_metrics(config, fake, tmp_path, monkeypatch, process):
    enabled, loggers = [], loop.Loggers

    def record(*args, **options):
        enabled.append(options["enabled"])
        monkeypatch.setattr(jax, "process_index", lambda: 0)  # the rest is not this test's
        return loggers(*args, **options)

    def steps(*args):
        monkeypatch.setattr(jax, "process_index", lambda: 0)
        return {}

    fit = loop.Run.fit

    def fit_there(run, checkpoints):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return fit(run, checkpoints)

    monkeypatch.setattr(loop, "Loggers", record)
    monkeypatch.setattr(loop.Run, "fit", fit_there)
    monkeypatch.setattr(loop.Run, "_steps", steps)
    trainer = fake()
    loop.train(config, tmp_path / "run")
    assert enabled == [process == 0] and trainer.events == []
    assert (tmp_path / "run" / "metrics.jsonl").exists() == (process == 0)


def test_what_it_will_cost_is_said_before_the_first_step(config, fake, tmp_path, capsys):
    said = []
    trainer = fake(during={1: lambda: said.append(capsys.readouterr().out)})
    loop.train(dataclasses.replace(config, steps=2), tmp_path / "run")
    (output,), cost = said, costs(config, trainer.init().params)
    assert f"trunk {cost.trunk_params:,} parameters, head {cost.head_params:,} (cpd, R = 2, W = 3, full fact" in output
    assert f"embedding {cost.embedding_params:,}" in output
    words = r"predicted cost: head / trunk ([\d.]+) of ([\d.]+) MFLOPs a token; a step costs ([\d.]+) times one"
    numbers = [float(number) for number in re.search(words, output).groups()]
    ratio = cost.head_flops / cost.trunk_flops
    assert numbers == [round(ratio, 2), round(cost.trunk_flops / 1e6, 1), round(cost.step_ratio, 2)]
    assert "resuming" not in output and "new run, 2 steps" in output


def test_the_bar_moves_with_every_step(config, fake, tmp_path, monkeypatch):
    trainer = fake()
    monkeypatch.setattr(loop.Loggers, "advance", lambda self, step: trainer.events.append(f"bar at {step}"))
    loop.train(dataclasses.replace(config, log_every=100, eval_every=8, checkpoint_every=8), tmp_path / "run")
    assert trainer.events[:16] == [event for n in range(1, 9) for event in (f"step {n}", f"bar at {n}")]


# What it reads


def test_it_trains_on_one_split_and_evaluates_on_the_other(config, fake, tmp_path, monkeypatch):
    """The two are written in different letters, so that one token of the wrong one is seen."""
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        for letters, held_out in (("nopqrst", True), ("abcdefg", False)):
            text = "".join(letters[(i * j) % 7] for j in range(60 + i))
            if is_held_out(text.encode(), config.data.valid_fraction) == held_out:
                (tmp_path / "corpus" / f"{letters}{i}.txt").write_text(text)
    config = change(config, "data", files=f"{tmp_path}/corpus/*.txt")
    config = dataclasses.replace(config, steps=6, checkpoint_every=3, eval_every=3)
    seen = {"step": [], "evaluate": []}

    def recorded(name, function):
        def record(*args):
            seen[name].append(jax.device_get(args[1]))
            return function(*args)

        return record

    def run(steps, **options):
        trainer = fake()
        for name in seen:
            monkeypatch.setattr(trainer, name, recorded(name, getattr(trainer, name)))
        loop.train(dataclasses.replace(config, steps=steps), tmp_path / "run", **options)

    run(3)
    run(6, resume=True)
    store, sizes = loop.prepare_data(config.data), dict(seq_len=16, window=WINDOW, batch_size=8)
    end = ByteTokenizer.end_of_document
    for name, letters in (("step", b"abcdefg"), ("evaluate", b"nopqrst")):
        tokens = {int(t) for batch in seen[name] for part in ("tokens_BT", "targets_BTW") for t in batch[part].flat}
        assert tokens == {*letters, end}
    expected = {
        "step": list(itertools.islice(batches(store.train, seed=config.data.seed, **sizes), 6)),
        "evaluate": held_out_batches(store.valid, limit=config.eval_batches, **sizes) * 2,
    }
    for name, found in seen.items():
        assert len(found) == len(expected[name])
        for batch, other in zip(found, expected[name], strict=True):
            assert batch.keys() == other.keys()
            for part in batch:
                np.testing.assert_array_equal(batch[part], other[part])


# Speed


@pytest.fixture
def now(monkeypatch):
    """The time, in seconds, as a list of one number that only the test changes; each device can do 1000 FLOP/s."""
    now = [100.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(clock, "peak_flops", lambda device: 1000.0)
    return now


def make_clock(config):
    cost = Costs(0, 0, 0, trunk_flops=30.0, head_flops=20.0, next_token_flops=5.0)
    made = clock.Clock()
    return made, lambda step: made.start(step, config, cost, make_mesh(config.mesh))


def test_speed_is_that_of_the_steps_since_the_last_record(config, now):
    made, start = make_clock(config)
    with made.losing("compiling"):
        now[0] += 10
    start(4)
    now[0] += 2
    # 128 tokens of 50 FLOPs in 2 seconds, on 8 devices; 10 of 12 seconds were lost.
    expected = {"tokens": 5 * 128, "tokens_per_second": 64, "mfu": 64 * 50 / 8000, "compile_seconds": 10}
    assert made.speed(5) == {**expected, "goodput": pytest.approx(2 / 12), "memory_gib": None}
    now[0] += 1
    with made.losing("evaluating"):
        now[0] += 30
    with made.losing("evaluating"):
        now[0] += 5
    with made.losing("waiting for data", stops=False):  # the devices go on
        now[0] += 2
    now[0] += 1
    expected = {"tokens": 9 * 128, "tokens_per_second": 128, "mfu": 128 * 50 / 8000, "compile_seconds": None}
    assert made.speed(9) == {**expected, "goodput": pytest.approx(4 / 51), "memory_gib": None}
    now[0] += 1
    assert set(made.speed(9)) == {"tokens", "goodput", "memory_gib", "compile_seconds"}, "no step, no speed"
    now[0] += 1
    assert made.speed(10)["tokens_per_second"] == 64
    assert made.lost == {"compiling": 10, "evaluating": 35, "waiting for data": 2}
    assert made.summary() == "goodput 11.3% of 53.0 s; lost: evaluating 35.0, compiling 10.0, waiting for data 2.0 s"


def test_a_device_that_says_so_tells_its_memory_and_one_whose_peak_is_not_known_has_no_mfu(config, now, monkeypatch):
    monkeypatch.setattr(clock, "peak_flops", lambda device: None)
    made, start = make_clock(config)
    start(0)
    made.device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**29})
    now[0] += 1
    speed = made.speed(1)
    assert speed["tokens_per_second"] == 128 and speed["mfu"] is None and speed["memory_gib"] == 1.5


@pytest.mark.parametrize("log_every", [1, 3])
def test_compiling_evaluating_and_saving_take_no_time(config, fake, tmp_path, now, monkeypatch, log_every):
    """On a device that works while the host goes on: compiling takes 40 s, a step 2, a held-out batch 25, a save 9."""
    save, fetch, done = Checkpoints.save, jax.device_get, [0.0]

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

    monkeypatch.setattr(Checkpoints, "save", slow_save)
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


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run that is real."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(config, run_dir)
    return run_dir


def test_metrics_have_the_names_that_readers_know(trained):
    losses = {"loss", "loss_first_token", "joint_loss", *(f"loss_offset_{s + 1}" for s in range(WINDOW))}
    gate = {"gate_entropy", "gate_effective", *(f"gate_share_{r + 1}" for r in range(RANK))}
    both = {"kind", "step", "time"} | losses | gate
    records = read_metrics(trained)
    assert {record["kind"] for record in records} == {"train", "eval"}
    for record in records:
        train = {"grad_norm", "learning_rate", "tokens", "tokens_per_second", "goodput"}
        own = train if record["kind"] == "train" else set()
        # There is no MFU on a device whose peak is not known.
        own |= {"compile_seconds"} if (record["kind"], record["step"]) == ("train", 1) else set()
        assert both | own == set(record)
        assert all(math.isfinite(value) for name, value in record.items() if name != "kind")
        assert sum(record[f"gate_share_{r + 1}"] for r in range(RANK)) == pytest.approx(1, abs=1e-5)
        assert 1 <= record["gate_effective"] <= RANK + 1e-5
        assert record["joint_loss"] == pytest.approx(sum(record[f"loss_offset_{s + 1}"] for s in range(WINDOW)))
        assert record["kind"] == "eval" or record["tokens_per_second"] > 0
    first, last = (next(r for r in records if (r["kind"], r["step"]) == ("eval", step)) for step in (4, 8))
    assert last["loss"] < first["loss"]


# Evaluation


def test_eight_devices_evaluate_as_one_does(config, trained):
    there = evaluate_run(mtp_jax.load(trained, mesh=config.mesh))
    run = mtp_jax.load(trained)
    here = evaluate_run(run)
    assert there.keys() == here.keys()
    np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-5)
    # And as the training loop did.
    here, then = evaluate_run(run, limit=2), next(r for r in read_metrics(trained)[::-1] if r["kind"] == "eval")
    np.testing.assert_allclose([here[name] for name in here], [then[name] for name in here], rtol=1e-5)


def test_every_target_weighs_the_same_whichever_batch_it_is_in():
    rng = np.random.default_rng(0)
    batches = [
        {"valid_BTW": rng.random((2, 5, WINDOW)) < p, "nll_BTW": rng.random((2, 5, WINDOW))} for p in (0.1, 0.5, 0.9)
    ]

    def loss(params, batch, count_W):
        nll_W = (batch["nll_BTW"] * batch["valid_BTW"] / np.asarray(count_W)).sum((0, 1))
        return nll_W.sum(), {"loss_offset": nll_W, "gate_share": np.array([0.5, 0.5]) / len(batches)}

    found = evaluate(loss, None, batches)
    valid, nll = (np.concatenate([batch[name] for batch in batches]) for name in ("valid_BTW", "nll_BTW"))
    for s in range(WINDOW):
        assert found[f"loss_offset_{s + 1}"] == pytest.approx(nll[..., s][valid[..., s]].mean())
    assert found["loss"] == found["joint_loss"]
    assert found["gate_effective"] == pytest.approx(2)


def test_components_that_are_used_are_counted():
    for shares, effective in (([1, 0, 0], 1), ([0.5, 0.5, 0], 2), ([1 / 3] * 3, 3)):
        assert named({"loss_offset": np.ones(2), "gate_share": shares})["gate_effective"] == pytest.approx(effective)


# A loss that is not finite


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"loss": math.nan}, "loss nan, gradient norm 1"),
        ({"loss": math.inf}, "loss inf"),
        ({"grad_norm": math.nan}, "loss 6.0, gradient norm nan"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(config, fake, tmp_path, bad, words):
    fake(metrics={6: bad})
    config = dataclasses.replace(config, checkpoint_every=2)
    kept = re.escape(f"The last good checkpoint is step 4 in {tmp_path / 'run'}.")
    with pytest.raises(loop.NonFiniteLossError, match=rf"Step 6: {words}.*{kept}.*learning_rate"):
        loop.train(config, tmp_path / "run")
    assert on_disk(tmp_path / "run") == [2, 4], "step 6 was to be saved and is not"
    assert logged(tmp_path / "run", "train") == [1, 2, 3, 4, 5]

    trainer = fake()
    loop.train(config, tmp_path / "run", resume=True)
    assert trainer.events[0] == "step 5"
    assert logged(tmp_path / "run", "train") == list(range(1, 9))


def test_a_loss_that_is_not_finite_before_any_checkpoint(config, fake, tmp_path):
    trainer = fake(metrics={2: {"loss": math.nan}})
    with pytest.raises(loop.NonFiniteLossError, match=r"Step 2: .* No checkpoint was saved yet"):
        loop.train(config, tmp_path / "run")
    assert trainer.events == ["step 1", "step 2", "step 3"], "it is noticed one step later"
    assert on_disk(tmp_path / "run") == []
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        loop.train(config, tmp_path / "run", resume=True)


def test_an_interrupted_step_is_not_saved_if_its_loss_is_not_finite(config, fake, tmp_path):
    fake(metrics={3: {"loss": math.nan}}, during={3: interrupt})
    with pytest.raises(loop.NonFiniteLossError, match="Step 3"):
        loop.train(config, tmp_path / "run")
    assert on_disk(tmp_path / "run") == []


# Skipping, and looking


@pytest.mark.parametrize("limit, ends", [(1, True), (2, False)])
def test_steps_that_are_not_finite_are_skipped_up_to_the_limit(config, fake, tmp_path, limit, ends):
    config = change(config, "optimizer", skip_limit=limit)
    bad = {"loss": math.nan, "grad_norm": math.nan}
    metrics = {n: {"skipped": 0} for n in range(1, 9)} | {6: {**bad, "skipped": 1}, 7: {**bad, "skipped": 2}}
    fake(metrics=metrics)
    if ends:
        with pytest.raises(loop.NonFiniteLossError, match=r"Step 7: loss nan.* 2 steps were skipped.* step 4"):
            loop.train(config, tmp_path / "run")
    else:
        loop.train(config, tmp_path / "run")
        found = {r["step"]: r["skipped"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"}
        assert found == {**dict.fromkeys(range(1, 9), 0), 6: 1, 7: 2}


def test_a_run_with_a_limit_counts_what_it_skips(config, tmp_path):
    """A real one, whose every step is a spike once the norm is known."""
    config = change(config, "optimizer", skip_limit=99, skip_above=1 + 1e-6)
    config = dataclasses.replace(config, steps=30, checkpoint_every=30, eval_every=30)
    loop.train(config, tmp_path / "run")
    skipped = [r["skipped"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert set(skipped[:20]) == {0} and max(skipped[20:]) >= 1


def test_steps_are_profiled(config, fake, tmp_path, monkeypatch, capsys):
    trainer = fake()
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *args, name=name: trainer.events.append((name, *args)))
    config = dataclasses.replace(config, profile=ProfileConfig("2:4"))
    loop.train(config, tmp_path / "run")
    events = [event for event in trainer.events if event != "eval"]
    assert events[:6] == [
        *("step 1", "step 2"),
        ("start_trace", str(tmp_path / "run" / "profile")),
        *("step 3", "step 4"),
        ("stop_trace",),
    ]
    assert f"profile of steps 2:4 in {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    # One that goes beyond the end is stopped there, and a run that goes on in the middle begins there.
    trainer.events.clear()
    loop.train(dataclasses.replace(config, steps=10, profile=ProfileConfig("7:99")), tmp_path / "run", resume=True)
    assert trainer.events[0][0] == "start_trace"
    assert trainer.events[-3:] == ["eval", "eval", ("stop_trace",)]


def test_a_profile_is_one_that_tensorboard_reads(config, tmp_path):
    config = dataclasses.replace(config, steps=4, profile=ProfileConfig("2:3"))
    loop.train(config, tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


# Ctrl-C


def test_an_interrupted_run_is_saved_and_goes_on(config, fake, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    trainer = fake(during={3: interrupt})
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    # One batch shows whether the loss is finite; the rest would keep who waits.
    assert trainer.events == ["step 1", "step 2", "step 3", "eval"]
    assert on_disk(tmp_path / "run") == [3] and logged(tmp_path / "run", "train") == [1, 2, 3]
    output = capsys.readouterr().out
    assert "saving after this step" in output
    assert f"Interrupted. Step 3 is saved in {tmp_path / 'run'}; go on with --resume." in output
    assert signal.getsignal(signal.SIGINT) is before

    trainer = fake()
    loop.train(config, tmp_path / "run", resume=True)
    assert [event for event in trainer.events if event != "eval"] == [f"step {n}" for n in range(4, 9)]
    assert logged(tmp_path / "run", "train") == list(range(1, 9))
    assert on_disk(tmp_path / "run") == [4, 8]
    output = capsys.readouterr().out
    assert "resuming at step 3" in output and "Interrupted" not in output


@pytest.mark.parametrize("step, saved", [(4, [4]), (8, [4, 8])])
def test_a_step_that_is_saved_anyway_may_be_interrupted(config, fake, tmp_path, capsys, step, saved):
    trainer = fake(during={step: interrupt})
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    assert on_disk(tmp_path / "run") == saved and trainer.events[-2:] == [f"step {step}", "eval"]
    assert f"Interrupted. Step {step} is saved" in capsys.readouterr().out
    # The evaluation that was due is made up for.
    trainer = fake()
    loop.train(config, tmp_path / "run", resume=True)
    assert trainer.events[:2] == ["eval", "eval"] and logged(tmp_path / "run", "eval") == [4, 8]


@pytest.mark.parametrize("step", [4, 8])
def test_a_notice_in_an_evaluation_is_heard_at_the_next_batch(config, fake, tmp_path, monkeypatch, step):
    """In the last one too: the run is not done before it is made up for."""
    trainer = fake()
    evaluate = trainer.evaluate

    def preempted(params, *args):
        if int(params["head"][0]) == step:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(params, *args)

    monkeypatch.setattr(trainer, "evaluate", preempted)
    with pytest.raises(PreemptedError, match=rf"Step {step} is saved in {tmp_path / 'run'}; go on with --resume"):
        loop.train(config, tmp_path / "run")
    assert trainer.events[-2:] == [f"step {step}", "eval"] and max(on_disk(tmp_path / "run")) == step
    assert step not in logged(tmp_path / "run", "eval")
    trainer = fake()
    loop.train(config, tmp_path / "run", resume=True)
    assert trainer.events[:2] == ["eval", "eval"] and logged(tmp_path / "run", "eval") == [4, 8]


def test_the_second_interrupt_stops_at_once(config, fake, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer = fake(during={3: lambda: (interrupt(), interrupt())})
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    assert trainer.events[-1] == "step 3" and on_disk(tmp_path / "run") == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_that_is_not_the_main_one_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with loop.StopSignals() as signals:
            seen.append((signals.seen, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_ctrl_c_reaches_a_real_run(config, tmp_path):
    endless = dataclasses.replace(
        config, mesh=MeshConfig(), steps=10**6, eval_every=10**6, checkpoint_every=10**6, log_every=1
    )
    (tmp_path / "endless.py").write_text(
        "from mtp_jax.config import TrainConfig, from_dict\n"
        f"CONFIG = from_dict(TrainConfig, {dataclasses.asdict(endless)!r})\n"
    )
    command = [sys.executable, "-m", "mtp_jax", "train", f"{tmp_path}/endless.py", "--run-dir", f"{tmp_path}/run"]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline, metrics = time.monotonic() + 120, tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in output, output
    (step,) = on_disk(tmp_path / "run")
    assert f"Interrupted. Step {step} is saved in {tmp_path / 'run'}" in output
    assert logged(tmp_path / "run", "train") == list(range(1, step + 1))
    run = mtp_jax.load(tmp_path / "run")
    assert run.step == step and run.config == endless


# The run directory


def test_an_existing_run_is_not_touched(config, fake, trained):
    trainer, before = fake(), contents(trained)
    with pytest.raises(ConfigError, match=re.escape(f"{trained} exists. Give --resume") + ".*--overwrite"):
        loop.train(config, trained)
    with pytest.raises(ConfigError, match="Both --resume and --overwrite"):
        loop.train(config, trained, resume=True, overwrite=True)
    assert contents(trained) == before and trainer.events == []


def test_overwrite_starts_again(config, fake, trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    (run_dir / "report.md").write_text("of the old run")
    trainer = fake()
    loop.train(dataclasses.replace(config, steps=3, checkpoint_every=3), run_dir, overwrite=True)
    assert trainer.events[0] == "step 1"
    assert on_disk(run_dir) == [3] and logged(run_dir, "train") == [1, 2, 3]
    assert not (run_dir / "report.md").exists()


NO_RUNS = {
    "a thesis": ({"chapter1.tex": b"years of work"}, "thesis is not a run directory: it has no config.json"),
    "weights of another program": (
        {"config.json": b'{"architectures": ["LlamaForCausalLM"], "d_model": 64}', "model.safetensors": b"\0\1"},
        "is not the config of a run",
    ),
    "an almost empty config": ({"config.json": b"{}", "model.safetensors": b"\0\1"}, "is not the config of a run"),
    "a config that is no object": ({"config.json": b"[1]", "data": b""}, "is not the config of a run"),
    "a config that is no JSON": ({"config.json": b"\xff\xfe", "data": b""}, "is not JSON"),
    "a config of another version": (
        {"config.json": b'{"model": {"layers": 3}, "head": {}, "data": {}}'},
        "ModelConfig has no field 'layers'",
    ),
}


@pytest.mark.parametrize("name", NO_RUNS)
def test_overwrite_deletes_nothing_but_runs(config, fake, tmp_path, name):
    files, words = NO_RUNS[name]
    trainer, path = fake(), tmp_path / "thesis"
    path.mkdir()
    for file, text in files.items():
        (path / file).write_bytes(text)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=rf"--overwrite leaves .*/thesis alone, .*{words}"):
        loop.train(config, path, overwrite=True)
    with pytest.raises(ConfigError, match=r"thesis exists"):
        loop.train(config, path)
    assert contents(tmp_path) == before and trainer.events == []


NOT_TRAINED = {
    "held-out split": ("data", {"valid_fraction": 1e-9}, "The valid split has no documents"),
    "training split": ("data", {"valid_fraction": 1 - 1e-9}, "The train split has no documents"),
    "files": ("data", {"files": "/nothing/*.txt"}, "no file matches"),
    "source": ("data", {"source": "txt"}, "DataConfig.source is 'txt'"),
    "tokenizer": ("data", {"tokenizer": "byte"}, "DataConfig.tokenizer is 'byte'"),
    "cache": ("data", {"cache_dir": "/dev/null/cache"}, "cannot be written"),
    "vocabulary": ("model", {"vocab_size": 100}, "vocab_size is 100"),
    "head": ("head", {"kind": "cdp"}, "did you mean 'cpd'"),
    "devices": ("mesh", {"data": 3}, "needs 12 devices and there are 8"),
    "batch": ("data", {"batch_size": 6}, "6 sequences"),
}


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_an_old_run_outlives_a_new_one_that_is_refused(config, trained, monkeypatch, name):
    part, changes, words = NOT_TRAINED[name]
    monkeypatch.setattr(loop, "clear_run", lambda path: pytest.fail("this was to be refused before"))
    before = contents(trained)
    with pytest.raises(ConfigError, match=words):
        loop.train(change(config, part, **changes), trained, overwrite=True)
    assert contents(trained) == before


def test_an_old_run_outlives_a_new_one_that_cannot_be_compiled(config, fake, trained, monkeypatch):
    trainer, before = fake(), contents(trained)
    monkeypatch.setattr(trainer, "compile", lambda *args: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        loop.train(config, trained, overwrite=True)
    assert contents(trained) == before


def test_overwrite_leaves_what_no_run_writes(config, fake, tmp_path):
    """Notes, data, a cache: whatever a user keeps in the directory of a run."""
    fake()
    cached = change(config, "data", cache_dir=f"{tmp_path}/run/cache")
    loop.train(cached, tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("rank 4 it is")
    (tmp_path / "run" / "report.md").write_text("old")
    kept = {name: data for name, data in contents(tmp_path / "run").items() if "cache" in str(name)}
    loop.train(cached, tmp_path / "run", overwrite=True)
    after = contents(tmp_path / "run")
    assert (tmp_path / "run" / "notes.md").exists() and not (tmp_path / "run" / "report.md").exists()
    assert kept and {name: data for name, data in after.items() if "cache" in str(name)} == kept


def test_an_old_run_that_is_kept_is_moved_and_none_before_it_is_replaced(config, fake, tmp_path, capsys):
    fake()
    loop.train(config, tmp_path / "run")
    for n in (1, 2):
        for step in on_disk(tmp_path / "run"):
            (tmp_path / f"run/checkpoints/{step}/manifest.json").unlink()
        before = contents(tmp_path / "run")
        loop.train(config, tmp_path / "run", overwrite=True, keep_old=True)
        assert on_disk(tmp_path / "run") == [4, 8]
        for path, (data, _) in before.items():
            there = path if "lost-" in str(path) else tmp_path / f"run/lost-{n}" / path.relative_to(tmp_path / "run")
            assert there.read_bytes() == data
        assert f"Steps [4, 8] of {tmp_path}/run have no manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("moves", range(4))
def test_a_kill_while_a_run_is_set_aside_leaves_its_steps_to_be_seen(tmp_path, monkeypatch, moves):
    files = {"config.json": "{}", "metrics.jsonl": "m", "tensorboard/t": "t", "checkpoints/4/a": "x", "profile/p": "p"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    rename, moved = type(epath.Path(tmp_path)).rename, []

    def killed(old, new):
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(old.name)
        return rename(old, new)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", killed)
    with contextlib.suppress(KeyboardInterrupt):
        set_aside(tmp_path)
    # While anything of the old run is in place its steps are, so that the next start sets it aside too.
    assert moved == sorted(moved, key=lambda name: name == "checkpoints") and len(moved) == moves
    assert (tmp_path / "checkpoints/4/a").exists() == (moves < 4) and (tmp_path / "config.json").exists()
    monkeypatch.undo()
    set_aside(tmp_path)
    lost = [path for path in tmp_path.glob("lost-*/**/*") if path.is_file()]
    assert {str(path.relative_to(tmp_path)).partition("/")[2]: path.read_text() for path in lost} == files


def test_a_run_directory_may_be_a_link(config, fake, tmp_path):
    fake()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    for _ in range(2):
        loop.train(config, tmp_path / "run", overwrite=True)
    assert on_disk(tmp_path / "disk") == [4, 8] and (tmp_path / "run").is_symlink()


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="file is a file; give another --run-dir"):
            checks.check_run_dir(tmp_path / "file", **options)


def test_an_empty_or_missing_directory_is_a_new_run(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert checks.check_run_dir(tmp_path / name) == epath.Path(tmp_path / name)
        with pytest.raises(ConfigError, match=rf"--resume was given and .*{name} has no run in it"):
            checks.check_run_dir(tmp_path / name, resume=True)
    assert checks.check_run_dir("~/no run") == epath.Path(Path.home() / "no run")


# Resuming another run


def change(config, part, **changes):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})


@pytest.mark.parametrize(
    "part, changes, words",
    [
        ("model", {"d_model": 32}, "model.d_model is 32 and the run in {} has 16"),
        ("model", {"rope_theta": 5e5}, "model.rope_theta is 500000.0 and the run in {} has 10000.0"),
        ("head", {"rank": 5}, "head.rank is 5 and the run in {} has 2"),
        ("head", {"factors": "shared"}, "head.factors is 'shared' and the run in {} has 'full'"),
        ("data", {"batch_size": 16}, "data.batch_size is 16 and the run in {} has 8"),
        ("data", {"seed": 1}, "data.seed is 1 and the run in {} has 0"),
        ("optimizer", {"name": "muon"}, "optimizer.name is 'muon' and the run in {} has 'adamw'"),
    ],
)
def test_another_run_is_not_resumed(config, fake, trained, part, changes, words):
    trainer, before = fake(), contents(trained)
    with pytest.raises(ConfigError, match=re.escape(words.format(trained))):
        loop.train(change(config, part, **changes), trained, resume=True)
    assert contents(trained) == before and trainer.events == []


def test_a_run_is_not_resumed_to_a_step_that_is_behind_it(config, fake, tmp_path):
    fake()
    loop.train(config, tmp_path / "run")
    trainer, before = fake(), contents(tmp_path / "run")
    words = re.escape(f"the run in {tmp_path / 'run'} is at step 8 and steps is 7; set --steps to 8 or more.")
    with pytest.raises(ConfigError, match=words):
        loop.train(dataclasses.replace(config, steps=7), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before and trainer.events == []


def test_a_run_is_not_resumed_on_other_data(config, fake, tmp_path):
    shutil.copytree(Path(config.data.files).parent, tmp_path / "corpus")
    config = change(config, "data", files=f"{tmp_path}/corpus/*.txt")
    fake()
    loop.train(config, tmp_path / "run")
    store = loop.prepare_data(config.data)
    train, valid = (tmp_path / "corpus" / documents.names[0] for documents in (store.train, store.valid))
    text, before = train.read_text(), contents(tmp_path / "run")
    train.write_text(text.swapcase())
    other, trainer = loop.prepare_data(config.data).sha256, fake()
    assert other != store.sha256
    with pytest.raises(
        ConfigError, match=rf"have sha256 {other[:12]} and the run .* on {store.sha256[:12]};.*--run-dir"
    ):
        loop.train(dataclasses.replace(config, steps=10), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before and trainer.events == []
    # With the old text back, and other held-out documents, its next batch is the run's.
    train.write_text(text)
    fraction = config.data.valid_fraction
    valid.write_text(next(t for i in range(999) if is_held_out((t := f"other{i}").encode(), fraction)))
    loop.train(dataclasses.replace(config, steps=10), tmp_path / "run", resume=True)
    assert trainer.events[:2] == ["step 9", "step 10"]


@pytest.mark.parametrize(
    "part, changes",
    [
        ("model", {"dtype": "bfloat16", "remat": "full", "context_length": 64}),
        ("head", {"gamma": 0.5, "z_weight": 0.1, "balance": "switch", "balance_weight": 1.0}),
        ("data", {"cache_dir": "elsewhere"}),
        ("optimizer", {"learning_rate": 1.0}),
        ("mesh", {"data": 8, "fsdp": 1, "tensor": 1}),
    ],
)
def test_what_changes_no_shape_and_no_batch_may_change(config, part, changes):
    checks.check_same_run(change(config, part, **changes), config, epath.Path("run"))


def test_what_may_change_are_fields_that_there_are(config):
    fields = {(part, f.name) for part in ("model", "head", "data") for f in dataclasses.fields(getattr(config, part))}
    assert fields > RESUMABLE


def test_a_finished_run_can_be_made_longer(config, fake, tmp_path):
    fake()
    loop.train(config, tmp_path / "run")
    before = logged(tmp_path / "run", "train")
    trainer = fake()
    assert loop.train(config, tmp_path / "run", resume=True) == {} and trainer.events == []
    assert logged(tmp_path / "run", "train") == before and on_disk(tmp_path / "run") == [4, 8]
    trainer = fake()
    longer = dataclasses.replace(config, steps=10)
    loop.train(longer, tmp_path / "run", resume=True)
    assert trainer.events[:2] == ["step 9", "step 10"]
    assert on_disk(tmp_path / "run") == [4, 8, 10] and read_config(tmp_path / "run") == longer


def test_a_run_goes_on_from_an_earlier_step(config, fake, tmp_path, capsys):
    fake()
    config = dataclasses.replace(config, checkpoint_every=2, keep_checkpoints=9)
    loop.train(config, tmp_path / "run")
    assert on_disk(tmp_path / "run") == [2, 4, 6, 8]
    capsys.readouterr()
    here, seen = tmp_path / "run", []

    def look():
        seen.append(sorted(int(path.name) for path in (here / "checkpoints").iterdir() if path.name.isdigit()))

    trainer = fake(during={6: look, 7: look})
    loop.train(config, here, resume=True, resume_step=4)
    assert "Steps [6, 8] come after step 4: they are deleted when the next one is saved." in capsys.readouterr().out
    assert [event for event in trainer.events if event != "eval"] == [f"step {n}" for n in range(5, 9)]
    # Until step 6 is there again nothing has gone.
    assert seen[0] == [2, 4, 6, 8] and 8 not in seen[1] and on_disk(here) == [2, 4, 6, 8]
    assert logged(here, "train") == list(range(1, 9))


def test_an_earlier_step_is_for_a_run_that_goes_on(config, fake, tmp_path):
    trainer = fake()
    with pytest.raises(ConfigError, match="--from-step is 4 and --resume is not given; give both"):
        loop.train(config, tmp_path / "run", resume_step=4)
    loop.train(config, tmp_path / "run")
    done = len(trainer.events)
    with pytest.raises(CheckpointError, match=r"has no step 5; it has \[4, 8\]"):
        loop.train(config, tmp_path / "run", resume=True, resume_step=5)
    assert len(trainer.events) == done and on_disk(tmp_path / "run") == [4, 8]


@pytest.mark.parametrize("before, after", [(0.0, 0.9), (0.9, 0.0)])
def test_an_average_begins_with_the_run(config, fake, tmp_path, before, after):
    fake()
    write_config(tmp_path / "run", dataclasses.replace(config, ema_decay=before))
    with pytest.raises(ConfigError, match=f"--resume: ema_decay is {after} and the run in .* has {before}; it keeps"):
        loop.train(dataclasses.replace(config, ema_decay=after), tmp_path / "run", resume=True)


def test_a_run_whose_last_save_fails_fails(config, fake, tmp_path, monkeypatch, capsys):
    """A disk that is full at the last step; the saves before it are kept, and training went to its end."""

    def full(directory):
        if directory.name != "2":
            raise OSError(28, "No space left on device")
        seal(directory)

    trainer, seal = fake(), manifest.seal
    monkeypatch.setattr(manifest, "seal", full)
    with pytest.raises(CheckpointError, match=r"Step 8 was not saved in .*No space left on device\. Make room"):
        loop.train(dataclasses.replace(config, checkpoint_every=2), tmp_path / "run")
    assert "step 8" in trainer.events and on_disk(tmp_path / "run") == [2]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: Step ")]
    assert [line.split()[2] for line in warnings] == ["4", "6", "8"]


def test_a_run_that_was_never_saved_cannot_be_resumed(config, fake, tmp_path):
    trainer = fake()
    write_config(tmp_path / "run", config)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        loop.train(config, tmp_path / "run", resume=True)
    assert trainer.events == []


def test_parameters_that_give_no_finite_loss_are_not_saved(config, fake, tmp_path, monkeypatch):
    trainer = fake()
    finite = trainer.evaluate

    def evaluate(params, batch, count_W):
        loss, aux = finite(params, batch, count_W)
        return (np.float32(np.nan) if loss >= 8 else loss), aux

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(loop.NonFiniteLossError, match=r"Step 8: held-out loss nan.* last good checkpoint is step 4"):
        loop.train(config, tmp_path / "run")
    assert on_disk(tmp_path / "run") == [4]
