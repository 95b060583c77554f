"""The notebooks run from top to bottom, and what is committed shows what they do and nothing of a machine."""

import dataclasses
import os
import re
import subprocess
import sys

import nbformat
import pytest

from mtp_jax.runs.layout import read_config
from mtp_jax.train.loop import train
from support import REPOSITORY, tiny
from support.pretrained import write

NOTEBOOKS = REPOSITORY / "experiments" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
PICTURES = {"faster_pretrained": 4, "reload_checkpoint": 4, "train_in_a_notebook": 2}
COLOURED = {"faster_pretrained": 1, "reload_checkpoint": 1, "train_in_a_notebook": 2}
LARGEST = 600_000  # bytes


# What is looked at here is what notebooks show; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A tiny run whose context holds what the notebook decodes."""
    root = tmp_path_factory.mktemp("notebooks")
    data = tiny.text_data(root, 80, valid_fraction=0.3)
    model = tiny.model_config(vocab_size=264, context_length=512)
    config = tiny.train_config(model, steps=4, eval_batches=2, eval_every=4, checkpoint_every=4)
    train(dataclasses.replace(config, data=data), root / "run")
    return root / "run"


def execute(name, out, **environment):
    """Execute a notebook in a process of its own, as `execute.py` does for a person; the process that ended."""
    command = [sys.executable, NOTEBOOKS / "execute.py", NOTEBOOKS / f"{name}.ipynb", "--out", out]
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, **{key: str(value) for key, value in environment.items()}}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def executed(name, out, **environment):
    done = execute(name, out, **environment)
    assert done.returncode == 0, done.stderr
    return nbformat.read(out, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def check(notebook, name):
    """What holds of a notebook that was executed, here or by whoever committed it."""
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    found = outputs(notebook)
    assert not [o for o in found if o.output_type == "error" or o.get("name") == "stderr"], "a cell failed or warned"
    data = [output.data for output in found if "data" in output]
    assert sum("image/png" in part for part in data) == PICTURES[name]
    pages = [part["text/html"] for part in data if "text/html" in part]
    assert len(pages) == COLOURED[name]
    asked = {"faster_pretrained": "Python function"}.get(name, "sel")
    assert all("tokens per forward]" in page and asked in page for page in pages), "prompt and counts"
    assert not any(cell.metadata for cell in notebook.cells), "times, or a person's settings"
    assert notebook.metadata.language_info == {"name": "python"}


def test_each_notebook_is_known():
    assert set(NAMES) == set(PICTURES) == set(COLOURED)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_was_executed_and_shows_nothing_of_the_machine(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    check(notebook, name)
    assert path.stat().st_size < LARGEST
    pages = [o.data["text/html"] for o in outputs(notebook) if "text/html" in o.get("data", {})]
    assert any("font-weight: bold" in page for page in pages), "some draft was accepted"
    for output in outputs(notebook):
        for text in (output.get("text", ""), *(v for k, v in output.get("data", {}).items() if "image" not in k)):
            assert not re.search(r"(?<![\w.])/(home|Users|root|tmp|work|usr|opt|var|mnt)/|[A-Z]:\\|0x[0-9a-f]{6}", text)


def test_code_cells_are_linted_and_formatted():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, NOTEBOOKS], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_checkpoint_is_reloaded_and_looked_at(run_dir, tmp_path):
    notebook = executed("reload_checkpoint", tmp_path / "out.ipynb", RUN=run_dir)
    check(notebook, "reload_checkpoint")
    text = printed(notebook)
    assert f"step 4: a cpd head with R = {tiny.RANK} components over the next W = {tiny.WINDOW} tokens" in text
    assert "the same text: True" in text
    (table,) = [o.data["text/markdown"] for o in outputs(notebook) if "text/markdown" in o.get("data", {})]
    header, _, *lines = [row.strip("| ").split(" | ") for row in table.splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    # Where another dtype is faster for k = 0, that is in the table too.
    found = [row for row in rows if row.get("dtype", "float32") == "float32"]
    names = ("T", "verifier", "k", "identical")
    assert [[row[n] for n in names] for row in found] == [["0.7", "coupled", str(k), "yes"] for k in range(tiny.WINDOW)]


@pytest.mark.slow
def test_from_a_models_file_to_a_head_its_report_and_its_notebook(tmp_path):
    """Every stage of `experiments/pretrained.py`, on a model of a few thousand parameters; a second time nothing is
    made again."""
    pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
    directory, _, _ = write(tmp_path / "source", max_position_embeddings=1024)
    script = """
import sys, pathlib
sys.path[:0] = ["experiments"]
import pretrained
pretrained.fast_in_bfloat16 = lambda: False
pretrained.SIZES["tiny"] = pretrained.Size(30, 6, 1, 60, 1, training=("--head.shortlist", "64"))
pretrained.main("tiny", pathlib.Path(sys.argv[1]))
"""
    # Steps are counted by a process of its own, which knows the recipe's head alone.
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "steps.json").write_text('{"steps": 60, "minutes": 1}')
    environment = {**os.environ, "MTP_JAX_DEMO_MODEL": str(directory), "PYTHONPATH": str(REPOSITORY)}
    for again in (False, True):
        command = [sys.executable, "-c", script, str(tmp_path / "all")]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("own is there" in done.stdout) == ("report.md is there" in done.stdout) == again
        assert "greedy: passed" in done.stdout or again
        assert len(re.findall(r"tokens/s, and [\d.]+ without drafts", done.stdout)) == 3
    report = (tmp_path / "all" / "head" / "report.md").read_text()
    assert "mean of categories" in report and "(auto)" in report

    places = {"RUN": tmp_path / "all" / "head", "SUITE": tmp_path / "all" / "suite.jsonl"}
    notebook = executed("faster_pretrained", tmp_path / "out.ipynb", **places)
    check(notebook, "faster_pretrained")
    assert "sequential, W = 4" in printed(notebook) and "the same text: True" in printed(notebook)


def test_without_a_run_the_notebook_says_how_to_get_one(tmp_path):
    done = execute("reload_checkpoint", tmp_path / "out.ipynb", RUN=tmp_path / "nothing")
    assert done.returncode == 1 and not (tmp_path / "out.ipynb").exists()
    assert f"There is no run in {tmp_path}/nothing. Make one with `make demo`, or set RUN" in done.stderr


@pytest.mark.slow
def test_a_run_is_trained_in_a_notebook_and_one_that_is_there_is_left_alone(tmp_path):
    notebook = executed("train_in_a_notebook", tmp_path / "out.ipynb", RUN=tmp_path / "run", STEPS=4)
    check(notebook, "train_in_a_notebook")
    losses = re.search(r"held-out loss at step 4: (\d+\.\d+), reloaded: (\d+\.\d+)", printed(notebook))
    assert losses and float(losses[1]) == pytest.approx(float(losses[2]), rel=1e-4)
    assert read_config(tmp_path / "run").steps == 4

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    done = execute("train_in_a_notebook", tmp_path / "again.ipynb", RUN=tmp_path / "run", STEPS=4)
    assert done.returncode == 1 and "The run directory" in done.stderr and "exists" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
