"""Resuming: what must be the same, what may change, and at which step a run goes on."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from etils import epath

from mtp_jax.data.held_out import is_held_out
from mtp_jax.runs import manifest
from mtp_jax.runs.checkpoints import CheckpointError
from mtp_jax.runs.layout import read_config, write_config
from mtp_jax.train import checks, loop
from mtp_jax.train.checks import RESUMABLE
from mtp_jax.validate import ConfigError
from support.loop import change
from support.runs import contents, logged, on_disk

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    "part, changes, words",
    [
        ("model", {"d_model": 32}, "model.d_model is 32 and the run in {} was trained with 16"),
        ("model", {"rope_theta": 5e5}, "model.rope_theta is 500000.0 and the run in {} was trained with 10000.0"),
        ("head", {"rank": 5}, "head.rank is 5 and the run in {} was trained with 2"),
        ("head", {"factors": "shared"}, "head.factors is 'shared' and the run in {} was trained with 'full'"),
        ("data", {"batch_size": 16}, "data.batch_size is 16 and the run in {} was trained with 8"),
        ("data", {"seed": 1}, "data.seed is 1 and the run in {} was trained with 0"),
        ("optimizer", {"name": "muon"}, "optimizer.name is 'muon' and the run in {} was trained with 'adamw'"),
    ],
)
def test_another_run_is_not_resumed(config, fake, trained, part, changes, words):
    trainer, before = fake(), contents(trained)
    with pytest.raises(ConfigError, match=re.escape(words.format(trained))):
        loop.train(change(config, part, **changes), trained, resume=True)
    assert contents(trained) == before and trainer.events == []


def test_a_config_that_was_edited_by_hand_is_noticed(config, fake, tmp_path, capsys):
    """As it resumes from its own config: what may change is said, and what may not is refused by its name."""
    run_dir = tmp_path / "run"
    fake()
    loop.train(config, run_dir)
    text, said = (run_dir / "config.json").read_text(), "step 8 was trained with"
    for old, new, refused in (
        ('"valid_fraction": 0.2', '"valid_fraction": 0.3', "data.valid_fraction is 0.3 and the run in"),
        ('"rope_theta": 10000.0', '"rope_theta": 1e5', "model.rope_theta is 100000.0 and the run in"),
        ('"ema_decay": 0.0', '"ema_decay": 0.9', "ema_decay is 0.9 and the run in"),
    ):
        assert text.count(old) == 1
        (run_dir / "config.json").write_text(text.replace(old, new))
        before = contents(run_dir)
        with pytest.raises(ConfigError, match=re.escape(refused)):
            loop.train(dataclasses.replace(read_config(run_dir), steps=10), run_dir, resume=True)
        assert contents(run_dir) == before
    (run_dir / "config.json").write_text(text.replace('"learning_rate": 0.01', '"learning_rate": 0.5'))
    capsys.readouterr()
    loop.train(dataclasses.replace(read_config(run_dir), steps=10), run_dir, resume=True)
    out = capsys.readouterr().out
    assert f"--resume: optimizer.learning_rate is 0.5; {said} 0.01\n" in out and f"steps is 10; {said} 8\n" in out
    fake()
    loop.train(dataclasses.replace(read_config(run_dir), steps=10), run_dir, resume=True)
    assert "was trained with" not in capsys.readouterr().out


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
        ("head", {"draft_temperature": 0.6, "gamma": 0.5, "z_weight": 0.1, "balance": "switch", "balance_weight": 1.0}),
        ("head", {"nll_weight": 0.5, "kl_weight": 0.1, "tv_weight": 0.1, "acceptance_weight": 0.1, "lk_weight": 0.1}),
        ("data", {"cache_dir": "elsewhere"}),
        ("optimizer", {"learning_rate": 1.0}),
        ("mesh", {"data": 8, "fsdp": 1, "tensor": 1}),
    ],
)
def test_what_changes_no_shape_and_no_batch_may_change(config, part, changes):
    checks.check_same_run(change(config, part, **changes), config, epath.Path("run"))


def test_the_temperature_of_the_law_that_a_head_learns_stays(config):
    with pytest.raises(ConfigError, match=r"head.temperature is 0.7 .* trained with 1.0; the law that its head learns"):
        checks.check_same_run(change(config, "head", temperature=0.7), config, epath.Path("run"))


def test_what_may_change_are_fields_that_there_are(config):
    fields = {
        f"{part}.{f.name}" for part in ("model", "head", "data") for f in dataclasses.fields(getattr(config, part))
    }
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
    assert on_disk(tmp_path / "run") == [4, 8, 10] and read_config(tmp_path / "run") == longer.with_tokenizer(257)


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
def test_an_average_begins_with_the_run(config, before, after):
    new, old = (dataclasses.replace(config, ema_decay=decay) for decay in (after, before))
    with pytest.raises(ConfigError, match=f"ema_decay is {after} and the run in RUN was .* {before}; it keeps"):
        checks.check_same_run(new, old, epath.Path("RUN"))


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
