"""Sinks: what Weights & Biases and MLflow are told, and that a run neither needs them nor waits for them.

Both are fakes here: modules that write down how they were called.
"""

import dataclasses
import importlib.machinery
import json
import sys
import threading
import types

import pytest
from etils import epath

from mtp_jax.config import TrainConfig
from mtp_jax.runs.layout import SINK_FILES, WRITTEN, clear_run, read_config, write_config
from mtp_jax.train import checks, loop, sinks
from mtp_jax.train.loggers import Loggers, last_steps
from mtp_jax.validate import ConfigError, to_dict

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Fake:
    """A library: its calls in order, and what to do before one of them, by its name."""

    def __init__(self, name):
        self.calls, self.before = [], {}
        self.module = types.ModuleType(name)
        self.module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=f"{name}.py")

    def called(self, name, /, *args, **kwargs):
        self.before.get(name, lambda: None)()
        self.calls.append((name, args, kwargs))

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("PROJECT", "NAME", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name in ("EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_NAME"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake("wandb")

    def init(**kwargs):
        fake.called("init", **kwargs)
        log = lambda data, step: fake.called("log", data, step=step)  # noqa: E731
        return types.SimpleNamespace(id=kwargs["id"] or "made", log=log, finish=lambda: fake.called("finish"))

    fake.module.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake.module)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    fake = Fake("mlflow")

    def start_run(**kwargs):
        fake.called("start_run", **kwargs)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=kwargs.get("run_id") or "made"))

    fake.module.start_run = start_run
    for name in ("set_experiment", "log_params", "log_metrics", "end_run"):
        setattr(fake.module, name, lambda *args, name=name, **kwargs: fake.called(name, *args, **kwargs))
    monkeypatch.setitem(sys.modules, "mlflow", fake.module)
    return fake


CONFIG = {"model": {"d_model": 16, "num_tokens": None}, "steps": 8, "log_to": ("wandb",)}


def test_wandb_is_told_the_config_and_every_record_at_its_step(wandb, tmp_path):
    run_dir = tmp_path / "mine"
    with Loggers(run_dir, 8, log_to=("wandb", "wandb"), config=CONFIG) as some:
        some.log("train", 1, {"loss": 2.5, "mfu": None})
        some.log("eval", 1, {"loss": 2.25})
        some.log("train", 2, {"loss": 1.5})
    expected = dict(project="mtp_jax", name="mine", id=None, resume="allow", dir=str(run_dir), config=CONFIG)
    expected |= dict(allow_val_change=True, settings={"console": "off", "finish_timeout": sinks.PATIENCE / 2})
    logs = [({"train/loss": 2.5}, 1), ({"eval/loss": 2.25}, 1), ({"train/loss": 1.5}, 2)]
    calls = [("init", (), expected), *(("log", (data,), {"step": step}) for data, step in logs), ("finish", (), {})]
    assert wandb.calls == calls
    assert json.loads((run_dir / "wandb.json").read_text())["id"] == "made"


def test_mlflow_is_told_the_config_and_every_record_at_its_step(mlflow, tmp_path):
    config = {**CONFIG, "long": "x" * 7000, "many": {f"n{i}": i for i in range(150)}}
    with Loggers(tmp_path / "mine", 8, log_to=("mlflow",), config=config) as some:
        some.log("train", 1, {"loss": 2.5})
        some.log("eval", 1, {"loss": 2.25})
    assert [name for name, *_ in mlflow.calls] == (
        ["set_experiment", "start_run", "log_params", "log_params", "log_metrics", "log_metrics", "end_run"]
    )
    assert mlflow.of("set_experiment") == [(("mtp_jax",), {})]
    assert mlflow.of("start_run") == [((), {"run_name": "mine"})]
    params = [args[0] for args, _ in mlflow.of("log_params")]
    assert [len(part) for part in params] == [100, 55]
    merged = params[0] | params[1]
    assert merged["model.d_model"] == "16" and merged["model.num_tokens"] == "None" and merged["many.n149"] == "149"
    assert merged["long"] == "x" * 6000
    assert mlflow.of("log_metrics") == [(({"train/loss": 2.5},), {"step": 1}), (({"eval/loss": 2.25},), {"step": 1})]


