"""The report of a decoding benchmark: it holds the numbers that it was given, in the files that it promises."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from mtp_jax.bench import report
from mtp_jax.config import TrainConfig
from mtp_jax.train.loggers import JsonlLogger
from mtp_jax.validate import ConfigError, to_dict


def decode_row(batch, temperature, k, verifier, dtype="float32"):
    acceptance = [0.9 - 0.1 * s - 0.1 * temperature for s in range(k)]
    tokens = 1 + sum(acceptance)
    return {
        "batch": batch,
        "temperature": temperature,
        "k": k,
        "verifier": verifier,
        "dtype": dtype,
        "plain_dtype": "float32",
        "tokens_per_second": 1234.0 * batch * tokens / (1 + 0.1 * k),
        "speedup": tokens / (1 + 0.1 * k),
        "speedup_next_token": None,
        "block_efficiency": tokens,
        "acceptance": acceptance,
        "verify_cost": 1 + 0.1 * k if k else None,
        "identical_to_plain": True if verifier != "block" else None,
        "rows_that_differ": 0 if verifier != "block" else None,
        "logit_gap": None,
    }


def make_bench(batches=(1,), ks=(0, 1, 3)):
    laws = ((0.0, "greedy"), (0.7, "coupled"), (0.7, "block"))
    return {
        "rows": [decode_row(batch, T, k, verifier) for batch in batches for T, verifier in laws for k in ks],
        "prompts": 24,
        "prompt_tokens": 96,
        "suite": "",
        "by_category": [],
        "next_token": [],
        "new_tokens": 256,
        "repetitions": 3,
        "draft_temperature": 1.0,
        "compile_seconds": 14.2,
        "prefill_seconds": 0.31,
        "versions": {"jax": "0.10.1", "flax": "0.12.7"},
        "device": "cpu",
        "hf": None,
        "parameters": {"trunk": 5_123_456, "head": 1_081_344},
    }


@pytest.fixture
def run_dir(tmp_path):
    logger = JsonlLogger(tmp_path / "small-cpd")
    for step in range(10, 101, 10):
        losses = {f"loss_offset_{s}": 1.0 + s + 10 / step for s in range(1, 5)}
        if step == 30:
            losses["loss_offset_2"] = float("nan")
        logger.log("train", step, {"loss": sum(losses.values()), **losses})
        if step in (50, 100):
            logger.log("eval", step, {"loss": 9.0, "loss_first_token": 2.125, "gate_effective": 3.5, **losses})
    logger.close()
    return tmp_path / "small-cpd"


def test_drafts_that_are_sampled_otherwise_are_named():
    titles = [report.decode_table({**make_bench(), "draft_temperature": share}).title for share in (1.0, 0.6)]
    assert "drafts at" not in titles[0] and "3 repetitions, drafts at 0.6 of the temperature, on cpu" in titles[1]


def test_the_report_holds_what_was_measured(run_dir):
    bench = make_bench()
    path = report.write_report(run_dir, bench, to_dict(TrainConfig()))
    text = path.read_text()
    assert path.name == "report.md"
    assert text.startswith("# small-cpd\n")
    assert json.loads((run_dir / "report.json").read_text()) == bench
    for expected in ("5,123,456", "1,081,344", "jax 0.10.1", "trained for 100 steps", "24 prompts of 96 tokens"):
        assert expected in text
    assert "|  | step 50 | step 100 | change |" in text
    assert "| offset 4 | 5.200 | 5.100 | -0.100 |" in text
    assert "joint |" not in text, "a loss that was not logged has no row"
    assert "| 0.7 | coupled | 1 | 2,053 | 1.66x | 1.83 | 0.83 | 1.10 | yes |" in text
    for name in ("loss", "acceptance", "speed"):
        assert (run_dir / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](plots/{name}.png)" in text


def test_the_tables_share_their_columns_and_show_the_baseline():
    bench = make_bench()
    header, _, *rows = report.decode_markdown(bench).splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    shown = [name for name in report.COLUMNS if name != "over next-token"]
    assert names == shown[3:], "batch and dtypes are columns only where they vary"
    assert len(rows) == len(bench["rows"])
    assert rows[0] == "| 0 | greedy | 0 | 1,234 | 1.00x | 1.00 | - | - | yes |"

    stream = io.StringIO()
    Console(file=stream, width=80).print(report.decode_table(bench))
    for row, line in zip(rows, stream.getvalue().splitlines()[-len(rows) :], strict=True):
        assert line.split() == row.replace("|", " ").split()


def test_what_varies_becomes_a_column_and_a_panel():
    bench = make_bench(batches=(1, 8))
    bench["rows"].append(decode_row(1, 0.0, 3, "greedy", dtype="bfloat16"))
    header, _, *rows = report.decode_markdown(bench).splitlines()
    assert header.startswith("| batch | dtype | plain in | T |")
    assert rows[-1].startswith("| 1 | bfloat16 | float32 | 0 | greedy | 3 |")
    titles = [axes.get_title(loc="left") for axes in report.plot_speed(bench["rows"]).axes]
    assert titles == ["Decoding speed, batch 1, float32", "Decoding speed, batch 8, float32"]


def test_a_marginal_run_shows_the_plain_table_beside_its_own_baseline(run_dir):
    bench = make_bench(ks=(0, 1))
    for row in bench["rows"]:
        row["speedup_next_token"] = row["speedup"] / 1.25
    laws = ((0.0, "greedy"), (0.7, "coupled"), (0.7, "block"))
    own = {"speedup": 1.25, "speedup_next_token": 1.0, "identical_to_plain": None, "tokens_per_second": 1542.5}
    bench["next_token"] = [decode_row(1, T, 0, verifier) | own for T, verifier in laws]
    header, _, *rows = report.decode_markdown(bench).splitlines()
    assert "| k | tokens/s | speed-up | over next-token | tokens per forward |" in header and len(rows) == 9
    assert rows[0] == "| 0 | greedy | 0 (next-token table) | 1,542 | 1.25x | 1.00x | 1.00 | - | - | - |"
    assert rows[1].startswith("| 0 | greedy | 0 | 1,234 | 1.00x | 0.80x |")
    assert [row.split(" | ")[1] for row in rows[::3]] == [verifier for _, verifier in laws]
    text = report.write_report(run_dir, bench, to_dict(TrainConfig())).read_text()
    assert rows[0] in text and "ordinary table of V x D in place of the head" in text
    assert "(next-token table)" not in report.decode_markdown(make_bench())


def test_rows_that_differ_are_counted():
    same, other = make_bench()["rows"][:2]
    other |= {"identical_to_plain": False, "rows_that_differ": 3, "logit_gap": 0.0123}
    assert [report.COLUMNS["identical"](row) for row in (same, other)] == ["yes", "3 rows differ by 0.012"]
    assert report.COLUMNS["identical"](other | {"logit_gap": None}) == "3 rows differ"


def test_dashed_lines_are_what_speed_ups_are_against():
    """Of the dtype that is faster for plain decoding, its tokens/s as measured."""
    rows = [row | {"plain_dtype": "bfloat16"} for row in make_bench()["rows"]]
    rows += [row | {"dtype": "bfloat16", "tokens_per_second": 1500.0} for row in rows if row["k"] == 0]
    (axes,) = report.plot_speed(rows + rows[-1:]).axes  # a setting may have been asked for twice
    drawn = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert drawn["k = 0, plain decoding in bfloat16"] == 1500.0 and drawn["T = 0, greedy"] == 1234.0


def test_the_comparison_with_transformers_is_a_table(run_dir):
    rows = [
        {"name": name, "k": k, "dtype": "float32", "tokens_per_second": rate, "rows_that_differ": differ}
        for name, k, rate, differ in (("transformers", None, 1250.0, 0), ("mtp_jax", 3, 2000.0, 2))
    ]
    found = {"rows": rows, "ratio": 1.6, "device": "cpu", "threads": 2, "versions": {"transformers": "9.9"}}
    bench = make_bench() | {"hf": found}
    text = report.write_report(run_dir, bench, to_dict(TrainConfig())).read_text()
    assert "beside transformers 9.9 on cpu (2 threads), prefill included; our fastest is 1.60x of its fastest." in text
    assert re.search(r"\| transformers +\| float32 +\| +1,250 +\| +0 +\|", text)
    assert re.search(r"\| mtp_jax, k = 3 +\| float32 +\| +2,000 +\| +2 +\|", text)
    assert report.hf_table(bench).row_count == 2


def test_a_suite_has_a_table_by_category(run_dir):
    bench = make_bench(ks=(0, 1)) | {"suite": "suites/mt[bench].jsonl", "prompt_lengths": [7, 1200]}
    assert "By category" not in report.write_report(run_dir, bench, to_dict(TrainConfig())).read_text()
    names = {"writing | prose": 3, "code": 9, None: 12}
    bench["by_category"] = [
        {**row, "category": category, "prompts": count, "speedup": row["speedup"] + count}
        for row in bench["rows"]
        for category, count in names.items()
    ]
    text = report.write_report(run_dir, bench, to_dict(TrainConfig())).read_text()
    assert "24 prompts of mt[bench].jsonl (7 to 1200 tokens), 256 new tokens each" in text
    table = report.category_markdown(bench)
    assert table in text[text.index("### By category") :]
    header, _, *rows = table.splitlines()
    assert header == "| category | prompts | T | verifier | k | tokens/s | speed-up | tokens per forward | acceptance |"
    labels = ["writing \\| prose", "code", "mean of categories"]
    assert [row.removeprefix("| ").split(" | ")[0] for row in rows] == [label for label in labels for _ in range(6)]
    assert rows[7] == "| code | 9 | 0 | greedy | 1 | 2,131 | 10.73x | 1.90 | 0.90 |"
    stream = io.StringIO()
    Console(file=stream, width=120).print(report.category_table(bench))
    shown = stream.getvalue()
    assert "By category of mt[bench].jsonl" in shown and "writing | prose" in shown and "10.73x" in shown


def test_figures_draw_the_numbers():
    rows = make_bench()["rows"]
    (axes,) = report.plot_speed(rows).axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert drawn["T = 0.7, block"] == [
        row["tokens_per_second"] for row in rows if (row["temperature"], row["verifier"]) == (0.7, "block")
    ]
    assert drawn["k = 0, plain decoding in float32"] == [1234.0, 1234.0]
    (axes,) = report.plot_acceptance(rows).axes
    assert {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines} == {
        f"T = {row['temperature']:g}, {row['verifier']}": row["acceptance"] for row in rows if row["k"] == 3
    }


def test_figures_leave_k_auto_to_the_table(run_dir):
    bench = make_bench()
    auto = {**decode_row(1, 0.7, 3, "coupled"), "auto": True, "tokens_per_second": 4321.0}
    bench["rows"].insert(4, auto)
    text = report.write_report(run_dir, bench, to_dict(TrainConfig())).read_text()
    assert "| 0.7 | coupled | 3 (auto) | 4,321 |" in text


def test_a_run_without_evaluations_or_drafts_still_has_a_report(tmp_path):
    JsonlLogger(tmp_path).close()
    text = report.write_report(tmp_path, make_bench(ks=(0,)), to_dict(TrainConfig())).read_text()
    assert "The run was not evaluated." in text


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        report.write_report(tmp_path, make_bench(), to_dict(TrainConfig()))
    with pytest.raises(ConfigError, match=r"there is no .*metrics\.jsonl\. Leave --report out"):
        report.check_reportable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_the_home_directory_is_reported(run_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(run_dir.parent))
    report.check_reportable("~/small-cpd")
    assert report.write_report("~/small-cpd", make_bench(), to_dict(TrainConfig())) == run_dir / "report.md"
    assert "completions.html" not in (run_dir / "report.md").read_text()
    (run_dir / "completions.html").write_text("")
    assert "](completions.html)" in report.write_report(run_dir, make_bench(), to_dict(TrainConfig())).read_text()
