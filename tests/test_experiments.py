"""Every experiment file says how it is run and what to expect, fits one device, and its step can be traced."""

import ast
import re
import runpy
from pathlib import Path

import jax
import pytest
import tiny

from mtp_jax.commands.experiment import load_experiment
from mtp_jax.data import load_tokenizer
from mtp_jax.train.step import make_trainer

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = {"checkpoint_cost", "gpu_check", "iteration_cost", "plain_loop"}  # what is run with Python, and has no CONFIG
EXPERIMENTS = sorted(
    path.relative_to(REPOSITORY) for path in (REPOSITORY / "experiments").glob("*.py") if path.stem not in SCRIPTS
)


@pytest.fixture(params=EXPERIMENTS, ids=lambda path: path.stem)
def file(request, monkeypatch):
    """An experiment file, as it is called from the root of the repository."""
    monkeypatch.chdir(REPOSITORY)
    return request.param


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
    config = load_experiment(str(file))
    config.check_tokenizer(load_tokenizer(config.data.tokenizer, config.data.end_of_document).vocab_size)
    config.check_mesh((1, 1, 1))


def test_the_step_of_an_experiment_can_be_traced(file):
    config = load_experiment(str(file))
    with tiny.mesh():
        trainer = make_trainer(config)
        state = jax.eval_shape(trainer.init)
        new, metrics = jax.eval_shape(trainer.step, state, tiny.make_batch(config))
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (state, new)]
    assert shapes[0] == shapes[1]
    assert metrics["loss_offset"].shape == (config.head.window,) and metrics["loss"].shape == ()


def test_the_iteration_cost_script_measures_every_width_in_both_dtypes():
    measure = runpy.run_path(str(REPOSITORY / "experiments" / "iteration_cost.py"))["measure"]
    with tiny.mesh():
        seconds = measure(
            tiny.model_config(context_length=512), tiny.head_config(window=2), 2, 0.5, rounds=1, forwards=2
        )
    assert list(seconds) == [(dtype, k) for dtype in ("float32", "bfloat16") for k in (0, 1)]
    assert min(seconds.values()) > 0