def test_projects_and_names_are_those_of_the_environment(wandb, mlflow, tmp_path, monkeypatch):
    for name, value in {"WANDB_PROJECT": "theirs", "WANDB_NAME": "n", "WANDB_DIR": "/d"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "n")
    Loggers(tmp_path, 8, log_to=("wandb", "mlflow")).close()
    (_, told) = wandb.of("init")[0]
    assert (told["project"], told["name"], told["dir"]) == ("theirs", "n", "/d")
    assert mlflow.of("set_experiment") == [], "MLflow reads it itself"
    assert mlflow.of("start_run") == [((), {"run_name": "n"})]


@pytest.mark.parametrize("name", sinks.SINKS)
def test_a_resumed_run_is_the_same_one_there_and_nothing_is_logged_twice(wandb, mlflow, tmp_path, name):
    fake, record = {"wandb": (wandb, "log"), "mlflow": (mlflow, "log_metrics")}[name]

    def told(steps, evaluated, **options):
        fake.calls.clear()
        with Loggers(tmp_path, 12, log_to=(name,), config=CONFIG, **options) as some:
            for step in steps:
                some.log("train", step, {"loss": 1 / step})
                if step in evaluated:
                    some.log("eval", step, {"loss": 1.0})
        return [(next(iter(args[0])).partition("/")[0], kwargs["step"]) for args, kwargs in fake.of(record)]

    both = [("train", step) for step in range(1, 5)] + [("eval", 4)]
    assert told(range(1, 8), [4]) == both + [("train", step) for step in (5, 6, 7)]
    # Killed in step 8, resumed from 4 and killed in 6, resumed from 4 again: of 5 to 7 the service has the first ones.
    assert told([5], [], resume_from=4) == []
    assert told([5, 6, 7, 8], [8], resume_from=4) == [("train", 8), ("eval", 8)]
    ids = fake.of("init" if name == "wandb" else "start_run")
    assert [kwargs["id" if name == "wandb" else "run_id"] for _, kwargs in ids] == ["made"]
    assert fake.of("set_experiment") == fake.of("log_params") == [], "MLflow's parameters cannot change"
    # A run that begins anew is another one.
    assert told([1], []) == [("train", 1)]
    assert fake.of("init" if name == "wandb" else "start_run")[0][1].get("id") is None


def test_a_sink_that_comes_later_is_told_all_from_there_on(wandb, tmp_path):
    with Loggers(tmp_path, 8) as some:
        for step in range(1, 8):
            some.log("train", step, {"loss": 1.0})
    with Loggers(tmp_path, 8, resume_from=4, log_to=("wandb",)) as some:
        some.log("train", 5, {"loss": 1.0})
    assert wandb.of("init")[0][1]["id"] is None and [kwargs["step"] for _, kwargs in wandb.of("log")] == [5]


def test_a_file_that_makes_no_sense_begins_a_new_run_there(wandb, tmp_path):
    with Loggers(tmp_path, 8) as some:
        some.log("train", 3, {"loss": 1.0})
    assert last_steps(tmp_path) == {"train": 3} and last_steps(tmp_path / "none") == {}
    for text in ("", "[]", '{"id": "a"}', '{"id": "a", "logged": 3}'):
        (tmp_path / "wandb.json").write_text(text)
        wandb.calls.clear()
        Loggers(tmp_path, 8, resume_from=2, log_to=("wandb",)).close()
        assert wandb.of("init")[0][1]["id"] is None


class LibraryError(Exception): ...


def fails():
    raise LibraryError("the network is gone")


@pytest.mark.parametrize(
    "sink, call", [("wandb", c) for c in ("init", "log", "finish")] + [("mlflow", "log_metrics"), ("mlflow", "end_run")]
)
def test_a_sink_that_fails_is_said_once_and_the_run_goes_on(wandb, mlflow, tmp_path, capsys, sink, call):
    fake = {"wandb": wandb, "mlflow": mlflow}[sink]
    fake.before[call] = fails
    with Loggers(tmp_path, 8, log_to=(sink,)) as some:
        for step in range(1, 9):
            some.log("train", step, {"loss": 1.0})
    said = capsys.readouterr().err
    name = type(some._loggers[0]).__name__
    assert said.count("warning") == 1 and f"{name} cannot write (LibraryError: the network is gone)" in said
    assert last_steps(tmp_path) == {"train": 8}


