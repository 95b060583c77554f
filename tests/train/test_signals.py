"""Ctrl-C and notices: whatever stops a run leaves one that goes on."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import mtp_jax
from mtp_jax.config import MeshConfig
from mtp_jax.train import loop
from mtp_jax.train.signals import StopSignals
from mtp_jax.validate import PreemptedError
from support import REPOSITORY
from support.loop import interrupt
from support.runs import logged, on_disk

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


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
        with StopSignals() as signals:
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
        "from mtp_jax.config import TrainConfig\nfrom mtp_jax.validate import from_dict\n"
        f"CONFIG = from_dict(TrainConfig, {dataclasses.asdict(endless)!r})\n"
    )
    command = [sys.executable, "-m", "mtp_jax", "train", f"{tmp_path}/endless.py", "--run-dir", f"{tmp_path}/run"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
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
    assert run.step == step and run.config == endless.with_tokenizer(257)


def test_an_evaluation_that_was_logged_is_not_made_again(config, fake, tmp_path, monkeypatch):
    """A notice between an evaluation and the next step, where no save is due."""
    log = loop.Loggers.log

    def preempted(loggers, kind, step, metrics):
        log(loggers, kind, step, metrics)
        if (kind, step) == ("eval", 4):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Loggers, "log", preempted)
    fake()
    rarely = dataclasses.replace(config, checkpoint_every=8)
    with pytest.raises(PreemptedError, match="Step 4 is saved"):
        loop.train(rarely, tmp_path / "run")
    monkeypatch.setattr(loop.Loggers, "log", log)
    fake()
    loop.train(rarely, tmp_path / "run", resume=True)
    assert logged(tmp_path / "run", "eval") == [4, 8]
