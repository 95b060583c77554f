"""Sweeps: the runs that a file asks for, going through them, what is measured, and what is left behind."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from mtp_jax import MeasureConfig, OptimizerConfig, Sweep, TrainConfig, load
from mtp_jax.cli import main
from mtp_jax.commands.experiment import default_run_dir, load_experiment, load_sweep
from mtp_jax.data.preparation import prepare
from mtp_jax.sweep import measure as measuring
from mtp_jax.sweep import runner
from mtp_jax.sweep.config import with_fields
from mtp_jax.sweep.intervals import ratio_interval
from mtp_jax.sweep.measure import Steps
from mtp_jax.sweep.records import Place, fingerprint
from mtp_jax.validate import ConfigError, PreemptedError
from support.sweeps import go

EXPERIMENT = '''"""What does rank do to a tiny model?

More of it.
"""
from beside import BASE, MEASURE, TRUNK
from mtp_jax import Sweep

SWEEPS = {
    "tiny": Sweep(
        BASE,
        {"head.rank": (1, 3), "seed": (0, 1)},
        reference={"head.rank": 1},
        first={"trunk": TRUNK},
        measure=MEASURE,
    ),
    "bad": Sweep(BASE, {"head.rank": (1, 2)}, reference={"head.rank": 1}, first={"trunk": TRUNK}, measure=MEASURE),
}
'''
BESIDE = """from dataclasses import replace
from mtp_jax import DataConfig, HeadConfig, MeasureConfig, ModelConfig, OptimizerConfig, TrainConfig

