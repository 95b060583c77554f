"""The loop: what it writes and when, what it reads, and profiles of it.

Most tests give it a trainer that takes no time, so that they see the loop and nothing else.
"""

import contextlib
import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest

from mtp_jax.config import ProfileConfig
from mtp_jax.data.batches import batches, held_out_batches
from mtp_jax.data.held_out import is_held_out
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.layout import read_config, versions
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.train import loop
from mtp_jax.train.costs import costs
from mtp_jax.train.loggers import read_metrics
from support.loop import WINDOW, change
from support.runs import logged, on_disk

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


# What it writes, and when


def test_the_run_is_written_at_the_steps_that_the_config_says(config, fake, tmp_path, capsys):
    fake()
    config = dataclasses.replace(config, steps=10, log_every=3, eval_every=4, checkpoint_every=3, keep_checkpoints=2)
    last = loop.train(config, tmp_path / "run")
    assert logged(tmp_path / "run", "train") == [1, 3, 6, 9, 10]
    assert logged(tmp_path / "run", "eval") == [3, 4, 6, 8, 9, 10]
    assert on_disk(tmp_path / "run") == [3, 9, 10], "the newest two, and the best: the loss of the fake rises"
    assert read_config(tmp_path / "run") == config.with_tokenizer(257)
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
    trainer, fetch, save = fake(), jax.device_get, CheckpointWriter.save

    def record_fetch(tree):
        if isinstance(tree, dict) and "loss" in tree:
            trainer.events.append(f"fetch {int(tree['loss'])}")
        return fetch(tree)

    def record_save(self, state, *rest):
        trainer.events.append(f"save {int(state.step)}")
        return save(self, state, *rest)

    monkeypatch.setattr(jax, "device_get", record_fetch)
    monkeypatch.setattr(CheckpointWriter, "save", record_save)
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

    def open_there(*args):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return contextlib.nullcontext()

    monkeypatch.setattr(loop, "Loggers", record)
    monkeypatch.setattr(loop, "CheckpointWriter", open_there)
    monkeypatch.setattr(loop.TrainRun, "fit", lambda *args, **options: {})
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


def test_steps_are_profiled(config, fake, tmp_path, monkeypatch, capsys):
    trainer = fake()
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_, name=name: trainer.events.append(name))
    config = dataclasses.replace(config, profile=ProfileConfig("2:4"))
    loop.train(config, tmp_path / "run")
    events = [event for event in trainer.events if event != "eval"]
    assert events[:6] == ["step 1", "step 2", "start_trace", "step 3", "step 4", "stop_trace"]
    assert f"profile of steps 2:4 in {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    # One that goes beyond the end is stopped there, and a run that goes on in the middle begins there.
    trainer.events.clear()
    loop.train(dataclasses.replace(config, steps=10, profile=ProfileConfig("7:99")), tmp_path / "run", resume=True)
    assert trainer.events[0] == "start_trace"
    assert trainer.events[-3:] == ["eval", "eval", "stop_trace"]


def test_a_profile_is_one_that_tensorboard_reads(config, tmp_path):
    config = dataclasses.replace(config, steps=4, profile=ProfileConfig("2:3"))
    loop.train(config, tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
