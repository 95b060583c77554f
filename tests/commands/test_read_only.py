"""A run that belongs to somebody else: what reads it works, and what would write into it says so before any work."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mtp_jax
from mtp_jax import cli, look
from mtp_jax.bench import decode as bench_decode
from mtp_jax.commands import run_one, sweep, tokenizer
from mtp_jax.interop import importing
from mtp_jax.interop.importing import import_run
from mtp_jax.runs import loading
from mtp_jax.sweep import report as sweep_report
from mtp_jax.train import loop
from support import REPOSITORY
from support.commands import last_line
from support.pretrained import write
from support.read_only import read_only
from support.runs import contents

# What is looked at here is the command line; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")

RANKS = REPOSITORY / "experiments" / "rank_code.py"
GENERATE = ("--max-new-tokens", 4, "--color", "never")
BENCH = ("--prompts", 2, "--prompt-tokens", 8, "--new-tokens", 4, "--temperatures", 0, "--ks", 0, 2, "--repetitions", 1)
PROMPTS = ("--prompt-tokens", 8)


def names(path):
    return sorted(map(str, path.rglob("*")))


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A folder of one's own, with a cache in it."""
    monkeypatch.setenv("MTP_JAX_CACHE", str(tmp_path / "ours" / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours").mkdir()
    return tmp_path / "ours"


@pytest.fixture
def theirs(run):
    """A run in which nothing can be written, and in which nothing is tried."""
    before, there = contents(run.dir), names(run.dir)
    with read_only(run.dir):
        yield run.dir
    assert contents(run.dir) == before and names(run.dir) == there


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """An imported model, with a chat template and a table that can be exported."""
    pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
    pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
    root = tmp_path_factory.mktemp("chatty")
    directory, *_ = write(root / "source", max_position_embeddings=128)
    return Path(import_run(str(directory), root / "run"))


@pytest.fixture
def their_model(chatty):
    before, there = contents(chatty), names(chatty)
    with read_only(chatty):
        yield chatty
    assert contents(chatty) == before and names(chatty) == there


@pytest.fixture
def command(capfd):
    """A function that runs a command which must succeed, and gives what it printed; of a refusal nothing is said."""

    def run(*argv):
        capfd.readouterr()
        cli.main([str(arg) for arg in argv])
        out, err = capfd.readouterr()
        for words in ("Traceback", "ermission denied", "not permitted", "Read-only", "cannot be written"):
            assert words not in out + err
        return out

    return run


@pytest.fixture
def before_any_work(monkeypatch):
    """Whatever costs time fails the test."""

    def fail(*args, **options):
        pytest.fail("this was to be refused before")

    for module, name in (
        *((loading, "load"), (bench_decode, "bench_decode"), (loop, "prepare_data"), (tokenizer, "train_bpe")),
        *((importing, "_open_hf"), (importing, "open_gguf"), (sweep_report, "write_report")),
        *((sweep, "_run"), (run_one, "run_one")),
    ):
        monkeypatch.setattr(module, name, fail)


READ = {
    "generate from a prompt": ("generate", "{run}", "--prompt", "The 1st", *GENERATE),
    "generate from a file": ("generate", "{run}", "--prompt-file", "{ours}/prompt", *GENERATE),
    "generate with k chosen": (
        "generate",
        "{run}",
        "--prompt",
        "The 1st",
        "--k",
        "auto",
        "--temperature",
        0,
        *GENERATE,
    ),
    "generate from an earlier step": ("generate", "{run}", "--prompt", "The", "--step", 4, *GENERATE),
    "generate held out": ("generate", "{run}", "--held-out", 1, *PROMPTS, "--out", "{ours}/new/page.html", *GENERATE),
    "eval": ("eval", "{run}", "--batches", 1),
    "eval of the best step": ("eval", "{run}", "--batches", 1, "--step", "best"),
    "bench decode": ("bench", "decode", "{run}", *BENCH),
    "bench decode of files": ("bench", "decode", "{run}", "--files", "{ours}/prompt", *BENCH[2:], "--prompts", 1),
    "a report elsewhere": ("bench", "decode", "{run}", *BENCH, "--report", "--out", "{ours}/new/report"),
    "a report elsewhere, said once": ("bench", "decode", "{run}", *BENCH, "--out", "{ours}/new/report"),
    "doctor": ("doctor", "{run}"),
}
WRITTEN = {
    "generate held out": {"new/page.html"},
    "a report elsewhere": {f"new/report/{n}" for n in ("report.md", "report.json")}
    | {f"new/report/plots/{n}.png" for n in ("loss", "acceptance", "speed")},
}
WRITTEN["a report elsewhere, said once"] = WRITTEN["a report elsewhere"]


@pytest.mark.parametrize("name", READ)
def test_every_command_that_reads_works(theirs, ours, command, name):
    (ours / "prompt").write_text("The 1st of the small texts, and more of them")
    printed = command(*(str(word).format(run=theirs, ours=ours) for word in READ[name]))
    found = {str(file.relative_to(ours)) for file in ours.rglob("*") if file.is_file()} - {"prompt"}
    assert {file for file in found if not file.startswith("cache/")} == WRITTEN.get(name, set())
    assert printed.strip()
    if "report" in name:
        assert f"Wrote {ours}/new/report/report.md" in printed
        assert json.loads((ours / "new/report/report.json").read_text()) == last_line(printed)
    elif "held out" in name:
        assert f"The same in colour: {ours}/new/page.html" in printed


def test_a_notebook_that_reads_works(theirs, ours):
    run = mtp_jax.load(theirs)
    assert isinstance(run.generate("The 1st", max_new_tokens=4), str)
    assert run.generate_tokens([np.array([84, 104])], max_new_tokens=4).tokens[0].size
    assert look.gate(run, "The 1st").weights_TR.shape[1] == 2
    assert look.window(run, "The 1st").joint_WV.shape[0] == 3
    assert look.complete(run, "The 1st", max_new_tokens=4) is not None
    look.plot_gate(look.gate(run, "The 1st")).savefig(ours / "gate.png")
    assert mtp_jax.load(theirs, step="best").step in (4, 8)


def test_a_model_is_talked_with_and_exported(their_model, ours, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert "tokens/s" in command("chat", their_model, "--max-new-tokens", 4)
    assert mtp_jax.load(their_model).chat([{"role": "user", "content": "Hi"}], max_new_tokens=4) is not None
    assert f"Wrote {ours}/new/hf" in command("export", their_model, "--out", ours / "new" / "hf")
    assert (ours / "new" / "hf" / "model.safetensors").stat().st_size
    assert (ours / "new" / "hf" / "config.json").exists()
    assert command("doctor", their_model)


WRITES = {
    "a page": ("generate", "{run}", "--held-out", 1, *PROMPTS, *GENERATE),
    "a page in a folder": ("generate", "{run}", "--held-out", 1, "--out", "{run}/new/page.html", *GENERATE),
    "a report": ("bench", "decode", "{run}", *BENCH, "--report"),
    "a report in a folder": ("bench", "decode", "{run}", *BENCH, "--out", "{run}/new"),
    "an export": ("export", "{model}", "--out", "{run}/hf"),
    "an import": ("import", "somebody/model", "--out", "{run}/imported"),
    "an import of GGUF": ("import", "model.gguf", "--out", "{run}/a/b"),
    "a tokenizer": ("tokenizer", "train", "--source", "{ours}/*.txt", "--vocab-size", 300, "--out", "{run}/t.json"),
    "the runs of a sweep": ("sweep", RANKS, "--dir", "{run}/sweep"),
    "a run of a sweep": ("sweep", RANKS, "--dir", "{run}", "--only", 0),
    "what a sweep found": ("sweep", RANKS, "--dir", "{ours}/sweep", "--out", "{run}/results/ranks.json"),
    "a report of sweeps": ("report", "{ours}/results.json", "--out", "{run}/page"),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_would_write_there_is_refused_before_any_work(theirs, ours, chatty, refused, before_any_work, name):
    (ours / "a.txt").write_text("text")
    message = refused(*(str(word).format(run=theirs, model=chatty, ours=ours) for word in WRITES[name]))
    option = "--dir" if WRITES[name][-2] == "--dir" or "--only" in WRITES[name] else "--out"
    assert f"error: {theirs}" in message and "would be written and cannot be. Give another" in message
    assert message.endswith(f"{option}.")
    assert [path for path in ours.rglob("*") if path.is_file()] == [ours / "a.txt"]


@pytest.mark.parametrize("flag", ["--resume", "--auto-resume", "--overwrite"])
@pytest.mark.parametrize("place", ["{run}", "{run}/new", "{run}/new/one"])
def test_training_there_is_refused_before_any_work(theirs, ours, experiment, refused, before_any_work, place, flag):
    given = place.format(run=theirs)
    flag = flag if place == "{run}" else ""
    message = refused("train", experiment, "--run-dir", given, *filter(None, [flag]), "--steps", 9)
    assert f"The run directory {given} cannot be written" in message and "give another --run-dir" in message


@pytest.fixture
def their_folder(experiment):
    """The folder of the experiment, with its texts and the cache that its config names."""
    return experiment.parent


def test_prepared_data_of_somebody_else_are_read_where_they_are(run, their_folder, ours, command):
    with read_only(run.dir, their_folder / "corpus", their_folder / "cache"):
        assert last_line(command("eval", run.dir, "--batches", 1))["step"] == 8
        command("generate", run.dir, "--held-out", 1, *PROMPTS, "--out", ours / "page.html", *GENERATE)
    assert not list(ours.rglob("*.tokens.bin"))


@pytest.mark.parametrize("gone", ["empty", "missing"])
def test_data_that_somebody_else_has_prepared_no_more_are_prepared_in_ones_own_cache(
    run, their_folder, ours, command, gone
):
    """So it is too where a run was copied from another machine, with the name of a folder that cannot be made here."""
    want = last_line(command("eval", run.dir, "--batches", 1))
    cache, aside = their_folder / "cache", their_folder / "aside"
    cache.rename(aside)
    try:
        if gone == "empty":
            cache.mkdir()
        with read_only(their_folder):
            assert last_line(command("eval", run.dir, "--batches", 1)) == want
            command("generate", run.dir, "--held-out", 1, *PROMPTS, "--out", ours / "page.html", *GENERATE)
            command("bench", "decode", run.dir, *BENCH)
        assert len(list(ours.rglob("valid.tokens.bin"))) == 1, "it is prepared once"
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        aside.rename(cache)


def test_training_asks_for_another_cache_and_takes_none_by_itself(experiment, their_folder, ours, refused):
    with read_only(their_folder / "cache"):
        options = ("--run-dir", ours / "run", "--data.valid-fraction", 0.3)
        assert "cannot be written" in refused("train", experiment, *options)
    assert not (ours / "run").exists()
