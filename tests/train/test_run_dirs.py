"""Any directory that a launcher makes is a run directory, under any name: a start trains there, or it is refused before
its first step, nothing is touched, and every way out that is named trains."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from mtp_jax.commands import train
from mtp_jax.runs.checkpoints import CheckpointError, Checkpoints
from mtp_jax.runs.layout import clear_run, holds_run, read_config
from mtp_jax.runs.manifest import check, sealed_steps
from mtp_jax.runs.paths import LOCK, plain_path
from mtp_jax.train import loop
from mtp_jax.train.checks import check_run_dir
from mtp_jax.validate import ConfigError
from support.loop import FakeTrainer
from support.runs import contents, on_disk

# What is looked at here is the loop; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")

FLAGS = {"no flag": [], "resume": ["--resume"], "auto": ["--auto-resume"], "overwrite": ["--overwrite"]}

# What a start of each flag comes to, in the order of FLAGS: "new" begins at step 1, "on" goes on behind step 2.
NEW, WHOLE, BROKEN = ("new", None, "new", "new"), (None, "on", "on", "new"), (None, None, "new", "new")
STATES = {
    "missing": NEW,
    "empty": NEW,
    "a log": NEW,
    "a first write that was cut": NEW,
    "the lock of a dead process": NEW,
    "folders that a launcher made": NEW,
    "a whole run": WHOLE,
    "checkpoints alone": WHOLE,
    "a run without versions": WHOLE,
    "killed before its first save": BROKEN,
    "killed in its first save": BROKEN,
    "killed behind its first write": BROKEN,
}

NAMES = {
    "brackets": "lr[0.1]",
    "a star": "a*b",
    "a question mark": "rank?",
    "a space": "my first run",
    "letters": "größe-模型",
    "a dash": "-x",
    "a trailing slash": "slash/",
    "a folder more": "sweep/[a-z]/1",
    "markup": "{rank}%d [red] #1",
    "a line break": "a\nb",
    "a link": "link",
    "other bytes": os.fsdecode(b"caf\xe9"),
}


@pytest.fixture(scope="module")
def left(config, tmp_path_factory):
    """What runs have left: a folder with one of 2 steps, and with one that was killed before its first save."""
    root = tmp_path_factory.mktemp("left")
    short = dataclasses.replace(config, steps=2, eval_every=2, checkpoint_every=2)
    (root / "short.py").write_text(
        "from mtp_jax.config import TrainConfig\nfrom mtp_jax.validate import from_dict\n"
        f"CONFIG = from_dict(TrainConfig, {dataclasses.asdict(short)!r})\n"
    )

    def killed():
        shutil.copytree(root / "killing", root / "killed")

    for name, during in (("whole", {}), ("killing", {1: killed})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_trainer", lambda config, during=during, **_: FakeTrainer(during=during))
            loop.train(short, root / name)
    process = subprocess.Popen([sys.executable, "-c", ""])
    lock = json.loads((root / "killed" / LOCK).read_text())
    process.wait()
    (root / "killed" / LOCK).write_text(json.dumps(lock | {"pid": process.pid, "id": "dead"}))
    return root


def make(path, state, left):
    """A directory in this state."""
    run = {"a whole run": "whole", "a run without versions": "whole", "killed before its first save": "killed"}
    if state in run or state == "killed in its first save":
        shutil.copytree(left / run.get(state, "killed"), path)
    elif state != "missing":
        path.mkdir(parents=True)
    if state == "a log":
        (path / "train.log").write_text("job 7 starts\n")
    elif state == "a first write that was cut":
        (path / "config.json.partial").write_text('{"mod')
    elif state == "the lock of a dead process":
        for name in (LOCK, f"{LOCK}.guard"):
            (path / name).write_bytes((left / "killed" / LOCK).read_bytes())
    elif state == "folders that a launcher made":
        for name in ("checkpoints", "tensorboard", "logs"):
            (path / name).mkdir()
    elif state == "checkpoints alone":
        shutil.copytree(left / "whole/checkpoints", path / "checkpoints")
    elif state == "a run without versions":
        (path / "versions.json").unlink()
    elif state == "killed in its first save":
        shutil.copytree(left / "whole/checkpoints/2/params", path / "checkpoints/2.orbax-checkpoint-tmp/params")
    elif state == "killed behind its first write":
        shutil.copy(left / "whole/config.json", path)


def place(name, root):
    """(what is given as --run-dir in the folder `root`, the place that it means)."""
    given = NAMES[name]
    if name == "a link":
        (root / given).symlink_to(root / "disk" / "scratch[1]")
        return given, root / "disk" / "scratch[1]"
    return given, root / given


@pytest.fixture
def start(fake, left):
    """A function that gives the command for --run-dir with some flags, and returns the first step, or why not."""

    def run(given, flags):
        trainer = fake()
        try:
            train.main([str(left / "short.py"), f"--run-dir={given}", "--steps", "4", *flags])
        except (ConfigError, RuntimeError) as error:
            assert not trainer.events, "it was refused before its first step"
            return str(error)
        return {"step 1": "new", "step 3": "on"}[trainer.events[0]]

    return run


def ways_out(message, flags):
    """The flags of each way out that a message names, and whether it is another directory."""
    if re.search(r"Leave (--\S+) out", message):
        return [([], False)]
    named = re.findall(r"--(?:auto-resume|resume|overwrite)\b", message)
    ways = [([flag], False) for flag in dict.fromkeys(named) if flag not in flags]
    return ways + [([flag for flag in flags if flag != "--resume"], True)] * ("another --run-dir" in message)


def everything(root):
    """All that lies below a folder, and the bytes of files, but the locks of dead processes."""
    paths = sorted(path for path in root.rglob("*") if not path.name.startswith(LOCK))
    return paths, {path: found for path, found in contents(root).items() if path in paths}


def cells():
    """Every flag with every state and every name; the slow ones make it every state with every name too."""
    for i, state in enumerate(STATES):
        for j, name in enumerate(NAMES):
            flag, quick = list(FLAGS)[(i + j) % len(FLAGS)], i % 3 == j // len(FLAGS)
            marks = () if quick else pytest.mark.slow
            yield pytest.param(state, name, flag, id=f"{state}, {flag}, {name}", marks=marks)


def test_the_cells_that_are_not_slow_have_every_flag_with_every_state_and_name():
    quick = {tuple(cell.values) for cell in cells() if not cell.marks}
    assert {(state, flag) for state, _, flag in quick} == set(itertools.product(STATES, FLAGS))
    assert {(name, flag) for _, name, flag in quick} == set(itertools.product(NAMES, FLAGS))


@pytest.mark.parametrize("state, name, flag", list(cells()))
def test_a_start_trains_or_names_a_way_that_does(state, name, flag, start, left, tmp_path, monkeypatch):
    def fresh(folder):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        given, path = place(name, tmp_path / folder)
        make(path, state, left)
        return given, path

    given, path = fresh("first")
    before, locks = everything(tmp_path), set(path.glob(f"{LOCK}*"))
    expected = STATES[state][list(FLAGS).index(flag)]
    found = start(given, FLAGS[flag])
    if expected is not None:
        assert found == expected
        check_trained(path)
        return
    assert " " in found, f"it trained: {found}"
    assert everything(tmp_path) == before and locks >= set(path.glob(f"{LOCK}*"))
    ways = ways_out(found, FLAGS[flag])
    assert ways, f"no way out: {found}"
    for number, (flags, elsewhere) in enumerate(ways):
        given, path = fresh(str(number))
        if elsewhere:
            given, path = "another", tmp_path / str(number) / "another"
        after = start(given, flags)
        assert after in ("new", "on"), f"{found}\nthen with {flags}: {after}"
        check_trained(path)


def check_trained(path):
    """A whole run is there, and nothing of its making."""
    assert on_disk(path) == [2, 4] and {"config.json", "versions.json"} <= set(os.listdir(path))
    assert not list(path.glob(f"{LOCK}*")) and not list(path.glob("*.partial"))


def test_a_kill_while_a_run_is_deleted_leaves_one_that_every_flag_is_right_about(start, left, tmp_path, monkeypatch):
    """At each file that is deleted, as a process that is gone: nothing more is."""
    monkeypatch.chdir(tmp_path)
    for number in itertools.count():
        path, deleted = tmp_path / str(number), []
        shutil.copytree(left / "whole", path)
        (path / "report.md").write_text("of the old run")
        with monkeypatch.context() as patch:
            for name in ("unlink", "remove", "rmdir"):
                patch.setattr(os, name, until(number, deleted, getattr(os, name)))
            with contextlib.suppress(KeyboardInterrupt):
                clear_run(path)
                break
        assert len(deleted) == number
        found = [read_state(path), *(let_through(path, resume, overwrite) for resume, overwrite in KINDS)]
        assert found in (["whole", False, True, True], ["ended", False, True, True], ["none", True, False, True])
        if found[0] == "whole":  # no step is half there
            Checkpoints(path).meta()
            check(epath.Path(path / "checkpoints" / "2"))
        if number % 8 == 0:
            assert start(str(number), ["--auto-resume"]) == ("on" if found[0] == "whole" else "new")
    assert number > 10 and not holds_run(path)


def until(number, done, does):
    """A function that works until `number` are `done`."""

    def run(*args, **options):
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(args)
        return does(*args, **options)

    return run


KINDS = ((False, False), (True, False), (False, True))


def read_state(path):
    """What is there: a whole run, one that ended before a save, or none."""
    return ("whole" if sealed_steps(epath.Path(path / "checkpoints")) else "ended") if holds_run(path) else "none"


def let_through(path, resume, overwrite):
    """Whether a start of this kind is let through."""
    try:
        check_run_dir(path, resume=resume, overwrite=overwrite)
    except ConfigError as error:
        assert "not a run" not in str(error)
        return False
    return True


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("there", [True, False])
def test_checkpoints_may_lie_on_another_disk(start, left, tmp_path, monkeypatch, flag, there):
    """Behind a link, whose place is there or not; it stays a link, and of a new run nothing old is behind it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(left / "whole", tmp_path / "run")
    (tmp_path / "run/checkpoints").rename(tmp_path / "disk")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    if not there:
        for name in ("disk", "run/tensorboard"):
            shutil.rmtree(tmp_path / name)
        (tmp_path / "run/config.json").unlink()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/events").write_text("of others")
    shutil.rmtree(tmp_path / "run/tensorboard", ignore_errors=True)
    (tmp_path / "run/tensorboard").symlink_to(tmp_path / "shared")
    found, expected = start("run", FLAGS[flag]), (WHOLE if there else NEW)[list(FLAGS).index(flag)]
    if expected is not None:
        assert found == expected
        check_trained(tmp_path / "run")
        assert on_disk(tmp_path / "run") == sorted(map(int, os.listdir(tmp_path / "disk")))
    assert (tmp_path / "run/checkpoints").is_symlink() and (tmp_path / "shared/events").read_text() == "of others"


