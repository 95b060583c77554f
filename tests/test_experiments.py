"""Every experiment file says how it is run and what to expect, fits one device, and its step can be traced."""

import ast
import dataclasses
import json
import re
import runpy

import jax
import pytest

from mtp_jax.commands.experiment import load_experiment, load_sweep
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.heads.config import AGAINST_TARGET
from mtp_jax.train.step import make_trainer
from mtp_jax.validate import to_dict
from support import REPOSITORY, tiny

SCRIPTS = {
    "checkpoint_cost",
    "gpu_check",
    "iteration_cost",
    "iteration_parts",
    "plain_loop",
}  # what is run with Python, and has no CONFIG
SHARED = {"setting", "prompts"}  # what recipes import
ON_BASE = {"head_on_base", "pretrained"}  # whose model is that of the base which the command names
FILES = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "experiments").glob("*.py"))
FILES = [path for path in FILES if path.stem not in SCRIPTS | SHARED]
RECIPES = [path for path in FILES if "SWEEPS = " in (REPOSITORY / path).read_text()]
EXPERIMENTS = [path for path in FILES if path not in RECIPES]
RESULTS = sorted((REPOSITORY / "experiments" / "results").glob("*.json"))


@pytest.fixture(params=EXPERIMENTS, ids=lambda path: path.stem)
def file(request, monkeypatch):
    """An experiment file, as it is called from the root of the repository."""
    monkeypatch.chdir(REPOSITORY)
    return request.param


def load(file):
    """The config of an experiment, on a small model where it has none of its own."""
    config = load_experiment(str(file))
    if file.stem in ON_BASE:
        config = dataclasses.replace(config, model=tiny.model_config(vocab_size=8192, context_length=512))
    return config


def test_there_are_experiments():
    assert "code_cpu" in [path.stem for path in EXPERIMENTS]


def test_an_experiment_says_how_it_is_run_what_it_costs_and_what_to_expect(file):
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text, f"{file} has no docstring"
    assert re.search(rf"^ *mtp-jax train {re.escape(str(file))}\b", text, re.MULTILINE)
    for word, about in (("Cost", "minutes|hours|seconds"), ("Expect", "loss")):
        (paragraph,) = re.findall(rf"^{word}:(.+?)(?:\n\n|\n[A-Z]\w+:|\Z)", text, re.MULTILINE | re.DOTALL)
        assert re.search(r"\d", paragraph) and re.search(about, paragraph), f"{word}: {paragraph}"


def test_an_experiment_fits_its_tokenizer_and_one_device(file):
    config = load(file)
    kind, _, path = config.data.tokenizer.partition(":")
    if kind == "bytes":
        config.with_tokenizer(load_tokenizer("bytes").vocab_size)
    else:  # made by the command that the docstring gives
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert f"--vocab-size {config.model.vocab_size} --out {path}\n" in text
    config.check_mesh((1, 1, 1))


def test_the_step_of_an_experiment_can_be_traced(file):
    config = load(file)
    with tiny.mesh():
        trainer = make_trainer(config)
        state = jax.eval_shape(trainer.init)
        new, metrics = jax.eval_shape(trainer.step, state, tiny.make_batch(config))
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (state, new)]
    assert shapes[0] == shapes[1]
    assert metrics["loss_offset"].shape == (config.head.window,) and metrics["loss"].shape == ()


@pytest.mark.slow
def test_the_iteration_cost_script_measures_every_width_in_both_dtypes():
    measure = runpy.run_path(str(REPOSITORY / "experiments" / "iteration_cost.py"))["measure"]
    with tiny.mesh():
        seconds = measure(
            tiny.model_config(context_length=512), tiny.head_config(window=2), 2, 0.5, rounds=1, forwards=2
        )
    assert list(seconds) == [(dtype, k) for dtype in ("float32", "bfloat16") for k in (0, 1)]
    assert min(seconds.values()) > 0


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request, monkeypatch):
    """A file of sweeps, as it is called from the root of the repository."""
    monkeypatch.chdir(REPOSITORY)
    return request.param


def test_a_recipe_says_how_it_is_run_and_reported(recipe):
    text = ast.get_docstring(ast.parse(recipe.read_text())) or ""
    assert re.search(rf"^ *mtp-jax sweep {re.escape(str(recipe))}( |$)", text, re.MULTILINE)
    assert f"mtp-jax report experiments/results/{recipe.stem}-cpu.json" in text
    if any(file.stem == f"{recipe.stem}-cpu" for file in RESULTS):
        assert "\nCost on two" in text and f"\nFound (results/{recipe.stem}-cpu.json" in text


def test_a_recipe_is_for_two_cores_and_for_a_gpu(recipe):
    others = {"heads": ("rates", "bytes"), "losses": ("long",)}
    for size in ("cpu", "gpu", *others.get(recipe.stem, ())):
        named = load_sweep(f"{recipe}@{size}")
        for run in named.runs:
            config = named.config(run)
            config.check_mesh((1, 1, 1))
            if config.data.tokenizer == "bytes":
                config.with_tokenizer(load_tokenizer("bytes").vocab_size)
        for variant in named.sweep.variants.values():
            # Every reading needs a saved step, and all of them are kept.
            every, steps = variant.config.checkpoint_every, variant.config.steps
            assert steps % every == 0 and variant.config.keep_checkpoints >= steps // every
            assert all(fraction * steps >= every for fraction in named.sweep.measure.lengths.values())
            assert variant.config.optimizer.schedule == "constant"
            measure = named.sweep.measure
            assert measure.prompt_tokens + measure.new_tokens <= variant.config.model.context_length


def in_todays_names(head):
    """What a file of results says of a head. Older ones call the circuit its kind, and none of them had draws, an
    encoder or a loss against the target's law."""
    later = {"encoder": "none", "nll_weight": 1.0, "temperature": 1.0, "circuit_width": 0}
    later |= {"draft_temperature": 1.0, "attention": False, "per_offset": False, "encoder_layers": 1, "taps": []}
    head = later | dict.fromkeys(AGAINST_TARGET, 0.0) | head
    if "circuit" in head:
        return head
    assert head["backward_draws"] == 0
    kept = {name: value for name, value in head.items() if name != "backward_draws"}
    return kept | {"kind": "mixture", "circuit": head["kind"]}


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.stem)
def test_the_heads_of_a_recipe_are_those_of_its_results(file, monkeypatch):
    """A default that changes must not change what a recipe trains: its runs could not go on."""
    monkeypatch.chdir(REPOSITORY)
    recipe, size = file.stem.rsplit("-", 1)
    named, found = load_sweep(f"experiments/{recipe}.py@{size}"), json.loads(file.read_text())
    configs = {run["name"]: run["config"] for run in found["runs"]}
    configs |= {name: run["config"] for name, run in found["first"].items()}
    for name, config in configs.items():
        head = json.loads(json.dumps(to_dict(named.config(name))["head"]))  # which has lists, as the file has
        assert head == in_todays_names(config["head"]), name


def test_the_ranks_of_the_primary_comparison_have_one_target():
    for file in ("rank_code", "rank_text"):
        named = load_sweep(str(REPOSITORY / "experiments" / f"{file}.py"))
        for variant in named.sweep.variants.values():
            assert (variant.config.base, variant.config.head.target) == ("trunk", "ntp")
