"""`mtp-jax doctor [EXPERIMENT.py]`: versions, devices, and what a run would need, here or on another machine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from mtp_jax.commands import console, parse, use_compilation_cache
from mtp_jax.commands.experiment import load_experiment, split_file
from mtp_jax.config import MeshConfig, TrainConfig
from mtp_jax.registry import lookup
from mtp_jax.validate import ConfigError, require

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Doctor:
    """Compile the training step of an experiment without allocating anything, and say what it needs on each device.

    Every field of the config can be set here. Prints a table, and as the last line one JSON object.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    devices: int | None = None
    """Compile for so many simulated devices instead of those that are here."""
    topology: str = ""
    """Compile for a slice of TPUs, such as v5e:16x16 or v5p:4x4x8, by their own compiler (libtpu; no TPU is needed)."""
    mesh: str = ""
    """The mesh in short: data=4,fsdp=32,tensor=2. An axis that is left out is the config's."""
    accelerator: str = ""
    """Whether the step fits this device: v4, v5e, v5p, v6e, a100, a100-40gb, h100, h200 or b200."""


def main(args: list[str]) -> None:
    if args in (["-h"], ["--help"]):
        print(
            "usage: mtp-jax doctor [EXPERIMENT.py [options]]\n\nmtp-jax doctor EXPERIMENT.py --help lists the options."
        )
        return
    if not args:
        use_compilation_cache()
        _machine()
        return
    file, rest = split_file(args, "doctor")
    experiment = load_experiment(file)
    options = parse(Doctor, rest, f"doctor {file}", Doctor(experiment))
    config = dataclasses.replace(options.config, mesh=short_mesh(options.mesh, options.config.mesh, experiment.mesh))
    use_compilation_cache()

    from mtp_jax.train.costs import ACCELERATORS
    from mtp_jax.train.forecast import Target, forecast

    memory = lookup(ACCELERATORS, options.accelerator, "--accelerator").memory if options.accelerator else None
    target = Target(options.devices, options.topology)
    if target == Target():
        _machine()
    found = forecast(config, target, memory)
    _print(found, options.accelerator or found["device"])
    print(json.dumps(found))


def short_mesh(short: str, given: MeshConfig, experiment: MeshConfig) -> MeshConfig:
    """The mesh that `short` (`data=4,fsdp=2`) and the options that made `given` of the experiment's say together."""
    changes: dict[str, int] = {}
    for part in short.split(",") if short else []:
        name, _, size = part.strip().partition("=")
        number = size.removeprefix("-")
        require(
            name in vars(given) and name not in changes and number.isdigit(),
            f"--mesh is {short!r} and {part!r} is not one of data=N, fsdp=N and tensor=N, each at most once.",
        )
        changes[name] = int(size)
        own = getattr(given, name)
        if own not in (changes[name], getattr(experiment, name)):
            raise ConfigError(f"--mesh says {part.strip()} and --mesh.{name} is {own}; give one of them.")
    return dataclasses.replace(given, **changes)


def _machine() -> None:
    import jax

    from mtp_jax.runs.layout import versions
    from mtp_jax.train.costs import peak_flops

    print("\n".join(f"{name:18} {version}" for name, version in versions().items()))
    first = jax.devices()[0]
    peak = peak_flops(first)
    print(
        f"{'devices':18} {jax.device_count()} x {first.device_kind} ({first.platform}), {jax.process_count()} processes"
    )
    print(f"{'peak':18} {'not known: MFU is not shown' if peak is None else f'{peak / 1e12:.0f} TFLOP/s bf16'}")
    stats = first.memory_stats() or {}
    if "bytes_limit" in stats:
        print(f"{'device memory':18} {stats['bytes_limit'] / GIB:.1f} GiB")


def _print(found: dict[str, Any], device: str) -> None:
    from rich.table import Table

    table = Table(title="Parameters", box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    for name, side in (("name", "left"), ("shape", "left"), ("dtype", "left"), ("split over", "left")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("MiB per device", justify="right", no_wrap=True)
    for row in found["shardings"]:
        spec = ", ".join(
            "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in row["spec"]
        )
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, row["dtype"], spec, f"{row['bytes'] / MIB:,.2f}")
    console().print(table)
    print("\n".join(f"{name:18} {text}" for name, text in lines(found, device)))


def lines(found: dict[str, Any], device: str) -> list[tuple[str, str]]:
    """A forecast in words: (name, text) for each line."""
    size, count = found["bytes"], found["parameters"]
    by = {"cpu": "XLA for CPUs", "gpu": "XLA for GPUs", "tpu": "the TPU compiler"}.get(
        found["backend"], found["backend"]
    )
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
