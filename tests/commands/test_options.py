"""Options of `mtp-jax train`: every field, the run directory, and what goes on with a run."""

import dataclasses
from types import SimpleNamespace

import pytest

from mtp_jax import cli
from mtp_jax.config import MeshConfig, OptimizerConfig, ProfileConfig, TrainConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.distributed import Distributed
from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig, RopeScaling
from mtp_jax.runs.layout import read_config, write_config
from mtp_jax.train import loop
from mtp_jax.train.loggers import read_metrics
from mtp_jax.validate import to_dict
from support.runs import contents

# What is looked at here is the command line; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


# Options

OTHER = TrainConfig(
    ModelConfig(
        **dict(
            vocab_size=260, num_tokens=257, d_model=32, d_ff=48, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8
        ),
        **dict(context_length=64, rope_theta=500.0, rope_scaling=RopeScaling(2.0, 1.5, 5.0, 32)),
        **dict(
            qkv_bias=True,
            qk_norm=True,
            tie_embeddings=True,
            norm_eps=1e-6,
            dtype="bfloat16",
            param_dtype="float16",
            remat="dots",
        ),
        attention="cudnn",
    ),
    HeadConfig(
        "mixture",
        4,
        "hmm",
        3,
        5,
        "lowrank",
        4,
        "ntp",
        0.5,
        0.9,
        1e-3,
        "switch",
        0.1,
        0.5,
        1.0,
        6,
        "block",
        **dict(
            encoder_layers=2,
            taps=(1, 2),
            nll_weight=0.5,
            kl_weight=0.1,
            tv_weight=0.2,
            acceptance_weight=0.3,
            lk_weight=0.4,
            temperature=0.8,
            draft_temperature=0.6,
        ),
    ),
    DataConfig(
        "tfds", "other/*.txt", "", "meta.text", "name", "test", 0.1, "elsewhere", "bytes", "", 24, 16, 5, max_bad=0.2
    ),
    OptimizerConfig("muon", 3e-3, "wsd", 3, 0.3, 0.2, 0.05, 0.8, 0.9, 1e-6, 0.9, 0.5, 3, 2.0),
    MeshConfig(2, 2, 2),
    ProfileConfig("3:5"),
    **dict(
        steps=20,
        grad_accumulation=2,
        eval_every=7,
        eval_batches=3,
        eval_temperatures=(0.5,),
        checkpoint_every=9,
        keep_checkpoints=4,
    ),
    **dict(log_every=6, log_to=("mlflow", "wandb"), ema_decay=0.9, base="runs/trunk", seed=11),
)


