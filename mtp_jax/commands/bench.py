"""`mtp-jax bench decode | loss | train | data`: one file of `mtp_jax.bench` each. All end with one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from mtp_jax.bench.config import BenchConfig, DataBenchConfig, LossBenchConfig, TrainBenchConfig
from mtp_jax.commands import console, parse, use_compilation_cache
from mtp_jax.commands.experiment import load_experiment, split_file
from mtp_jax.config import TrainConfig
from mtp_jax.registry import lookup


@dataclass(frozen=True)
class Decode:
    """Compare k = 0 with k = 1..W-1, by batch size, temperature and verifier, in one process, interleaved.

    Prints a table, and as the last line one JSON object.
    """

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    config: Annotated[BenchConfig, tyro.conf.arg(name="")] = field(default_factory=BenchConfig)
    step: int | Literal["latest", "best"] = "latest"
    """Which checkpoint; best is the one with the lowest held-out loss."""
    weights: Literal["params", "ema"] = "params"
    """The parameters, or their average over the last steps, where the run kept it (ema_decay)."""
    report: bool = False
    """Also write report.md, report.json and plots/ into the run directory."""


@dataclass(frozen=True)
class TrainBench:
    """Compare training steps with CPD heads to one with a next-token head; every field of the experiment can be set.

    Prints a table, and as the last line one JSON object.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    bench: TrainBenchConfig = field(default_factory=TrainBenchConfig)


@dataclass(frozen=True)
class Data:
    """Measure what the data of an experiment cost: tokenising, reading, and what training steps wait for.

    Rates are per second of processor time, so per core. Prints a table, and as the last line one JSON object.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    bench: DataBenchConfig = field(default_factory=DataBenchConfig)


def main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print("usage: mtp-jax bench decode RUN [options]\n       mtp-jax bench loss [options]")
        print("       mtp-jax bench train EXPERIMENT.py [options]\n       mtp-jax bench data EXPERIMENT.py [options]")
        print("\nmtp-jax bench NAME --help lists the options.")
        return
    lookup(BENCHES, args[0], "The benchmark")(args[1:])


def _decode(args: list[str]) -> None:
    options = parse(Decode, args, "bench decode")
    use_compilation_cache()

    from mtp_jax.bench.decode import bench_decode, check
    from mtp_jax.bench.report import check_reportable, decode_table, hf_line, write_report
    from mtp_jax.runs.layout import read_config
    from mtp_jax.runs.loading import load
    from mtp_jax.validate import to_dict

    if options.report:
        check_reportable(options.run)
    check(options.config, read_config(options.run))
    run = load(options.run, options.step, weights=options.weights)
    bench = _with_status(lambda status: bench_decode(run, options.config, status))
    console().print(decode_table(bench))
    if bench["hf"]:
        print(hf_line(bench))
    try:
        if options.report:
            print(f"Wrote {write_report(options.run, bench, to_dict(run.config))}")
    finally:  # what was measured is printed, whatever becomes of the report
        print(json.dumps(bench))


def _loss(args: list[str]) -> None:
    config = parse(LossBenchConfig, args, "bench loss")
    use_compilation_cache()

    from mtp_jax.bench.loss import bench_loss

    bench = _with_status(lambda status: bench_loss(config, status))
    mib = 2**20
    rows = [
        (
            name,
            *(f"{found[part]:.4g}" for part in ("median", "quartile_1", "quartile_3")),
            f"{found['median'] / bench['seconds']['matmuls']['median']:.2f}x",
            f"{bench[memory] / mib:,.0f}",
        )
        for name, memory in (("ours", "temp_bytes"), ("naive", "naive_temp_bytes"), ("matmuls", "matmuls_temp_bytes"))
        if (found := bench["seconds"].get(name))
    ]
    title = (
        f"Loss and gradient of {config.tokens:,} positions, D = {config.d}, V = {config.v:,}, W = {config.window}, "
        f"R = {config.rank}, {config.factors} factors, {config.dtype}, on {bench['device']}"
    )
    _print_table(title, ("", "median s", "quartile 1", "quartile 3", "of matmuls", "scratch MiB"), rows)
    if not bench["naive_fits"]:
        print(f"naive needs {bench['naive_temp_bytes'] / mib:,.0f} MiB and {bench['free_bytes'] / mib:,.0f} are free.")
    naive = (
        "" if bench["time_ratio_to_naive"] is None else f", {1 / bench['time_ratio_to_naive']:.2f}x faster than naive"
    )
    print(f"ours takes {bench['time_ratio_to_matmuls']:.3f}x the time of its matrix products{naive}")
    print(f"gradient error against float64: ours {bench['grad_error']:.2e}, naive {bench['naive_grad_error']:.2e}")
    print(json.dumps(bench))


def _train(args: list[str]) -> None:
    file, rest = split_file(args, "bench train")
    options = parse(TrainBench, rest, f"bench train {file}", TrainBench(load_experiment(file)))
    use_compilation_cache()

    from mtp_jax.bench.train import bench_train

    bench = _with_status(lambda status: bench_train(options.config, options.bench, status))
    rows = [
        (
            row["head"],
            f"{row['seconds']['median']:.4g}",
            f"{row['step_ratio']:.2f}x",
            f"{row['predicted_ratio']:.2f}x",
            f"{row['step_ratio'] / row['predicted_ratio']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
        for row in bench["rows"]
    ]
    header = ("", "median s", "step", "predicted", "step / predicted", "tokens/s", "MFU", "peak MiB")
    _print_table(f"Training steps of {file}, on {bench['device']}", header, rows)
    print(json.dumps(bench))


def _data(args: list[str]) -> None:
    file, rest = split_file(args, "bench data")
    options = parse(Data, rest, f"bench data {file}", Data(load_experiment(file)))
    use_compilation_cache()

    from mtp_jax.bench.data import bench_data

    bench = _with_status(lambda status: bench_data(options.config, options.bench, status))
    prepared = bench["prepare_bytes_per_second"]
    rows = [
        ("tokenising", "-" if prepared is None else f"{prepared / 1e6:,.1f} MB/s per core"),
        ("reading", f"{bench['read_tokens_per_second'] / 1e6:,.2f} M tokens/s per core"),
        ("a training step", f"{bench['step_seconds'] * 1e3:,.1f} ms"),
        ("of it, waiting for its batch", f"{bench['wait_fraction']:.2%}"),
    ]
    _print_table(f"Data of {file}: {bench['source']}, {bench['tokenizer']}", ("", ""), rows)
    print(json.dumps(bench))


BENCHES: dict[str, Callable[[list[str]], None]] = {"decode": _decode, "loss": _loss, "train": _train, "data": _data}


def _with_status(measure: Callable[[Callable[[str], None]], dict[str, Any]]) -> dict[str, Any]:
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        return measure(status.update)


def _print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console().print(table)