TRUNK = TrainConfig(
    model=ModelConfig(vocab_size=264, d_model=16, d_ff=32, num_layers=1, num_heads=2, num_kv_heads=1,
                      context_length=64, dtype="float32"),
    head=HeadConfig(circuit="independent", window=1, rank=1, factors="full", balance="none"),
    data=DataConfig(source={source!r}, seq_len=16, batch_size=8, valid_fraction=0.5, cache_dir={cache!r}),
    optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
    steps=4, eval_every=2, eval_batches=1, checkpoint_every=2,
)
BASE = replace(
    TRUNK, head=HeadConfig(window=3, rank=1, factors="full", target="ntp"), steps=6, checkpoint_every=1,
    keep_checkpoints=6, base="trunk", ema_decay=0.5,
)
MEASURE = MeasureConfig(
    held_out_sequences=8, prompts=4, prompt_tokens=8, new_tokens=12, batch_size=2, temperatures=(0.7, 0.0),
    rounds=2, lengths={{"half": 0.5}},
)
"""
TINY = TrainConfig(optimizer=OptimizerConfig(warmup_steps=0))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    (root / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        words = rng.choice(["one", "two", "three", "four"], 40)
        (root / "texts" / f"{i}.txt").write_text(" ".join(words))
    (root / "beside.py").write_text(BESIDE.format(source=f"{root}/texts/*.txt", cache=str(root / "cache")))
    (root / "ranks.py").write_text(EXPERIMENT)
    sys.modules.pop("beside", None)
    return root / "ranks.py"


@pytest.fixture(scope="module")
def done(file):
    """One run of the sweep, after it was run: the directory, the results, and what was printed."""
    return go(file, "trunk", "costs", "rank=3,seed=0")


@pytest.fixture(scope="module")
def more(file, done):
    """Two more runs, of another seed."""
    return go(file, "rank=1,seed=1", "rank=3,seed=1")


def test_the_runs_of_a_grid():
    sweep = Sweep(TINY, {"head.rank": (1, 4), "seed": (0, 1)}, reference={"head.rank": 1})
    assert list(sweep.variants) == ["rank=1,seed=0", "rank=4,seed=0", "rank=1,seed=1", "rank=4,seed=1"]
    last = sweep.variants["rank=4,seed=1"]
    assert (last.config.head.rank, last.config.seed, last.config.data.seed) == (4, 1, 1)
    assert last.reference == "rank=1,seed=1" and last.shape == "rank=4,seed=0" and not last.whole
    assert sweep.variants["rank=4,seed=0"].whole


def test_cases_are_named_changes_of_several_fields():
    cases = {"none": {"head.balance": "none"}, "much": {"head.balance": "switch", "head.balance_weight": 1.0}}
    sweep = Sweep(TINY, {"head.rank": (2,)}, cases, reference={"case": "none"})
    assert list(sweep.variants) == ["none,rank=2", "much,rank=2"]
    much = sweep.variants["much,rank=2"]
    assert (much.config.head.balance, much.config.head.balance_weight, much.config.head.rank) == ("switch", 1.0, 2)
    assert much.changes == {"case": "much", "head.rank": 2, **cases["much"]} and much.reference == "none,rank=2"


def test_fields_with_one_last_name_are_told_apart():
    sweep = Sweep(TINY, {"seed": (0,), "data.seed": (3,)})
    assert list(sweep.variants) == ["seed=0,data.seed=3"]
    assert sweep.variants["seed=0,data.seed=3"].config.data.seed == 3  # what is said holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": {"head.rnk": (1,)}}, "HeadConfig has no field 'rnk'; did you mean 'rank'?"),
        ({"grid": {"steps.x": (1,)}}, "TrainConfig.steps has no fields, and 'steps.x' names one. Give 'steps'."),
        ({"grid": {"head.rank": (1, 0)}}, "HeadConfig.rank is 0; it must be at least 1."),
        ({"grid": {"head.rank": (2,)}, "reference": {"head.rank": 1}}, "which makes 'rank=1' of the run 'rank=2'"),
        ({"grid": {"head.rank": (2,)}, "reference": {"head.window": 1}}, "it must change some of head.rank to values"),
        (
            {"grid": {"seed": (0,)}, "first": {"seed=0": TINY}},
            "Sweep.first has the names ['seed=0'], which",
        ),
        ({"measure": {"prompts": 9, "batch_size": 2}}, "MeasureConfig.prompts is 9 and batch_size 2; it must divide"),
        ({"measure": {"temperatures": ()}}, "MeasureConfig.temperatures is (); give one or more"),
        ({"measure": {"lengths": {"half": 0.0}}}, "MeasureConfig.lengths has half at 0.0; it must lie in (0, 1]."),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_when_it_is_made(arguments, message):
    measure = arguments.pop("measure", {})
    with pytest.raises(ConfigError) as error:
        Sweep(TINY, measure=MeasureConfig(**measure), **arguments)
    assert message in str(error.value)


def test_fields_that_hold_together_are_changed_together():
    both = with_fields(TINY, {"head.circuit": "independent", "head.rank": 1})  # neither alone would do
    assert (both.head.circuit, both.head.rank) == ("independent", 1)


def test_a_run_of_a_sweep_is_an_experiment(file):
    config = load_experiment(f"{file}@tiny/rank=3,seed=1")
    assert (config.head.rank, config.seed, config.base) == (3, 1, "runs/ranks/tiny/trunk")
    assert load_experiment(f"{file}@tiny/trunk").head.window == 1
    assert default_run_dir(f"{file}@tiny/trunk") == "runs/ranks/tiny/trunk"
    assert load_sweep(str(file)).key == f"{file}@tiny" and load_sweep(str(file)).title == (
        "What does rank do to a tiny model?"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@tiny/rank=3,seed=", "is no run of the sweep; did you mean 'rank=3,seed=1'?"),
        ("@tny/trunk", "has no sweep 'tny'; did you mean 'tiny'?"),
        ("@tiny", "is a sweep; give one of its runs, as in"),
        ("", "It has sweeps: see mtp-jax sweep"),
    ],
)
def test_a_run_that_there_is_not_is_named(file, text, message):
    with pytest.raises(ConfigError) as error:
        load_experiment(f"{file}{text}")
    assert message in str(error.value)


def test_every_run_is_trained_measured_and_collected(done):
    results = done.results
    assert (results["sweep"], results["size"], results["format"]) == ("ranks", "tiny", 4)
    assert results["title"] == "What does rank do to a tiny model?" and results["reference"] == {"head.rank": 1}
    assert [run["name"] for run in results["runs"]] == ["rank=3,seed=0"]
    assert {run["state"] for run in results["runs"]} == {"done"} == {results["first"]["trunk"]["state"]}
    assert {"jax", "python"} <= set(results["versions"]) and results["machine"]["cores"] == os.cpu_count()
    assert "measuring: step 6: held-out loss" in done.out and "Wrote" in done.out


def test_what_is_measured_of_a_run(done):
    run = next(run for run in done.results["runs"] if run["name"] == "rank=3,seed=0")
    assert run["changes"] == {"head.rank": 3, "seed": 0} and run["config"]["head"]["rank"] == 3
    assert run["readings"]["steps"] == 6 and run["readings"]["half"] == 3
    assert 1 <= run["readings"]["flops"] < 6  # rank 3 costs more than rank 1
    cost = run["cost"]
    assert cost["over_next_token"]["predicted"] != cost["over_reference"]["predicted"]
    own = [(row["temperature"], row["k"]) for row in cost["decoding"] if row["dtype"] == "float32"]
    assert own == [(0.7, 0), (0.7, 1), (0.7, 2)]
    assert all(min(row["iteration_seconds"]) > 0 and len(row["iteration_seconds"]) == 2 for row in cost["decoding"])
    assert cost["over_reference"]["error"] > 0  # of the clock, which no two rounds agree on
    assert cost["over_reference"]["predicted"] > 1 and cost["seconds"] > 0 and cost["peak_bytes"] > 0
    assert [row["step"] for row in run["curve"]] == [2, 4, 6] or [row["step"] for row in run["curve"]][-1] == 6
    end = run["measured"]["6"]
    assert len(end["loss"]["offsets"]) == 3
    mean = sum(offset["mean"] for offset in end["loss"]["offsets"])
    assert end["loss"]["joint"]["mean"] == pytest.approx(mean)
    assert [(row["temperature"], row["draft"], row["k"]) for row in end["decoding"]] == [
        (0.7, "joint", 2), (0.7, "joint", 1), (0.0, "joint", 2),
    ]  # fmt: skip
    assert [len(row["acceptance"]) for row in end["decoding"]] == [2, 1, 2]
    for row in end["decoding"]:
        # 4 prompts of 12 tokens, of which prefill gives the first.
        assert sum(row["documents"]["emitted"]) == 44 and row["verification_steps"] == sum(row["documents"]["forwards"])
        found = row["tokens_per_forward"]
        assert found["mean"] == pytest.approx(44 / row["verification_steps"]) and found["low"] <= found["high"]
    assert [row["decoding"] and row["decoding"][0]["temperature"] for row in run["measured"].values()] == (
        [0.7] * len(run["measured"])
    )
    assert run["data_sha256"] == prepare(load_sweep(f"{done.file}@tiny").sweep.base.data).sha256
    assert run["begins_from"] == fingerprint(done.place.run("trunk"))


@pytest.mark.slow
def test_one_target_gives_all_ranks_the_same_text_to_measure(more):
    first = {run["name"]: run["measured"]["6"] for run in more.results["runs"]}
    losses = {tuple(found["documents"]["first_token"]) for found in first.values()}
    assert len(losses) == 1  # the frozen trunk's own head
    emitted = {tuple(found["decoding"][0]["documents"]["emitted"]) for found in first.values()}
    assert len(emitted) == 1


def test_what_was_measured_is_what_the_model_says(done):
    """The same losses from whole logits."""
    run = load(done.place.run("rank=3,seed=0"), weights="ema")
    measured = done.results["runs"][0]["measured"]["6"]["loss"]
    store = prepare(run.config.data)
    joint, first = [], []
    with jax.set_mesh(run.mesh):
        for _, tokens in measuring.stretches(store, 8, 16 + 3, 0):
            seen = run.model.see(tokens[None, :16].astype(np.int32))
            gate = np.asarray(run.model.head.log_weights(seen.x_BTD), np.float64)[0]
            logp = [np.asarray(jax.nn.log_softmax(of)[0], np.float64) for of in run.model.head.logits(seen)]
            for t in range(16):
                scores = (
                    gate[t] + logp[0][t, :, tokens[t + 1]] + logp[1][t, :, tokens[t + 2]] + logp[2][t, :, tokens[t + 3]]
                )
                joint.append(-np.logaddexp.reduce(scores))
            law = np.asarray(run.model.target(seen)[0])[0]
            first += (-law[np.arange(16), tokens[1:17]]).tolist()
    assert measured["joint"]["mean"] == pytest.approx(np.mean(joint), rel=1e-5)
    assert measured["first_token"]["mean"] == pytest.approx(np.mean(first), rel=1e-5)


def test_losses_are_of_all_held_out_documents(done):
    end = done.results["runs"][0]["measured"]["6"]
    store = prepare(load(done.place.run("trunk")).config.data)
    assert len(end["documents"]["joint"]) == min(8, len(store.valid)) > 1
    assert sum(end["documents"]["windows"]) == 8 * 16


def test_a_record_is_of_all_that_it_depends_on(done, file):
    """What changes the costs, the trunk or what is measured makes runs be measured again."""
    named, name = load_sweep(f"{file}@tiny"), "rank=3,seed=0"
    assert done.place.done(named, name)
    base, grid, first = named.sweep.base, named.sweep.grid, named.sweep.first

    def sweep(**changes):
        changed = dataclasses.replace(named.sweep, **changes)
        return dataclasses.replace(named, sweep=changed)

    assert not done.place.done(sweep(measure=dataclasses.replace(named.sweep.measure, prompts=2)), name)
    assert not done.place.done(sweep(base=dataclasses.replace(base, steps=7)), name)
    # A new rank asks for all costs anew, and so for all runs.
    assert not done.place.done(sweep(grid={**grid, "head.rank": (1, 2, 3)}), "costs")
    assert not done.place.done(sweep(reference={"head.rank": 3}), "costs")
    assert done.place.done(sweep(first=first), "costs") and done.place.done(named, "trunk")
    for path in (done.place.record("costs"), done.place.run("trunk") / "checkpoints" / "4" / "manifest.json"):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert not done.place.done(named, name), path
        path.write_bytes(before)
    assert done.place.done(named, name)


def test_a_measurement_that_fails_leaves_the_one_before(done, file):
    named, record = load_sweep(f"{file}@tiny"), done.place.record("rank=3,seed=0")
    before = record.read_bytes()
    more = dataclasses.replace(named.sweep, measure=dataclasses.replace(named.sweep.measure, prompts=1000))
    done.place.fail(dataclasses.replace(named, sweep=more), "rank=3,seed=0", "too many prompts")
    assert record.read_bytes() == before


def test_a_run_that_is_done_is_not_run_again(done, file):
    before = {path: path.stat().st_mtime_ns for path in done.place.directory.rglob("*") if path.is_file()}
    out = go(file, "rank=3,seed=0").out
    assert before == {path: path.stat().st_mtime_ns for path in done.place.directory.rglob("*") if path.is_file()}
    assert f"rank=3,seed=0 is done: {done.place.record('rank=3,seed=0')}" in out


def test_a_run_with_another_config_is_neither_taken_nor_lost(done, file, capsys):
    text = file.with_name("beside.py").read_text()
    try:
        file.with_name("beside.py").write_text(text.replace("window=3", "window=2"))
        sys.modules.pop("beside", None)
        with pytest.raises(SystemExit) as stopped:
            main(["sweep", f"{file}@tiny", "--only", "rank=3,seed=0", "--dir", str(done.place.directory)])
    finally:
        file.with_name("beside.py").write_text(text)
        sys.modules.pop("beside", None)
    assert stopped.value.code == 2
    assert (
        "is a run with head.window 3, and the sweep has 2; delete it, or give another --dir" in capsys.readouterr().err
    )
    assert (done.place.run("rank=3,seed=0") / "checkpoints" / "6").is_dir()
    assert json.loads(done.place.record("rank=3,seed=0").read_text())["state"] == "done"


def test_a_run_waits_for_what_it_begins_from(file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", f"{file}@tiny", "--only", "2", "--dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"rank=1,seed=0 needs trunk, which is not finished in {tmp_path}" in capsys.readouterr().err


def test_a_run_is_a_process_of_its_own_with_a_log(file, tmp_path):
    named, place = load_sweep(f"{file}@tiny"), Place(tmp_path)
    progress = runner.SweepProgress(named, place, lambda config: 1.0)
    for name in progress.rows.keys() - {"rank=1,seed=0"}:
        del progress.rows[name]  # so that it has nothing to begin from
    assert runner.run_all(named, place, progress, lambda: None) == ["rank=1,seed=0"]
    row = progress.rows["rank=1,seed=0"]
    assert row.error.startswith("status 2: mtp-jax: error: rank=1,seed=0 needs trunk, which is not finished")
    assert "mtp-jax: error: rank=1,seed=0 needs trunk" in place.log("rank=1,seed=0").read_text()


@pytest.mark.parametrize(
    "number, status",
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_run_that_goes_on_and_says_start_again(file, tmp_path, number, status):
    """It is sent to the sweep alone."""
    command = [sys.executable, "-m", "mtp_jax", "sweep", f"{file}@tiny", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        for line in process.stdout:
            if line.startswith("trunk: running"):
                break
        process.send_signal(number)
        assert process.wait(60) == status
        assert "Start the same command again" in process.stderr.read()
    ours = [cmd for cmd in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in cmd.read_bytes().decode()]
    assert not ours and not list(tmp_path.glob("records/*"))


@pytest.fixture
def fake(file, monkeypatch, tmp_path):
    """The sweep with runs that are not run: `statuses` says how each ends."""
    named, place, statuses = load_sweep(f"{file}@tiny"), Place(tmp_path), collections.defaultdict(int)
    ran = []

    def run(named, name, place, show, stop):
        ran.append(name)
        place.log(name).parent.mkdir(exist_ok=True)
        place.log(name).write_text(f"one line\n{name} has ended\n")
        if not statuses[name]:
            place.write(named, name, {"state": "done", "seconds": {"training": 10.0}})
        return statuses[name]

    monkeypatch.setattr(runner, "_run_in_process", run)

    def go():
        progress = runner.SweepProgress(named, place, lambda config: float(config.head.rank))
        return runner.run_all(named, place, progress, lambda: None), progress

    return types.SimpleNamespace(go=go, ran=ran, statuses=statuses, named=named, place=place)


def test_a_run_that_fails_is_kept_apart_and_tried_again(fake):
    fake.statuses["rank=3,seed=0"] = 1
    failed, progress = fake.go()
    assert failed == ["rank=3,seed=0"] and len(fake.ran) == 6
    assert progress.rows["rank=3,seed=0"].error == "status 1: rank=3,seed=0 has ended"
    record = fake.place.read(fake.named, "rank=3,seed=0")
    assert record is not None and record["state"] == "failed"
    fake.statuses["rank=3,seed=0"] = -9
    assert fake.go()[1].rows["rank=3,seed=0"].error == "status -9: rank=3,seed=0 has ended", "not the error of before"
    fake.statuses.clear()
    assert fake.go()[0] == [] and fake.ran[6:] == 2 * ["rank=3,seed=0"]


def test_a_preemption_ends_the_sweep_and_fails_nothing(fake):
    fake.statuses["rank=1,seed=0"] = 75
    with pytest.raises(PreemptedError, match="Start the same command again"):
        fake.go()
    assert fake.ran == ["trunk", "costs", "rank=1,seed=0"] and fake.place.read(fake.named, "rank=1,seed=0") is None


def test_the_time_left_is_of_the_work_that_is_left(fake):
    progress = runner.SweepProgress(fake.named, fake.place, lambda config: float(config.head.rank))
    assert progress.seconds_left(0.0) is None
    trunk = progress.rows["trunk"]
    trunk.state, trunk.seconds = "done", 10.0
    assert progress.seconds_left(0.0) == pytest.approx(10 * (1 + 1 + 3 + 1 + 3))
    progress.rows["rank=3,seed=0"].state, progress.begun = "running", 0.0
    assert progress.seconds_left(12.0) == pytest.approx(10 * (1 + 1 + 1 + 3) + 30 - 12)


def test_a_reading_gives_no_run_more_than_its_share_and_no_less():
    cost = {"over_reference": {"predicted": 2.0, "measured": 0.9}}
    found = measuring.readings_of(Steps(100, 100, 100), MeasureConfig(lengths={"third": 1 / 3}), cost)
    assert found == pytest.approx({"steps": 100, "flops": 50, "seconds": 100, "third": 100 / 3})
    longer, shorter = (measuring.readings_of(Steps(own, 100, 60), MeasureConfig(), cost) for own in (300, 60))
    assert longer == pytest.approx({"steps": 60, "flops": 50, "seconds": 100 / 0.9})
    assert shorter == pytest.approx({"steps": 60, "flops": 50, "seconds": 60})
    assert measuring.saved_step([20, 40, 60], 20, 59) == 40
    assert measuring.saved_step([20, 40, 60], 20, 59.5) == 60  # within a hundredth
    assert measuring.saved_step(list(range(1, 121)), 1, 110.4) == 110  # the nearest, not the latest that may be
    assert measuring.saved_step([20, 40, 50], 20, 50) == measuring.saved_step([20, 40, 50], 20, 49.8) == 50  # the end
    for kept, most in (([40], 19), ([20, 60], 59), ([20], 59)):
        with pytest.raises(ConfigError, match=r"due after \d+ steps \(at most \d+\), and the run has the checkpoints"):
            measuring.saved_step(kept, 20, most)


def test_what_is_measured_is_the_average_and_the_same_text_by_all(done):
    found = next(run for run in done.results["runs"] if run["name"] == "rank=3,seed=0")["measured"]["6"]
    config = dataclasses.replace(load_sweep(f"{done.file}@tiny").sweep.measure, prompts=2)
    losses = {}
    for weights in ("ema", "params"):
        run = load(done.place.run("rank=3,seed=0"), weights=weights)
        store = prepare(run.config.data, tokenizer=run.tokenizer)
        losses[weights] = measuring.held_out_losses(run, store, config.held_out_sequences)["loss"]["joint"]
        if weights == "ema":
            together, alone = (
                measuring.acceptance(run, store, dataclasses.replace(config, batch_size=size), 0.7, 1)
                for size in (2, 1)
            )
            assert alone == together
    assert losses["ema"] == pytest.approx(found["loss"]["joint"]) and losses["ema"] != pytest.approx(losses["params"])


def test_prompts_do_not_overlap(done):
    run = load(done.place.run("trunk"))
    store = prepare(run.config.data, tokenizer=run.tokenizer)
    found = measuring.stretches(store, 20, 8, 12)
    seen = collections.defaultdict(list)
    for document, tokens in found:
        text = store.valid[document]
        at = [i for i in range(0, len(text), 20) if np.array_equal(text[i : i + 8], tokens)]
        assert at and at[0] + 20 <= len(text)
        seen[document].append(at[0])
    assert all(len(set(starts)) == len(starts) for starts in seen.values())
    assert len(seen) == min(20, len(store.valid))  # every document before any twice
    with pytest.raises(ConfigError, match=r"100000 stretches were asked for, and the held-out documents have \d+"):
        measuring.stretches(store, 100_000, 8, 12)


def test_an_interval_covers_what_it_estimates():
    # Documents of different rates: 400 experiments of 40, 95% intervals. A right one covers 91 to 98% of them with
    # probability 0.999; that of independent forwards, which are not, about 60%.
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        rate = rng.beta(4, 4, 40)
        forwards = rng.integers(50, 150, 40)
        found = ratio_interval(rng.binomial(forwards, rate), forwards)
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.90 <= hits / 400 <= 0.98
    assert np.isnan(ratio_interval(np.zeros(3), np.zeros(3))["mean"])
