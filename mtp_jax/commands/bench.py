"""`mtp-jax bench decode | loss | train`: one file of `mtp_jax.bench` each. All end with one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from mtp_jax.bench.config import BenchConfig, LossBenchConfig, TrainBenchConfig
from mtp_jax.commands import DraftingOptions, console, parse, print_table, use_compilation_cache
from mtp_jax.commands.experiment import load_experiment, split_file
from mtp_jax.config import TrainConfig
from mtp_jax.registry import lookup


@dataclass(frozen=True)
class Decode(DraftingOptions):
    """Compare k = 0 with k = 1..W-1, by batch size, temperature and verifier, in one process, interleaved.

    Prints a table, and as the last line one JSON object.
    """

    config: Annotated[BenchConfig, tyro.conf.arg(name="")] = field(default_factory=BenchConfig)
    report: bool = False
    """Also write report.md, report.json and plots/ into the run directory."""
    out: str = ""
    """The directory of the report, made if need be, where it shall not go into the run directory."""


@dataclass(frozen=True)
class TrainBench:
    """Compare training steps with CPD heads to one with a next-token head; every field of the experiment can be set.

    Prints a table, and as the last line one JSON object.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    bench: TrainBenchConfig = field(default_factory=TrainBenchConfig)


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: mtp-jax bench decode RUN [options]\n       mtp-jax bench loss [options]")
        print("       mtp-jax bench train EXPERIMENT.py [options]\n\n--help behind one of these lists its options.")
        return
    lookup(BENCHES, args[0], "The benchmark")(args[1:])


def _decode(args: list[str]) -> None:
    options = parse(Decode, args, "bench decode")
    use_compilation_cache()

    from mtp_jax.bench.decode import bench_decode, check
    from mtp_jax.bench.report import category_table, check_reportable, decode_table, hf_table, write_report
    from mtp_jax.runs.layout import read_config
    from mtp_jax.validate import to_dict

    report = options.report or bool(options.out)
    if report:
        check_reportable(options.run, options.out)
    check(options.config, read_config(options.run))
    run = options.load()
    bench = _with_status(lambda status: bench_decode(run, options.config, status))
    console().print(decode_table(bench))
    if bench["by_category"]:
        console().print(category_table(bench))
    if bench["hf"]:
        console().print(hf_table(bench))
    try:
        if report:
            print(f"Wrote {write_report(options.run, bench, to_dict(run.config), options.out)}")
    finally:  # what was measured is printed, whatever becomes of the report
        print(json.dumps(bench))


def _loss(args: list[str]) -> None:
    config = parse(LossBenchConfig, args, "bench loss")
    use_compilation_cache()

    from mtp_jax.bench.loss import bench_loss

    bench = _with_status(lambda status: bench_loss(config, status))
    mib, rows = 2**20, []
    for name, memory in (("ours", "temp_bytes"), ("naive", "naive_temp_bytes"), ("matmuls", "matmuls_temp_bytes")):
        if found := bench["seconds"].get(name):
            times = [f"{found[part]:.4g}" for part in ("median", "quartile_1", "quartile_3")]
            over = f"{found['median'] / bench['seconds']['matmuls']['median']:.2f}x"
            rows.append([name, *times, over, f"{bench[memory] / mib:,.0f}"])
    title = (
        f"Loss and gradient of {config.tokens:,} positions, D = {config.d}, V = {config.v:,}, W = {config.window}, "
        f"R = {config.rank}, {config.factors} factors, {config.dtype}, on {bench['device']}"
    )
    print_table(title, ("", "median s", "quartile 1", "quartile 3", "of matmuls", "scratch MiB"), rows)
    if not bench["naive_fits"]:
        print(f"naive needs {bench['naive_temp_bytes'] / mib:,.0f} MiB and {bench['free_bytes'] / mib:,.0f} are free.")
    naive = f", {1 / bench['time_ratio_to_naive']:.2f}x faster than naive" if bench["naive_fits"] else ""
    cpd = f", {ratio:.3f}x that of cpd" if (ratio := bench["time_ratio_to_cpd"]) else ""
    print(f"ours takes {bench['time_ratio_to_matmuls']:.3f}x the time of its matrix products{cpd}{naive}")
    print(f"gradient error against float64: ours {bench['grad_error']:.2e}, naive {bench['naive_grad_error']:.2e}")
    print(json.dumps(bench))


def _train(args: list[str]) -> None:
    file, rest = split_file(args, "bench train")
    options = parse(TrainBench, rest, f"bench train {file}", TrainBench(load_experiment(file)))
    use_compilation_cache()

    from mtp_jax.bench.train import bench_train

    bench = _with_status(lambda status: bench_train(options.config, options.bench, status))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: row["head"],
        "median s": lambda row: f"{row['seconds']['median']:.4g}",
        "step": lambda row: f"{row['step_ratio']:.2f}x",
        "predicted": lambda row: f"{row['predicted_ratio']:.2f}x",
        "step / predicted": lambda row: f"{row['step_ratio'] / row['predicted_ratio']:.2f}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "MFU": lambda row: "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:,.0f}",
    }
    rows = ([cell(row) for cell in columns.values()] for row in bench["rows"])
    print_table(f"Training steps of {file}, on {bench['device']}", columns, rows)
    print(json.dumps(bench))


BENCHES: dict[str, Callable[[list[str]], None]] = {"decode": _decode, "loss": _loss, "train": _train}


def _with_status(measure: Callable[[Callable[[str], None]], dict[str, Any]]) -> dict[str, Any]:
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        return measure(status.update)
