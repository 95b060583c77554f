"""Run directories that exist: what is kept, moved and deleted when a run begins."""

import contextlib
import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from etils import epath

from mtp_jax.runs import layout
from mtp_jax.runs.layout import set_aside
from mtp_jax.train import checks, loop
from mtp_jax.validate import ConfigError
from support.loop import change
from support.runs import contents, logged, on_disk

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    said = rf"thesis exists and is left alone, for it is not a run .*{words}.* Give another --run-dir\.$"
    for options in ({}, {"overwrite": True}, {"overwrite": True, "unfinished": True}, {"resume": True}):
        with pytest.raises(ConfigError, match=said):
            loop.train(config, path, **options)
    assert contents(tmp_path) == before and trainer.events == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_begins_beside_what_is_no_run_and_leaves_it(config, fake, tmp_path, overwrite):
    """A launcher's log, the plots of somebody else, and what a kill left of a first write."""
    trainer, path = fake(), tmp_path / "thesis"
    (path / "plots").mkdir(parents=True)
    for file in ("train.log", "plots/mine.png", "config.json.partial"):
        (path / file).write_text("years of work")
    loop.train(config, path, overwrite=overwrite)
    assert trainer.events and layout.holds_run(path)
    assert all((path / file).read_text() == "years of work" for file in ("train.log", "plots/mine.png"))


def test_a_run_of_an_older_version_is_refused_in_a_sentence_and_may_be_overwritten(config, fake, tmp_path):
    trainer, path = fake(), tmp_path / "old"
    path.mkdir()
    (path / "config.json").write_text('{"model": {"layers": 3}, "head": {}, "data": {}}')
    (path / "versions.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"old/config\.json does not fit this version .*'layers'.* delete the run"):
        layout.read_config(path)
    loop.train(config, path, overwrite=True)
    assert trainer.events and layout.read_config(path).model.d_model == config.model.d_model


NOT_TRAINED = {
    "held-out split": ("data", {"valid_fraction": 1e-9}, "The valid split has no documents"),
    "training split": ("data", {"valid_fraction": 1 - 1e-9}, "The train split has no documents"),
    "files": ("data", {"files": "/nothing/*.txt"}, "no file matches"),
    "source": ("data", {"source": "txt"}, "DataConfig.source is 'txt'"),
    "tokenizer": ("data", {"tokenizer": "byte"}, "DataConfig.tokenizer is 'byte'"),
    "cache": ("data", {"cache_dir": "/dev/null/cache"}, "cannot be written"),
    "vocabulary": ("model", {"vocab_size": 100}, "vocab_size is 100"),
    "head": ("head", {"circuit": "cdp"}, "did you mean 'cpd'"),
    "devices": ("mesh", {"data": 3}, "needs 12 devices and there are 8"),
    "batch": ("data", {"batch_size": 6}, "6 sequences"),
}


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_an_old_run_outlives_a_new_one_that_is_refused(config, trained, monkeypatch, name):
    part, changes, words = NOT_TRAINED[name]
    monkeypatch.setattr(layout, "clear_run", lambda path: pytest.fail("this was to be refused before"))
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
        loop.train(config, tmp_path / "run", overwrite=True, unfinished=True)
        assert on_disk(tmp_path / "run") == [4, 8]
        for path, (data, _) in before.items():
            there = path if "lost-" in str(path) else tmp_path / f"run/lost-{n}" / path.relative_to(tmp_path / "run")
            assert there.read_bytes() == data
        assert f"Steps [4, 8] of {tmp_path}/run have no manifest.json" in capsys.readouterr().err


def test_a_step_that_was_completed_meanwhile_is_never_given_up(config, fake, trained):
    """`--auto-resume` had found an unfinished run, and who was training there has finished a step since."""
    trainer, before = fake(), contents(trained)
    with pytest.raises(ConfigError, match=r"has saved a step since this one began to start. Give the same command"):
        loop.train(config, trained, overwrite=True, unfinished=True)
    assert contents(trained) == before and trainer.events == []


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