def flatten(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_every_field_can_be_set(experiment, tmp_path, monkeypatch):
    from mtp_jax.commands.experiment import load_experiment

    before, fields = dict(flatten(to_dict(load_experiment(str(experiment))))), dict(flatten(to_dict(OTHER)))
    assert [name for name, value in fields.items() if before[name] == value] == [
        "head.kind",
        "head.loss_fraction",
        "head.attention",
        "head.per_offset",
        "data.separator",
        "data.tokenizer",
        "data.end_of_document",
        "init_from",
    ]
    options = []
    for name, value in fields.items():
        if value is False:  # what is not switched on
            continue
        words = value if isinstance(value, tuple) else [] if value is True else [value]
        options += ["--" + name.replace("_", "-"), *map(str, words)]

    class Begun(Exception):
        """Training has begun, with this config."""

    def begin(config, tokenizer):
        raise Begun(config)

    base = SimpleNamespace(resolve=lambda config: config, tokenizer=ByteTokenizer())
    monkeypatch.setattr(loop, "open_base", lambda *_: base)
    monkeypatch.setattr(loop, "check_sinks", lambda names: None)  # which may not be installed
    monkeypatch.setattr(loop, "check_machine", begin)
    monkeypatch.chdir(tmp_path)  # the cache directory is relative
    with pytest.raises(Begun) as begun:
        cli.main(["train", str(experiment), "--run-dir", f"{tmp_path}/run", *options])
    assert begun.value.args == (OTHER,)


FLAGS = {"resume": False, "overwrite": False, "resume_step": None, "distributed": Distributed()}


def test_the_run_directory_has_the_experiments_name_and_flags_are_passed_on(experiment, run, calls):
    cli.main(["train", str(experiment)])
    cli.main(["train", str(experiment), "--run-dir", str(run.dir), "--resume", "--from-step", "4"])
    cli.main(["train", str(experiment), "--overwrite"])
    assert [(run_dir, flags) for _, run_dir, flags in calls] == [
        ("runs/small_cpd", FLAGS),
        (str(run.dir), {**FLAGS, "resume": True, "resume_step": 4}),
        ("runs/small_cpd", {**FLAGS, "overwrite": True}),
    ]


# Resuming


def test_a_run_goes_on_by_its_own_config(experiment, run, calls, capsys):
    """Not by what the experiment says now; and what is set on the command line changes it."""
    own = read_config(run.dir)
    cli.main(["train", str(experiment), "--run-dir", str(run.dir), "--resume"])
    assert capsys.readouterr().out == f"--resume: data.seed is 7 in this run (0 in {experiment})\n"
    options = ["--steps", "12", "--head.gamma", "0.5", "--optimizer.warmup-steps", "10"]
    cli.main(["train", str(experiment), *options, "--resume", "--run-dir", str(run.dir)])
    assert capsys.readouterr().out.splitlines() == [
        f"--resume: head.gamma is 0.5 in this run (1.0 in {experiment})",
        f"--resume: data.seed is 7 in this run (0 in {experiment})",
        f"--resume: optimizer.warmup_steps is 10 in this run (2 in {experiment})",
        f"--resume: steps is 12 in this run (8 in {experiment})",
    ]
    changed = dataclasses.replace(
        own,
        head=dataclasses.replace(own.head, gamma=0.5),
        optimizer=dataclasses.replace(own.optimizer, warmup_steps=10),
        steps=12,
    )
    flags = {**FLAGS, "resume": True}
    assert calls == [(own, str(run.dir), flags), (changed, str(run.dir), flags)]


def test_an_option_need_fit_the_run_alone(experiment, copy, calls, refused):
    """The run may be longer than the experiment, so that its warm-up may be."""
    write_config(copy, dataclasses.replace(read_config(copy), steps=40))
    resume = ("train", experiment, "--run-dir", copy, "--resume")
    cli.main([*map(str, resume), "--optimizer.warmup-steps", "30"])
    ((config, *_),) = calls
    assert (config.optimizer.warmup_steps, config.steps) == (30, 40)
    message = refused(*resume, "--optimizer.warmup-steps", 41)
    assert "optimizer.warmup_steps is 41 and steps is 40" in message and len(calls) == 1
    assert "--model.d-model" in refused(*resume, "--model.d-modle", 16), "the nearest is still found"


def test_a_run_is_resumed_to_more_steps(experiment, copy, capsys):
    before = read_config(copy)
    cli.main(["train", str(experiment), "--run-dir", str(copy), "--resume", "--steps", "10"])
    output = capsys.readouterr().out
    assert f"--resume: steps is 10 in this run (8 in {experiment})" in output
    assert f"{copy}: resuming at step 8, 10 steps of 8 x 16 tokens" in output
    assert read_config(copy) == dataclasses.replace(before, steps=10)
    steps = [record["step"] for record in read_metrics(copy) if record["kind"] == "train"]
    assert steps == list(range(1, 11)) and (copy / "checkpoints" / "10").exists()


def test_a_refused_resume_changes_nothing(experiment, copy, refused):
    before = contents(copy)
    resume = ("train", experiment, "--run-dir", copy, "--resume")
    message = refused(*resume, "--steps", 7)
    assert f"the run in {copy} is at step 8 and steps is 7; set --steps to 8 or more." in message
    file = experiment.parent / "corpus" / prepare(read_config(copy).data).train.names[0]
    text, sha256 = file.read_text(), prepare(read_config(copy).data).sha256
    try:
        file.write_text(text.swapcase())
        message = refused(*resume, "--steps", 12)
        assert prepare(read_config(copy).data).sha256[:12] in message and sha256[:12] in message
    finally:
        file.write_text(text)
    assert "head.rank is 3 and the run in" in refused(*resume, "--head.rank", 3)
    assert "Both --resume and --overwrite" in refused(*resume, "--overwrite")
    assert contents(copy) == before