def test_a_record_that_fails_does_not_stop_the_next_one(wandb, tmp_path):
    once = iter([fails])
    wandb.before["log"] = lambda: next(once, lambda: None)()
    with Loggers(tmp_path, 8, log_to=("wandb",)) as some:
        for step in (1, 2, 3):
            some.log("train", step, {"loss": 1.0})
    assert [kwargs["step"] for _, kwargs in wandb.of("log")] == [2, 3]


def test_a_sink_that_hangs_holds_nothing_up(wandb, tmp_path, capsys, monkeypatch):
    """Neither training nor its end, which waits for a while."""
    monkeypatch.setattr(sinks, "PATIENCE", 0.05)
    monkeypatch.setattr(sinks, "HELD", 10)
    free = threading.Event()
    wandb.before["log"] = free.wait
    try:
        with Loggers(tmp_path, 50, log_to=("wandb",)) as some:
            for step in range(1, 51):
                some.log("train", step, {"loss": 1.0})
        said = capsys.readouterr().err
        assert said.count("WandbSink cannot write (TimeoutError: 10 records wait for it; others are lost)") == 1
        assert last_steps(tmp_path) == {"train": 50}
    finally:
        free.set()


def test_the_end_of_a_run_says_that_it_did_not_wait(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "PATIENCE", 0.05)
    free = threading.Event()
    wandb.before["finish"] = free.wait
    sink = sinks.WandbSink(tmp_path, {})
    with pytest.raises(OSError, match=r"it was not done after 0\.05 s"):
        sink.close()
    free.set()


def test_other_processes_tell_nobody(wandb, tmp_path):
    with Loggers(tmp_path, 8, enabled=False, log_to=("wandb",)) as some:
        some.log("train", 1, {"loss": 1.0})
    assert wandb.calls == []


def test_a_library_that_is_missing_is_refused_before_anything(config, fake, tmp_path, monkeypatch):
    """A folder that W&B left in the working directory is no library."""
    trainer = fake()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "mlflow")
    (tmp_path / "elsewhere" / "mlflow").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    with pytest.raises(ConfigError, match=r"'mlflow', which is not installed; `pip install 'mtp_jax\[mlflow\]'`"):
        loop.train(dataclasses.replace(config, log_to=("mlflow",)), tmp_path / "run")
    assert trainer.events == [] and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"log_to is \('comet',\); it must be .*'wandb', 'mlflow'"):
        TrainConfig(log_to=("comet",))  # type: ignore[arg-type]


def test_a_run_tells_its_sinks_and_may_get_others_when_it_goes_on(config, fake, wandb, mlflow, tmp_path):
    fake()
    run_dir = tmp_path / "run"
    loop.train(dataclasses.replace(config, log_to=("wandb",)), run_dir)
    (_, told) = wandb.of("init")[0]
    assert told["config"] == to_dict(read_config(run_dir)) and told["config"]["log_to"] == ("wandb",)
    train = [kwargs["step"] for (data,), kwargs in wandb.of("log") if "train/loss" in data]
    assert train == list(range(1, 9)) and mlflow.calls == []
    longer = dataclasses.replace(config, log_to=("wandb", "mlflow"), steps=10)
    checks.check_same_run(longer, config, epath.Path("RUN"))
    loop.train(longer, run_dir, resume=True)
    train = [kwargs["step"] for (data,), kwargs in wandb.of("log") if "train/loss" in data]
    assert train == list(range(1, 11)) and wandb.of("init")[1][1]["id"] == "made"
    assert [kwargs["step"] for (data,), kwargs in mlflow.of("log_metrics") if "train/loss" in data] == [9, 10]


def test_overwriting_a_run_forgets_the_ids(config, tmp_path):
    assert {f"{name}.json" for name in sinks.SINKS} == set(SINK_FILES) < set(WRITTEN)
    write_config(tmp_path, config)
    for name in (*SINK_FILES, "mine.json"):
        (tmp_path / name).write_text("{}")
    clear_run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.json"]
