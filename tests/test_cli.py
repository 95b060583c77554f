"""The command line: a run from training to the report, and mistakes that are answered before they cost anything.

Each command runs once as a user runs it, in a process of its own; the rest calls `main` in this one.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import mtp_jax
from mtp_jax import cli, loading, report
from mtp_jax.bench import decode as bench
from mtp_jax.commands import use_compilation_cache
from mtp_jax.config import (
    DataConfig,
    HeadConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    RopeScaling,
    TrainConfig,
    to_dict,
)
from mtp_jax.data import ByteTokenizer, prepare
from mtp_jax.distributed import Distributed
from mtp_jax.run_dir import read_config, write_config
from mtp_jax.train import loop
from mtp_jax.train.loggers import read_metrics

REPOSITORY = Path(__file__).parents[1]
EXPERIMENT = """
from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = TrainConfig(
    ModelConfig(258, d_model=16, d_ff=32, num_layers=1, num_heads=4, context_length=128, dtype="float32"),
    HeadConfig(window=3, rank=2, factors="full", balance_weight=0.05, init_noise=1.0),
    DataConfig("text", "{root}/corpus/*.txt", batch_size=8, seq_len=16, valid_fraction=0.2, cache_dir="{root}/cache"),
    OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    steps=8,
    eval_every=4,
    eval_batches=2,
    checkpoint_every=4,
    log_every=1,
)
"""
ROW = {
    *("batch", "temperature", "k", "verifier", "dtype", "plain_dtype", "tokens_per_second", "speedup", "speedups"),
    *("block_efficiency", "acceptance", "verify_cost", "identical_to_plain", "rows_that_differ", "logit_gap"),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What is looked at here is the command line; faster code would take longer to compile."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tiny.text_data(root)
    file = root / "small_cpd.py"
    file.write_text(EXPERIMENT.replace("{root}", str(root)))
    return file


def user(*args):
    """What `mtp-jax` prints in a process of its own, where it must succeed."""
    command = [sys.executable, "-m", "mtp_jax", *map(str, args)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def last_line(output):
    """The last line, which is strict JSON."""
    return json.loads(output.splitlines()[-1], parse_constant=refuse)


@pytest.fixture
def refused(capsys, monkeypatch):
    """A function that runs a command which must be refused, and gives the message without its frame."""

    def run(*argv, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(arg) for arg in argv])
        output = "".join(capsys.readouterr())
        assert exit.value.code == status, output
        assert "Traceback" not in output
        return " ".join(re.sub("[│╭╮╰╯─]|\x1b\\[[0-9;]*m", " ", output).split())

    monkeypatch.setenv("COLUMNS", "200")
    return run


@pytest.fixture
def nothing_expensive(monkeypatch):
    """Whatever costs time or writes a file fails the test."""

    def fail(*args, **options):
        pytest.fail("this was to be refused before")

    for name in ("prepare_data", "make_trainer", "write_config", "Checkpoints"):
        monkeypatch.setattr(loop, name, fail)


@pytest.fixture
def calls(monkeypatch):
    """What `train` was called with, each time: (config, run directory, flags). Nothing is trained."""
    calls = []
    monkeypatch.setattr(loop, "train", lambda config, run_dir, **flags: calls.append((config, run_dir, flags)))
    return calls


def contents(path):
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}


# A run, from training to the report


@pytest.fixture(scope="module")
def run(experiment):
    """A run of 8 steps, trained by a user, and what was printed."""
    run_dir = experiment.parent / "runs" / "mine"
    output = user("train", experiment, "--run-dir", run_dir, "--data.seed", "7")
    return SimpleNamespace(dir=run_dir, output=output)


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(run.dir, tmp_path / "copy"))


def test_train_leaves_a_run(run):
    assert "new run, 8 steps of 8 x 16 tokens" in run.output and "predicted cost" in run.output
    assert "\x1b" not in run.output, "the output is no terminal"
    files = {path.name for path in run.dir.iterdir()}
    assert files == {"config.json", "versions.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    records = read_metrics(run.dir)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8]
    assert json.loads((run.dir / "config.json").read_text())["data"]["seed"] == 7


def test_eval_gives_what_training_gave(run):
    output = user("eval", run.dir, "--batches", "2")
    found = last_line(output)
    assert found["run"] == str(run.dir) and found["step"] == 8
    trained = next(r for r in read_metrics(run.dir)[::-1] if r["kind"] == "eval")
    for name in ("loss", "loss_offset_1", "loss_offset_2", "loss_offset_3", "loss_first_token", "gate_entropy"):
        assert found[name] == pytest.approx(trained[name], rel=1e-5)
        assert name == "loss" or name == "gate_entropy" or f"{found[name]:.4f}" in output
    assert "offset 3" in output and "effective of 2" in output


def test_generate_continues_a_prompt(run):
    output = user("generate", run.dir, "--prompt", "The 1st of", "--max-new-tokens", "12", "--seed", "3")
    assert output.startswith("The 1st of") and "\x1b" not in output
    counts = re.search(r"\[(\d+) tokens, (\d+) of them accepted drafts; (\d+) forwards after prefill, ", output)
    tokens, drafts, forwards = map(int, counts.groups())
    assert 1 <= tokens <= 12 and drafts + forwards >= tokens - 1 and forwards >= 1


def test_bench_decode_measures_and_reports(run):
    output = user(
        *("bench", "decode", run.dir, "--prompts", 2, "--prompt-tokens", 16, "--new-tokens", 12),
        *("--temperatures", 0, 0.7, "--adaptive", "--report"),
    )
    bench = last_line(output)
    assert bench["step"] == 8
    dtypes = list(dict.fromkeys(row["dtype"] for row in bench["rows"]))
    assert dtypes in (["float32"], ["float32", "bfloat16"]), "the run's own, and the other where it was faster"
    cells = [(dtype, t, k) for dtype in dtypes for t in (0, 0.7) for k in (0, 1, 2, "adaptive")]
    assert [(row["dtype"], row["temperature"], row["k"]) for row in bench["rows"]] == cells
    for row in bench["rows"]:
        assert set(row) >= ROW
        most = 2 if row["k"] == "adaptive" else row["k"]
        assert row["batch"] == 1 and row["verifier"] == ("greedy" if row["temperature"] == 0 else "coupled")
        assert row["identical_to_plain"] is (row["rows_that_differ"] == 0)
        assert row["identical_to_plain"] or (row["dtype"] == "bfloat16" and row["k"] != 0 and row["logit_gap"] < 0.1)
        assert len(row["acceptance"]) == most and all(0 <= share <= 1 for share in row["acceptance"])
        assert 1 <= row["block_efficiency"] <= 1 + most
        assert row["tokens_per_second"] > 0 and row["speedup"] > 0 and row["verify_cost"] > 0
        if row["k"] == 0:
            plain = {
                r["dtype"]: r["tokens_per_second"]
                for r in bench["rows"]
                if (r["k"], r["temperature"]) == (0, row["temperature"])
            }
            assert row["block_efficiency"] == 1 and max(plain, key=plain.__getitem__) == row["plain_dtype"]
            assert (row["speedup"] == row["verify_cost"] == 1) is (row["dtype"] == row["plain_dtype"])
    assert bench["prompts"] == 2 and bench["new_tokens"] == 12 and bench["parameters"]["trunk"] > 0
    assert json.loads((run.dir / "report.json").read_text()) == bench
    report = (run.dir / "report.md").read_text()
    assert f"Wrote {run.dir / 'report.md'}" in output
    for plot in ("loss", "acceptance", "speed"):
        assert f"plots/{plot}.png" in report
        assert (run.dir / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


BENCH = {
    **{"prompts": 1, "prompt_tokens": 8, "new_tokens": 8, "repetitions": 1, "seed": 0, "device": "cpu"},
    **{"versions": {}, "parameters": {}, "compile_seconds": 1.0, "prefill_seconds": 1.0, "hf": None},
    "rows": [
        {
            **{"batch": 1, "temperature": 0.0, "k": 0, "verifier": "greedy", "dtype": "float32", "speedup": 1.0},
            **{"tokens_per_second": 50.0, "block_efficiency": 1.0, "acceptance": [], "verify_cost": 1.0},
            **{"plain_dtype": "float32", "identical_to_plain": True, "rows_that_differ": 0, "logit_gap": None},
        }
    ],
}


def test_a_report_that_cannot_be_is_refused_before_measuring(run, tmp_path, refused, monkeypatch):
    for module, name in ((loading, "load"), (bench, "bench_decode")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("this was to be refused before"))
    shutil.copy(run.dir / "config.json", tmp_path)
    before = contents(tmp_path)
    message = refused("bench", "decode", tmp_path, "--report")
    assert f"there is no {tmp_path / 'metrics.jsonl'}. Leave --report out." in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_what_was_measured_outlives_a_report_that_fails(run, capsys, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(bench, "bench_decode", lambda *args: BENCH)
    monkeypatch.setattr(report, "write_report", fail)
    with pytest.raises((OSError, SystemExit)):
        cli.main(["bench", "decode", str(run.dir), "--report"])
    assert last_line(capsys.readouterr().out) == BENCH


GENERATE = ("--max-new-tokens", "12", "--seed", "3")
# The noise decides, which drafts and target share: most drafts are accepted.
HOT = ("--temperature", "2")


GREEN = "1;32"
ANSI = re.compile("\x1b\\[([0-9;]*)m")


def styled(output):
    """Every character of `output` with the ANSI codes that it is shown in."""
    plain, *rest = ANSI.split(output)
    pieces = [("", plain), *zip(rest[::2], rest[1::2], strict=True)]
    return [("" if codes == "0" else codes, character) for codes, text in pieces for character in text]


def letters(self, ids):
    """In place of `decode_bytes`: each token is one letter, so that none is lost or joined with its neighbour."""
    return bytes(97 + int(i) % 26 for i in ids)


def test_colour_is_the_users_choice(run, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(ByteTokenizer, "decode_bytes", letters)
    outputs = {}
    for color in ("always", "never", "auto"):
        options = (*HOT, "--color", color, *GENERATE)
        cli.main(["generate", str(run.dir), "--prompt", "The 1st of", *options])
        outputs[color] = capsys.readouterr().out
    assert f"\x1b[{GREEN}m" in outputs["always"]
    assert "\x1b" not in outputs["never"] and outputs["auto"] == outputs["never"]
    assert "".join(character for _, character in styled(outputs["always"])) == outputs["never"]


@pytest.mark.parametrize("k", [2, 0])
def test_what_is_green_are_the_accepted_drafts(run, capsys, monkeypatch, k):
    import mtp_jax.decode.generate as decode

    stream, parts = decode.stream, []

    def record(*args, **options):
        for tokens, accepted in stream(*args, **options):
            parts.append((letters(None, tokens).decode(), accepted))
            yield tokens, accepted

    monkeypatch.setattr(ByteTokenizer, "decode_bytes", letters)
    monkeypatch.setattr(decode, "stream", record)
    options = ("--k", str(k), *HOT, "--color", "always", *GENERATE)
    cli.main(["generate", str(run.dir), "--prompt", "The 1st of", *options])
    text, summary = capsys.readouterr().out.splitlines()
    prompt = letters(None, b"The 1st of").decode()
    expected = [("2", character) for character in prompt]
    expected += [(GREEN * (i < accepted), character) for text, accepted in parts for i, character in enumerate(text)]
    assert styled(text) == expected
    drafts = sum(accepted for _, accepted in parts)
    assert (drafts > 0) == (k > 0)
    emitted = sum(len(text) for text, _ in parts)
    assert f"[{emitted} tokens, {drafts} of them accepted drafts; {len(parts) - 1} forwards after prefill" in summary


def test_text_ends_before_a_stop_string(run, capsys, monkeypatch):
    """It may come in pieces; what turns out not to be one is printed, in its own colours."""
    import mtp_jax.decode.generate as decode

    parts = [(b"ab<", 2), (b"<EN", 1), (b"Dx", 0), (b"c<E", 3), (b"ND>z", 1), (b"never", 1)]
    monkeypatch.setattr(decode, "stream", lambda *args, **options: ((list(text), n) for text, n in parts))
    options = ("--prompt", "x", "--color", "always", *GENERATE, "--stop", "<END>", "@@")
    cli.main(["generate", str(run.dir), *options])
    text, summary = capsys.readouterr().out.splitlines()
    green = [(GREEN, character) for character in "ab"], [(GREEN, "<")], [(GREEN, "c")]
    plain = [("", character) for character in "<ENDx"]
    assert styled(text) == [("2", "x"), *green[0], plain[0], *green[1], *plain[1:], *green[2]]
    assert "[15 tokens, 7 of them" in summary


def test_a_character_in_two_forwards_is_one_character(run, capsys, monkeypatch):
    """It has the colour of its last byte. Half a character at the end is shown as such."""
    import mtp_jax.decode.generate as decode

    parts = [(b"a\xc3", 1), (b"\xa9b", 1), (b"c\xe2\x82", 0), (b"\xacd\xc3", 2)]
    monkeypatch.setattr(decode, "stream", lambda *args, **options: [(list(text), n) for text, n in parts])
    cli.main(["generate", str(run.dir), "--prompt", "x", "--color", "always", *GENERATE])
    text = capsys.readouterr().out.splitlines()[0]
    green = [(GREEN, character) for character in "a\xe9\u20acd"]
    assert styled(text) == [("2", "x"), *green[:2], ("", "b"), ("", "c"), *green[2:], ("", "\ufffd")]


def test_generate_refuses_before_it_loads_or_prints(run, refused, monkeypatch):
    before = contents(run.dir)
    monkeypatch.setattr(loading, "load", lambda *args, **options: pytest.fail("this was to be refused before"))
    for options, words in (
        (("--k", 9), "k is 9 and the head's window is 3; k must lie in 0..2."),
        (("--k", -1), "k must lie in 0..2."),
        (("--max-new-tokens", 0), "max_new_tokens is 0; it must be at least 1."),
        (("--max-new-tokens", 128), "Prompt 0 has 1 tokens and max_new_tokens is 128, 129 together"),
        (("--temperature", -1), "temperature is -1.0; it must be at least 0."),
        (("--top-p", 0), "top_p is 0.0; it must lie in (0, 1]."),
        (("--top-k", -1), "top_k is -1; it must be at least 0."),
        (("--stop", ""), "an empty string stops everything"),
        (("--seed", 2**32), f"seed is {2**32}; row i samples with seed + i"),
    ):
        message = refused("generate", run.dir, "--prompt", "x", *options)
        assert words in message and message.startswith("mtp-jax: error:")
    message = refused("generate", run.dir, "--prompt", "x" * 100, "--max-new-tokens", 29)
    assert "Prompt 0 has 100 tokens and max_new_tokens is 29, 129 together" in message
    assert "Prompt 0 is empty" in refused("generate", run.dir, "--prompt", "")
    held_out = ("generate", run.dir, "--held-out", 2, "--max-new-tokens")
    assert "Prompt 0 has 100 tokens" in refused(*held_out, 29, "--prompt-tokens", 100)
    assert "--prompt-tokens is 0" in refused(*held_out, 29, "--prompt-tokens", 0)
    assert contents(run.dir) == before


def test_held_out_documents_are_continued(run, capsys):
    cli.main(["generate", str(run.dir), "--held-out", "2", "--prompt-tokens", "16", "--color", "never", *GENERATE])
    output = capsys.readouterr().out
    names = re.findall(r"(\d+\.txt), continued at temperature 0.7", output)
    assert len(set(names)) == 2 and output.count("tokens per forward]") == 2
    assert set(names) <= set(prepare(read_config(run.dir).data).valid.names)
    page = (run.dir / "completions.html").read_text()
    assert all(name in page for name in names)
    for name in names:
        begin = (run.dir.parents[1] / "corpus" / name).read_text()[:16]
        assert begin in output, "a prompt is the beginning of its document"


def test_another_step_can_be_asked_for(run, capsys, refused):
    cli.main(["eval", str(run.dir), "--batches", "2", "--step", "4"])
    found = last_line(capsys.readouterr().out)
    trained = next(r for r in read_metrics(run.dir) if r["kind"] == "eval")
    assert (found["step"], trained["step"]) == (4, 4) and found["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert "has no step 5; it has [4, 8]." in refused("eval", run.dir, "--step", 5, status=1)


# Help


def test_help_waits_for_no_library():
    code = (
        "import sys\nfrom mtp_jax import cli\ncli.main(['--help'])\n"
        "print(sorted({'jax', 'flax', 'orbax', 'optax', 'numpy', 'tyro', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    *usage, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert all(any(line.startswith(f"  {name} ") for line in usage) for name in cli.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(argv, capsys):
    cli.main(argv)
    assert capsys.readouterr().out.startswith("usage: mtp-jax COMMAND")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train", "--help"], "usage: mtp-jax train EXPERIMENT.py"),
        (["doctor", "--help"], "usage: mtp-jax doctor [EXPERIMENT.py"),
        (["bench"], "usage: mtp-jax bench decode RUN"),
        (["bench", "--help"], "usage: mtp-jax bench decode RUN"),
    ],
)
def test_help_of_a_command_with_a_file_says_how_to_call_it(argv, words, capsys):
    cli.main(argv)
    assert capsys.readouterr().out.startswith(words)


def test_help_of_an_experiment_lists_every_field(experiment, refused):
    output = refused("train", experiment, "--help", status=0)
    for option in ("--run-dir", "--model.d-model", "--model.rope-scaling.factor", "--head.factors", "--optimizer.name"):
        assert option in output
    assert "--prompts" in refused("bench", "decode", "--help", status=0)


# What is mistyped is answered with the nearest right thing


def test_an_unknown_command_is_answered_with_the_nearest(refused):
    assert "there is no command 'trian'; did you mean 'train'?" in refused("trian")
    every = "train, generate, bench, data, eval, tokenizer, sweep, report, doctor"
    assert f"there is no command 'qqq'; there are {every}." in refused("qqq")
    assert "The benchmark is 'decoed'; did you mean 'decode'?" in refused("bench", "decoed", "run")
    assert "The benchmark is 'qqq'; it can be data, decode, loss, train." in refused("bench", "qqq")


def test_an_unknown_option_is_answered_with_the_nearest(experiment, refused, nothing_expensive):
    assert "--model.d-model" in refused("train", experiment, "--model.d-modle", "32")
    assert "--temperatures" in refused("bench", "decode", "run", "--temperature", "0")


def test_an_unknown_experiment_is_answered_with_the_nearest(experiment, refused):
    right, wrong = experiment, experiment.with_name("smal_cdp.py")
    for command in ("train", "doctor"):
        assert f"there is no experiment '{wrong}'; did you mean {right}?" in refused(command, wrong)
    assert "give the path of a Python file with a CONFIG" in refused("train", experiment.with_name("zzzzzz"))
    for argv in (["train"], ["train", "--steps", "3"]):
        assert "mtp-jax train needs an experiment file first" in refused(*argv)


def test_an_experiment_without_a_config_is_refused(tmp_path, refused):
    file = tmp_path / "bad.py"
    for text, found in (("", "None"), ("CONFIG = 3", "3"), ("from mtp_jax import TrainConfig as CONFIG", "class")):
        file.write_text(text)
        message = refused("train", file)
        assert f"{file} has no CONFIG of type mtp_jax.TrainConfig" in message and found in message
    file.write_text("from mtp_jax import HeadConfig\nCONFIG = HeadConfig(window=0)")
    assert "HeadConfig.window is 0" in refused("train", file)
    (tmp_path / "notes.txt").write_text("CONFIG")
    assert "notes.txt is not a Python file" in refused("train", tmp_path / "notes.txt")


# The compilation cache


@pytest.fixture
def caches(monkeypatch):
    """The directories that JAX is told to keep compiled functions in."""
    import jax

    caches = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: caches.append((name, value)))
    return caches


COMMANDS = {  # all that compile
    "train": ("train", "{experiment}"),
    "eval": ("eval", "{empty}"),
    "generate": ("generate", "{empty}", "--prompt", "x"),
    "bench": ("bench", "decode", "{empty}"),
    "doctor": ("doctor",),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_what_it_compiles(name, experiment, calls, caches, tmp_path, monkeypatch):
    assert set(cli.COMMANDS) == {*COMMANDS, "data", "tokenizer", "report", "sweep"}  # a sweep: see test_sweep
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    argv = [arg.format(experiment=experiment, empty=tmp_path) for arg in COMMANDS[name]]
    with contextlib.suppress(SystemExit):
        cli.main(argv)
    assert caches == [("jax_compilation_cache_dir", str(tmp_path / "home" / ".cache" / "mtp_jax" / "xla"))]


def test_the_cache_that_the_user_chose_is_left_alone(caches, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/tmp/mine")
    use_compilation_cache()
    assert caches == []


# What cannot run is refused before it costs anything

REFUSED = {
    "width by heads": (("--model.d-model", 18), ["d_model is 18", "num_heads is 4"]),
    "heads by groups": (("--model.num-heads", 3), ["num_heads is 3", "num_kv_heads is 2"]),
    "window": (("--head.window", 0), ["HeadConfig.window is 0", "at least 1"]),
    "batch by mesh": (("--data.batch-size", 6), ["6 sequences", "8 x 1 = 8"]),
    "vocabulary by tokenizer": (("--model.vocab-size", 100), ["model.vocab_size is 100", "has 257 tokens"]),
    "mesh by devices": (("--mesh.data", 3), ["(3, 1, 1) needs 3 devices and there are 8"]),
    "vocabulary by mesh": (
        ("--model.vocab-size", 257, "--mesh.data", 4, "--mesh.tensor", 2),
        ["model.vocab_size is 257", "tensor has 2"],
    ),
    "tokenizer": (("--data.tokenizer", "byte"), ["DataConfig.tokenizer is 'byte'", "did you mean 'bytes'?"]),
    "both": (("--resume", "--overwrite"), ["Both --resume and --overwrite"]),
    "nothing to resume": (("--resume",), ["--resume was given", "has no run in it"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_value_is_refused_before_anything_expensive(name, experiment, tmp_path, refused, nothing_expensive):
    options, words = REFUSED[name]
    message = refused("train", experiment, "--run-dir", tmp_path / "run", *options)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_a_value_of_another_type_is_refused(experiment, refused, nothing_expensive):
    message = refused("train", experiment, "--steps", "many")
    assert "many" in message and "--steps" in message
    message = refused("train", experiment, "--head.factors", "ful")
    assert "ful" in message and "shared" in message and "lowrank" in message


def test_an_old_run_outlives_a_new_one_that_is_refused(experiment, copy, refused, tmp_path):
    overwrite = ("train", experiment, "--overwrite", "--run-dir")
    hugging_face = tmp_path / "llama"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}')
    (hugging_face / "model.safetensors").write_bytes(bytes(range(256)))
    before = contents(tmp_path)
    assert "The valid split has no documents" in refused(*overwrite, copy, "--data.valid-fraction", 1e-9)
    assert "no file matches it" in refused(*overwrite, copy, "--data.files", "nothing/*.txt")
    assert "d_model is 18" in refused(*overwrite, copy, "--model.d-model", 18)
    assert f"--overwrite leaves {hugging_face} alone, for it is not a run" in refused(*overwrite, hugging_face)
    assert contents(tmp_path) == before


def test_an_existing_run_is_refused(experiment, run, refused, nothing_expensive):
    before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}
    message = refused("train", experiment, "--run-dir", run.dir)
    assert f"The run directory {run.dir} exists. Give --resume" in message and "--overwrite" in message
    message = refused("train", experiment, "--run-dir", run.dir, "--data.seed", 7, "--model.d-model", 32, "--resume")
    assert f"model.d_model is 32 and the run in {run.dir} has 16" in message
    assert before == {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}


@pytest.mark.parametrize("command", [("eval",), ("generate", "--prompt", "x"), ("bench", "decode")])
def test_a_directory_that_is_no_run_is_refused(command, tmp_path, refused):
    name, *options = command
    argv = [name, *options, tmp_path] if name == "bench" else [name, tmp_path, *options]
    assert f"{tmp_path} is not a run directory: it has no config.json" in refused(*argv)


@pytest.mark.parametrize(
    "options, words",
    [
        ((), ["--prompt is None and --held-out is 0"]),
        (("--prompt", "x", "--held-out", 2), ["--prompt is 'x' and --held-out is 2"]),
        (("--prompt", "x", "--k", 3), ["k is 3 and the head's window is 3", "0..2"]),
        (("--prompt", "x", "--max-new-tokens", 200), ["200", "201 together", "context_length is 128"]),
        (("--held-out", 100), ["100 prompts were asked for", "documents have more than 96 tokens"]),
        (("--prompt", "x", "--color", "sometimes"), ["sometimes", "always", "never"]),
    ],
)
def test_generate_refuses_what_it_cannot_do(run, options, words, refused):
    message = refused("generate", run.dir, *options)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name, least", [("prompts", 1), ("prompt-tokens", 1), ("new-tokens", 2), ("repetitions", 1)])
def test_bench_refuses_to_measure_nothing(name, least, refused):
    words = f"{name.replace('-', '_')} is {least - 1}; it must be at least {least}."
    assert words in refused("bench", "decode", "run", f"--{name}", least - 1)


def test_eval_refuses_to_evaluate_nothing(refused):
    assert "--batches is 0; it must be at least 1." in refused("eval", "run", "--batches", 0)


def test_documents_that_cannot_be_read_are_named(experiment, tmp_path, refused):
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n')
    options = ("--data.source", "jsonl", "--data.files", f"{tmp_path}/*.jsonl", "--run-dir", tmp_path / "run")
    message = refused("train", experiment, *options, status=1)
    assert message.startswith(f"mtp-jax: error: {tmp_path}/a.jsonl, line at byte 0: there is no field 'text'")


def test_a_run_that_failed_exits_with_status_1(experiment, refused, monkeypatch):
    def fail(*args, **options):
        raise loop.NonFiniteLossError("Step 3: loss nan")

    monkeypatch.setattr(loop, "train", fail)
    assert refused("train", experiment, status=1) == "mtp-jax: error: Step 3: loss nan"


def test_an_interrupted_run_exits_with_status_130(experiment, refused, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    assert refused("train", experiment, status=130) == ""


def test_errors_that_are_not_ours_keep_their_traceback(experiment, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["train", str(experiment)])


# Options

OTHER = TrainConfig(
    ModelConfig(
        **dict(vocab_size=260, d_model=32, d_ff=48, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8),
        **dict(context_length=64, rope_theta=500.0, rope_scaling=RopeScaling(2.0, 1.5, 5.0, 32)),
        **dict(qkv_bias=True, qk_norm=True, tie_embeddings=True, norm_eps=1e-6, dtype="bfloat16", remat="dots"),
        attention="cudnn",
    ),
    HeadConfig("independent", 2, 1, "lowrank", 4, "ntp", 0.5, 0.9, 1e-3, "switch", 0.1, 0.5, 0.5, 0, (3, 7)),
    DataConfig("tfds", "other/*.txt", "", "meta.text", "name", "test", 0.1, "elsewhere", "bytes", "", 24, 16, 5),
    OptimizerConfig("muon", 3e-3, "wsd", 3, 0.3, 0.2, 0.05, 0.8, 0.9, 1e-6, 0.9, 0.5, 3, 2.0),
    MeshConfig(2, 2, 2),
    ProfileConfig("3:5"),
    **dict(steps=20, grad_accumulation=2, eval_every=7, eval_batches=3, checkpoint_every=9, keep_checkpoints=4),
    **dict(log_every=6, ema_decay=0.9, init_from="runs/trunk", freeze="trunk", seed=11),
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
        "head.backward_draws",
        "data.separator",
        "data.tokenizer",
        "data.end_of_document",
    ]
    options = []
    for name, value in fields.items():
        words = value if isinstance(value, tuple) else [] if value is True else [value]
        options += ["--" + name.replace("_", "-"), *map(str, words)]
    configs = []
    monkeypatch.setattr(
        loop,
        "Run",
        lambda config, *args: (
            configs.append(config)
            or SimpleNamespace(
                fit=print, config=config, path=tmp_path / "run", tokenizer=ByteTokenizer(), last_good=None
            )
        ),
    )
    monkeypatch.chdir(tmp_path)  # the cache directory is relative
    cli.main(["train", str(experiment), "--run-dir", f"{tmp_path}/run", *options])
    assert configs == [OTHER]


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


# The doctor


def test_the_doctor_knows_the_machine(capsys):
    cli.main(["doctor"])
    output = capsys.readouterr().out
    assert re.search(rf"^mtp_jax +{re.escape(mtp_jax.__version__)}$", output, re.MULTILINE)
    for name in ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        assert re.search(rf"^{name} +\d+\.\d+", output, re.MULTILINE)
    assert re.search(r"^devices +8 x cpu \(cpu\), 1 processes$", output, re.MULTILINE)
    assert re.search(r"^peak +not known", output, re.MULTILINE)


def test_the_doctor_says_what_a_run_would_need(experiment, capsys):
    cli.main(["doctor", str(experiment), "--model.d-model", "128", "--mesh.data", "2", "--mesh.fsdp", "4"])
    output = capsys.readouterr().out
    assert "{'data': 2, 'fsdp': 4, 'tensor': 1}" in output
    head = 128 * 2 * 3 * 258 + 128 * 2
    counts = re.search(r"trunk ([\d,]+), head ([\d,]+), embedding ([\d,]+)", output)
    trunk, *others = (int(count.replace(",", "")) for count in counts.groups())
    assert others == [head, 258 * 128]
    mib = re.search(r"parameters ([\d.]+) MiB, optimizer ([\d.]+) MiB, step ([\d.]+) MiB, together ([\d.]+)", output)
    parameters, optimizer, step, together = map(float, mib.groups())
    # Weights are split over the four of fsdp, norms are not; AdamW has two moments.
    assert parameters == pytest.approx((trunk + sum(others)) * 4 / 4 / 2**20, abs=0.06)
    assert optimizer == pytest.approx(2 * parameters, abs=0.11)
    assert step > 0 and together >= parameters + optimizer + step - 0.2


def test_the_doctor_refuses_what_training_would(experiment, refused):
    assert "needs 3 devices and there are 8" in refused("doctor", experiment, "--mesh.data", 3)
    assert "d_model is 18" in refused("doctor", experiment, "--model.d-model", 18)
    assert "vocab_size is 100" in refused("doctor", experiment, "--model.vocab-size", 100)
