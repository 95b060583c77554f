"""How the runs of a sweep are listed for launchers, and sweeps in a bucket: nothing is trained here."""

import json
import subprocess
import sys

import pytest

from mtp_jax.cli import main
from mtp_jax.commands import run_one, train
from mtp_jax.commands.experiment import load_sweep
from mtp_jax.runs.paths import given_path
from mtp_jax.sweep import runner
from mtp_jax.sweep.records import Place
from mtp_jax.validate import BusyError, PreemptedError

EXPERIMENT = '''"""Which rank?"""
from dataclasses import replace
from mtp_jax import OptimizerConfig, Sweep, TrainConfig

TRUNK = TrainConfig(optimizer=OptimizerConfig(warmup_steps=0))
SWEEPS = {"tiny": Sweep(replace(TRUNK, init_from="trunk"), {"head.rank": (1, 2)}, first={"trunk": TRUNK})}
'''
# What trains and measures is replaced; everything around it is not.
RUN = """
import json, sys
from etils import epath
from mtp_jax.cli import main
from mtp_jax.commands import train
from mtp_jax.runs.manifest import seal
from mtp_jax.runs.layout import write_config
from mtp_jax.commands.experiment import load_sweep
from mtp_jax.commands import run_one

file, directory = sys.argv[1:]
named, trained = load_sweep(file), []

def fake_train(args):
    run_dir = epath.Path(args[args.index("--run-dir") + 1])
    trained.append((run_dir.name, args[args.index("--init-from") + 1]))
    write_config(run_dir, named.config(run_dir.name, directory))
    for step in (1, 2, 3):
        (run_dir / "checkpoints" / str(step) / "params").mkdir(parents=True, exist_ok=True)
        (run_dir / "checkpoints" / str(step) / "params" / "a").write_text("x")
        seal(run_dir / "checkpoints" / str(step))
    (run_dir / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 3, "joint_loss": 1.5}) + "\\n")

train.main = fake_train
run_one.costs = lambda *_: {"rank=1": {}, "rank=2": {}}
run_one.measure = lambda run_dir, *rest: {"readings": {"steps": 3, "half": 1}}
for only in ("trunk", "costs", "2", "3", "2"):
    main(["sweep", file, "--only", only, "--dir", directory])
assert trained == [("trunk", ""), ("rank=1", directory + "/trunk"), ("rank=2", directory + "/trunk")], trained
main(["sweep", file, "--collect", "--dir", directory, "--out", directory + "/results.json"])
main(["sweep", file, "--list", "--dir", directory])
"""
DONE = "0\tfirst\ttrunk\tdone\n1\tfirst\tcosts\tdone\n2\trun\trank=1\tdone\n3\trun\trank=2\tdone\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("listed") / "ranks.py"
    path.write_text(EXPERIMENT)
    return path


def listed(capsys, *args):
    main(["sweep", *map(str, args), "--list"])
    return capsys.readouterr().out


def test_a_program_gets_a_line_for_each_run(file, tmp_path, capsys):
    named, place = load_sweep(str(file)), Place(given_path(tmp_path))
    place.write(named, "trunk", {"state": "done", "seconds": {"training": 1.0}})
    place.write(named, "rank=2", {"state": "failed", "error": "no memory"})
    expected = "0\tfirst\ttrunk\tdone\n1\tfirst\tcosts\twaiting\n2\trun\trank=1\twaiting\n3\trun\trank=2\tfailed\n"
    assert listed(capsys, file, "--dir", tmp_path) == expected
    # The records are of other runs where what these begin from lies elsewhere.
    assert "done" not in listed(capsys, f"{file}@tiny", "--dir", tmp_path / "other")


def test_a_terminal_gets_a_table(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    said = listed(capsys, file, "--dir", tmp_path)
    assert "Which rank?" in said and "rank=2" in said and "\t" not in said


def test_a_run_that_is_done_is_not_run_again(file, tmp_path, capsys):
    named, place = load_sweep(str(file)), Place(given_path(tmp_path))
    place.write(named, "trunk", {"state": "done", "seconds": {"training": 1.0}})
    main(["sweep", str(file), "--only", "0", "--dir", str(tmp_path)])
    assert capsys.readouterr().out == f"trunk is done: {tmp_path}/records/trunk.json\n"
    assert not place.run("trunk").exists()


def test_what_a_run_begins_from_and_its_log_have_a_place_wherever_the_sweep_is(file):
    named = load_sweep(str(file))
    assert named.config("rank=1", "gs://bucket/sweep").init_from == "gs://bucket/sweep/trunk"
    assert named.config("rank=1").init_from == "runs/ranks/tiny/trunk"
    assert str(Place(given_path("runs/x")).log("trunk")) == "runs/x/logs/trunk.log"


def test_the_directory_must_be_one_that_runs_can_be_in(file, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(file), "--list", "--dir", "s3://bucket/sweep"])
    assert stopped.value.code == 2 and "must be a local path or gs://BUCKET/" in capsys.readouterr().err


