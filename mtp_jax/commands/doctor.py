"""`mtp-jax doctor [EXPERIMENT.py | RUN]`: versions, devices, and what a run would need, here or on another machine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mtp_jax.commands import console, parse, use_compilation_cache
from mtp_jax.commands.experiment import load_experiment, split_file
from mtp_jax.config import TrainConfig
from mtp_jax.registry import lookup

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Doctor:
    """Compile the training step of an experiment, or of a run, and say what it and decoding need on each device.

    Nothing of the model is allocated, and no weights are read.

    Every field of the config can be set here, such as the head of an imported model. Prints a table, and as the last
    line one JSON object.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    devices: int | None = None
    """Compile for so many simulated devices instead of those that are here."""
    topology: str = ""
    """Compile for a slice of TPUs, such as v5e:16x16 or v5p:4x4x8, by their own compiler (libtpu; no TPU is needed)."""
    accelerator: str = ""
    """Whether the step fits this device: v4, v5e, v5p, v6e, a100, a100-40gb, h100, h200 or b200."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    if args in (["-h"], ["--help"]):
        print(
            "usage: mtp-jax doctor [EXPERIMENT.py | RUN [options]]\n\n"
            "mtp-jax doctor EXPERIMENT.py --help lists the options."
        )
        return
    if not args:
        use_compilation_cache()
        _machine()
        return
    file, rest = split_file(args, "doctor")
    options = parse(Doctor, rest, f"doctor {file}", Doctor(_config(file)))
    config = options.config
    if config.base and config.base != file:  # what it does not say of the model is its base's
        from mtp_jax.runs.base import open_base

        config = open_base(config.base).resolve(config)
    use_compilation_cache()

    from mtp_jax.train.costs import ACCELERATORS
    from mtp_jax.train.forecast import forecast

    memory = lookup(ACCELERATORS, options.accelerator, "--accelerator").memory if options.accelerator else None
    if options.devices is None and not options.topology:
        _machine()
    found = forecast(config, options.devices, options.topology, memory)
    _print(found, options.accelerator or found["device"])
    print(json.dumps(found))


def _config(given: str) -> TrainConfig:
    """That of an experiment file, or of a run directory: of an imported model with it as the base of a head to come."""
    if "://" in given or Path(given).expanduser().is_dir():
        from mtp_jax.runs.layout import read_config

        config = read_config(given)
        return dataclasses.replace(config, base=given) if config.head.kind == "none" else config
    return load_experiment(given)


def _machine() -> None:
    import jax

    from mtp_jax.runs.layout import versions
    from mtp_jax.train.costs import peak_flops

    first = jax.devices()[0]
    peak, stats = peak_flops(first), first.memory_stats() or {}
    rows = [
        *versions().items(),
        ("devices", f"{jax.device_count()} x {first.device_kind} ({first.platform}), {jax.process_count()} processes"),
        ("peak", "not known: MFU is not shown" if peak is None else f"{peak / 1e12:.0f} TFLOP/s bf16"),
    ]
    if "bytes_limit" in stats:
        rows.append(("device memory", f"{stats['bytes_limit'] / GIB:.1f} GiB"))
    _print_rows(rows)


def _print(found: dict[str, Any], device: str) -> None:
    from rich.table import Table

    table = Table(title="Parameters", box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    for name in ("name", "shape", "dtype", "split over"):
        table.add_column(name, no_wrap=True)
    table.add_column("MiB per device", justify="right", no_wrap=True)
    for row in found["shardings"]:
        spec = ", ".join(
            "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in row["spec"]
        )
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, row["dtype"], spec, f"{row['bytes'] / MIB:,.2f}")
    console().print(table)
    _print_rows(lines(found, device))


def _print_rows(rows: list[tuple[str, str]]) -> None:
    print("\n".join(f"{name:18} {text}" for name, text in rows))


def lines(found: dict[str, Any], device: str) -> list[tuple[str, str]]:
    """A forecast in words: (name, text) for each line."""
    size, count = found["bytes"], found["parameters"]
    compilers = {"cpu": "XLA for CPUs", "gpu": "XLA for GPUs", "tpu": "the TPU compiler"}
    by = compilers.get(found["backend"], found["backend"])
    rows = [
        ("mesh", str(found["mesh"])),
        ("compiled by", f"{by}, for {found['devices']} x {found['device']}, in {found['compile_seconds']:.1f} s"),
        ("parameters", f"trunk {count['trunk']:,}, head {count['head']:,}, embedding {count['embedding']:,}"),
        ("cost", f"head / trunk {found['head_to_trunk']:.2f}, {found['step_ratio']:.2f}x a next-token step"),
        ("", f"{found['flops'] / 1e12:,.2f} TFLOPs a step and device, without recomputation"),
        (
            "per device",
            f"parameters {size['parameters'] / MIB:.1f} MiB, optimizer {size['optimizer'] / MIB:.1f} MiB, "
            f"step {size['temporaries'] / MIB:.1f} MiB, together {size['peak'] / MIB:.1f} MiB",
        ),
        ("", f"batch {size['batch'] / MIB:.1f} MiB; {size['kept'] / MIB:.1f} MiB of the state are updated in place"),
        *_decoding(found),
    ]
    for name, one in found["collectives"].items():
        rows.append((name, f"{one['count']:,} a step, {one['sent_bytes'] / MIB:,.1f} MiB sent by a device"))
    if not found["collectives"]:
        rows.append(("collectives", "none"))
    if found["unknown_loops"]:
        rows.append(("", f"{found['unknown_loops']} loops of unknown length were counted as if they ran once"))
    if found["memory"] is not None:
        # A CPU's temporaries may be more than the device's own compiler would need; the state is what it is.
        sure = found["backend"] != "cpu" or size["parameters"] + size["optimizer"] > found["memory"]
        verdict = "fits" if found["fits"] else "does not fit" if sure else "may not fit"
        rows.append((verdict, f"{device} ({size['peak'] / GIB:.1f} of {found['memory'] / GIB:.0f} GiB)"))
        rows += [("" if i else "what helps", line) for i, line in enumerate(found["advice"])]
    return rows + [("note", note) for note in found["notes"]]


def _decoding(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What decoding holds on a device, and how many rows there is room for."""
    weights, row, context = (found["decoding"][name] for name in ("weights", "row", "context"))
    text = f"weights {weights / MIB:,.1f} MiB, and {row / MIB:,.1f} MiB of keys and values for each row of {context:,}"
    if found["memory"] is None:
        return [("decoding", text)]
    return [("decoding", text), ("", f"room for {max(0, (found['memory'] - weights) // row):,} such rows on a device")]