def test_a_file_that_is_still_being_copied_is_nobodys_but_its_owners(start, left, tmp_path, monkeypatch):
    """`*.partial` is what other programs call theirs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(left / "whole", tmp_path / "run")
    (tmp_path / "run/corpus.partial").write_text("half a corpus")
    (tmp_path / "run/metrics.jsonl.partial").write_text("ours")
    assert start("run", ["--overwrite"]) == "new"
    assert (tmp_path / "run/corpus.partial").read_text() == "half a corpus"
    assert [path.name for path in (tmp_path / "run").glob("*.partial")] == ["corpus.partial"]


def test_the_config_of_checkpoints_that_came_alone_is_theirs(left, tmp_path):
    shutil.copytree(left / "whole/checkpoints", tmp_path / "run/checkpoints")
    assert read_config(tmp_path / "run") == read_config(left / "whole")
    meta = tmp_path / "run/checkpoints/2/meta/metadata"
    for text, words in (("{", "is not JSON"), ('{"step": 2}', "is not JSON"), ('{"config": {}}', "not the config")):
        meta.write_text(text)
        with pytest.raises(ConfigError, match=f"2/meta/metadata .*{words}.* another --run-dir"):
            check_run_dir(tmp_path / "run", overwrite=True)
    (tmp_path / "run/checkpoints/2/manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json\. Give another --run-dir\. Steps \[2\] have no manifest"):
        check_run_dir(tmp_path / "run")


def test_steps_of_a_run_whose_name_is_a_pattern_are_named_by_it(left, tmp_path):
    """And not by the link that Orbax reads them through, which is made anew where it was cleaned away."""
    run = Path(shutil.copytree(left / "whole", tmp_path / "lr[0.1]"))
    checkpoints = Checkpoints(run)
    plain = plain_path(epath.Path(run))
    assert os.path.islink(plain)
    os.unlink(plain)
    target = FakeTrainer().state(0)
    assert int(checkpoints.restore(target).step) == 2 and os.path.islink(plain)
    (run / "checkpoints/2/params/_METADATA").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{run}/checkpoints/2/params/_METADATA is missing")):
        checkpoints.restore(target)
