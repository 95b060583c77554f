"""A loss that is not finite: it stops the run, or its step is skipped."""

import dataclasses
import math
import re

import numpy as np
import pytest

from mtp_jax.runs.checkpoints import CheckpointError
from mtp_jax.train import loop
from mtp_jax.train.loggers import read_metrics
from support.loop import change, interrupt
from support.runs import logged, on_disk

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.mark.slow
def test_a_run_with_a_limit_counts_what_it_skips(config, tmp_path):
    """A real one, whose every step is a spike once the norm is known."""
    config = change(config, "optimizer", skip_limit=99, skip_above=1 + 1e-6)
    config = dataclasses.replace(config, steps=30, checkpoint_every=30, eval_every=30)
    loop.train(config, tmp_path / "run")
    skipped = [r["skipped"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert set(skipped[:20]) == {0} and max(skipped[20:]) >= 1


def test_parameters_that_give_no_finite_loss_are_not_saved(config, fake, tmp_path, monkeypatch):
    trainer = fake()
    finite = trainer.evaluate

    def evaluate(params, batch, counts_2W):
        loss, aux = finite(params, batch, counts_2W)
        return (np.float32(np.nan) if loss >= 8 else loss), aux

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(loop.NonFiniteLossError, match=r"Step 8: held-out loss nan.* last good checkpoint is step 4"):
        loop.train(config, tmp_path / "run")
    assert on_disk(tmp_path / "run") == [4]
