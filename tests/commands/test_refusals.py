"""What cannot run is refused before it costs anything."""

import pytest

from mtp_jax import cli
from mtp_jax.train import loop
from support.runs import contents

# What is looked at here is the command line; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    assert f"{hugging_face} exists and is left alone, for it is not a run" in refused(*overwrite, hugging_face)
    assert contents(tmp_path) == before


def test_an_existing_run_is_refused(experiment, run, refused, nothing_expensive):
    before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}
    message = refused("train", experiment, "--run-dir", run.dir)
    assert f"The run directory {run.dir} exists. Give --resume" in message and "--overwrite" in message
    message = refused("train", experiment, "--run-dir", run.dir, "--data.seed", 7, "--model.d-model", 32, "--resume")
    assert f"model.d_model is 32 and the run in {run.dir} was trained with 16" in message
    assert before == {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}


@pytest.mark.parametrize("command", [("eval",), ("generate", "--prompt", "x"), ("bench", "decode")])
def test_a_directory_that_is_no_run_is_refused(command, tmp_path, refused):
    name, *options = command
    argv = [name, *options, tmp_path] if name == "bench" else [name, tmp_path, *options]
    assert f"{tmp_path} is not a run directory: it has no config.json" in refused(*argv)


@pytest.mark.parametrize(
    "options, words",
    [
        ((), ["--prompt is ''", "--held-out 0"]),
        (("--prompt", "x", "--held-out", 2), ["--prompt is 'x'", "--held-out 2"]),
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
    assert f"1 of 1 documents are unreadable ({tmp_path}/a.jsonl, line at byte 0: there is no field 'text'" in message


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
