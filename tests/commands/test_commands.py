"""Each command as a user runs it, in a process of its own: from training to the report, and the doctor."""

import json
import re
import shutil

import pytest

import mtp_jax
from mtp_jax import cli
from mtp_jax.bench import decode as bench
from mtp_jax.bench import report
from mtp_jax.runs import loading
from mtp_jax.train.loggers import read_metrics
from support.commands import last_line, user
from support.runs import contents

# What is looked at here is the command line; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")

ROW = {
    *("batch", "temperature", "k", "verifier", "dtype", "plain_dtype", "tokens_per_second", "speedup", "speedups"),
    *("block_efficiency", "acceptance", "verify_cost", "identical_to_plain", "rows_that_differ", "logit_gap"),
}


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


def test_eval_of_a_head_without_components_says_nothing_of_them(run, monkeypatch, capsys):
    from mtp_jax.train import evaluate

    whole = evaluate.evaluate_run

    def without(*args):
        return {name: value for name, value in whole(*args).items() if not name.startswith("gate")}

    monkeypatch.setattr(evaluate, "evaluate_run", without)
    cli.main(["eval", str(run.dir), "--batches", "1"])
    output = capsys.readouterr().out
    assert "offset 3" in output and "components" not in output and last_line(output)["step"] == 8


def test_generate_continues_a_prompt(run):
    output = user("generate", run.dir, "--prompt", "The 1st of", "--max-new-tokens", "12", "--seed", "3")
    assert output.startswith("The 1st of") and "\x1b" not in output
    counts = re.search(r"\[(\d+) tokens, (\d+) of them accepted drafts; (\d+) forwards after prefill, ", output)
    tokens, drafts, forwards = map(int, counts.groups())
    assert 1 <= tokens <= 12 and drafts + forwards >= tokens - 1 and forwards >= 1


def test_bench_decode_measures_and_reports(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MTP_JAX_CACHE", str(tmp_path))  # where the k that auto stands for is kept
    output = user(
        *("bench", "decode", run.dir, "--prompts", 2, "--prompt-tokens", 16, "--new-tokens", 12),
        *("--temperatures", 0, 0.7, "--auto", "--report"),
    )
    bench = last_line(output)
    assert bench["step"] == 8
    dtypes = list(dict.fromkeys(row["dtype"] for row in bench["rows"]))
    assert dtypes in (["float32"], ["float32", "bfloat16"]), "the run's own, and the other where it was faster"
    cells = [(dtype, t, k) for dtype in dtypes for t in (0, 0.7) for k in (0, 1, 2, "auto")]
    found = [(row["dtype"], row["temperature"], "auto" if row["auto"] else row["k"]) for row in bench["rows"]]
    assert found == cells
    for row in bench["rows"]:
        assert set(row) >= ROW
        most = row["k"]
        assert row["batch"] == 1 and row["verifier"] == ("greedy" if row["temperature"] == 0 else "coupled")
        assert row["identical_to_plain"] is (row["rows_that_differ"] == 0)
        assert row["identical_to_plain"] or (row["dtype"] == "bfloat16" and row["k"] != 0 and row["logit_gap"] < 0.1)
        assert len(row["acceptance"]) == most and all(0 <= share <= 1 for share in row["acceptance"])
        assert 1 <= row["block_efficiency"] <= 1 + most
        assert row["tokens_per_second"] > 0 and row["speedup"] > 0 and row["verify_cost"] > 0
        if row["k"] == 0 and not row["auto"]:
            plain = {
                r["dtype"]: r["tokens_per_second"]
                for r in bench["rows"]
                if (r["k"], r["auto"], r["temperature"]) == (0, False, row["temperature"])
            }
            assert row["block_efficiency"] == 1 and max(plain, key=plain.__getitem__) == row["plain_dtype"]
            assert (row["speedup"] == row["verify_cost"] == 1) is (row["dtype"] == row["plain_dtype"])
    assert {row["dtype"] for row in bench["next_token"]} == set(dtypes), "the target is marginal"
    assert all(row["tokens_per_second"] > 0 and row["speedup_next_token"] > 0 for row in bench["next_token"])
    assert min(row["speedup_next_token"] for row in bench["rows"]) > 0 and "(next-token" in output
    assert bench["prompts"] == 2 and bench["new_tokens"] == 12 and bench["parameters"]["trunk"] > 0
    assert json.loads((run.dir / "report.json").read_text()) == bench
    report = (run.dir / "report.md").read_text()
    assert f"Wrote {run.dir / 'report.md'}" in output
    for plot in ("loss", "acceptance", "speed"):
        assert f"plots/{plot}.png" in report
        assert (run.dir / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


BENCH = {
    **{"prompts": 1, "prompt_tokens": 8, "new_tokens": 8, "repetitions": 1, "seed": 0, "device": "cpu"},
    **{"draft_temperature": 1.0, "suite": "", "by_category": [], "next_token": []},
    **{"versions": {}, "parameters": {}, "compile_seconds": 1.0, "prefill_seconds": 1.0, "hf": None},
    "rows": [
        {
            **{"batch": 1, "temperature": 0.0, "k": 0, "verifier": "greedy", "dtype": "float32", "speedup": 1.0},
            **{"speedup_next_token": None},
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


def test_another_step_can_be_asked_for(run, capsys, refused):
    cli.main(["eval", str(run.dir), "--batches", "2", "--step", "4"])
    found = last_line(capsys.readouterr().out)
    trained = next(r for r in read_metrics(run.dir) if r["kind"] == "eval")
    assert (found["step"], trained["step"]) == (4, 4) and found["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert "has no step 5; it has [4, 8]." in refused("eval", run.dir, "--step", 5, status=1)


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