def test_a_run_that_is_preempted_has_not_failed(file, tmp_path, capsys, monkeypatch):
    def preempted(args):
        raise PreemptedError("Preempted. Step 3 is saved.")

    monkeypatch.setattr(train, "main", preempted)
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(file), "--only", "0", "--dir", str(tmp_path)])
    assert stopped.value.code == 75 and not Place(given_path(tmp_path)).record("trunk").exists()


def test_a_run_that_somebody_else_trains_is_waited_for_and_has_not_failed(file, tmp_path, capsys, monkeypatch):
    asked = []

    def busy(args):
        asked.append(args)
        raise BusyError("The run is being trained by process 7.")

    monkeypatch.setattr(train, "main", busy)
    monkeypatch.setattr(run_one, "SAVING_SECONDS", 1.5)
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(file), "--only", "0", "--dir", str(tmp_path)])
    assert stopped.value.code == 2 and "is being trained by process 7." in capsys.readouterr().err
    assert len(asked) > 1 and not Place(given_path(tmp_path)).record("trunk").exists()


@pytest.mark.parametrize("status", [2, 1, -9])
def test_what_is_refused_leaves_no_record_and_what_is_killed_does(file, tmp_path, status):
    named, place = load_sweep(str(file)), Place(given_path(tmp_path))
    place.log("trunk").parent.mkdir(parents=True)
    place.log("trunk").write_text("mtp-jax: error: The run is being trained by process 7.\n")
    assert "being trained by process 7" in runner._reason(named, "trunk", place, status)
    assert place.record("trunk").exists() == (status != 2)


def test_a_run_that_is_stopped_while_it_is_measured_is_started_again(file, tmp_path):
    stopped = "run_one.measure = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(30)\nfor only"
    code = "import os, signal, time\n" + RUN.replace("for only", stopped)
    done = subprocess.run([sys.executable, "-c", code, file, tmp_path], capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == ["costs.json", "trunk.json"]


@pytest.mark.parametrize("bucket", [False, True])
def test_runs_records_and_results(file, tmp_path, bucket, request):
    """All of a sweep but its training, on a disk and in a bucket alike."""
    if bucket:
        there = request.getfixturevalue("here")
        directory = "gs://bucket/sweeps/ranks"
        status, said = there.run("-c", RUN, file, directory)
        names = {name.removeprefix("sweeps/ranks/") for name in there.bucket.objects if name.startswith("sweeps/")}
        results = there.bucket.objects["sweeps/ranks/results.json"][0]
        assert not there.bucket.unknown
    else:
        directory = str(tmp_path)
        done = subprocess.run([sys.executable, "-c", RUN, file, directory], capture_output=True, text=True)
        status, said = done.returncode, done.stdout + done.stderr
        names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        results = (tmp_path / "results.json").read_text() if status == 0 else ""
    assert status == 0 and said.endswith(DONE), said
    assert f"rank=1 is done: {directory}/records/rank=1.json" in said
    run = {"config.json", "versions.json", "metrics.jsonl"}
    step = {"params/a", "manifest.json"}
    kept = dict.fromkeys(("trunk", "rank=1", "rank=2"), "123")
    expected = {f"{name}/{path}" for name in kept for path in run} | {
        f"records/{name}.json" for name in (*kept, "costs")
    }
    expected |= {f"{name}/checkpoints/{i}/{path}" for name, steps in kept.items() for i in steps for path in step}
    assert names == expected | {"results.json"}
    found = json.loads(results)
    assert [(row["name"], row["state"]) for row in found["runs"]] == [("rank=1", "done"), ("rank=2", "done")]
    assert found["runs"][0]["config"]["init_from"] == f"{directory}/trunk"
    assert found["first"]["trunk"]["curve"][0]["joint_loss"] == 1.5
