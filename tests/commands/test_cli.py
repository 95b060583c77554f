"""The command line: help, the nearest right thing to what is mistyped, and the compilation cache."""

import contextlib
import os
import subprocess
import sys

import pytest

from mtp_jax import cli
from mtp_jax.commands import use_compilation_cache
from support import REPOSITORY

# What is looked at here is the command line; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    every = "train, generate, chat, bench, data, eval, import, export, tokenizer, sweep, report, doctor"
    assert f"there is no command 'qqq'; there are {every}." in refused("qqq")
    assert "The benchmark is 'decoed'; did you mean 'decode'?" in refused("bench", "decoed", "run")
    assert "The benchmark is 'qqq'; it can be decode, loss, train." in refused("bench", "qqq")


@pytest.mark.parametrize("platform", ["nosuch", "cuda"])
def test_a_platform_that_is_not_there_is_named(platform):
    env = {**os.environ, "JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-m", "mtp_jax", "doctor"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"JAX_PLATFORMS is '{platform}', and JAX finds no such device here." in done.stderr


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
    "chat": ("chat", "{empty}"),
    "export": ("export", "{empty}", "--out", "x"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_what_it_compiles(name, experiment, calls, caches, tmp_path, monkeypatch):
    assert set(cli.COMMANDS) == {*COMMANDS, "data", "tokenizer", "report", "sweep", "import"}  # a sweep: see test_sweep
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
