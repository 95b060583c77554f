"""Advice for a run whose step does not fit a device: options that lower what it holds."""

from __future__ import annotations

import dataclasses

from mtp_jax.config import TrainConfig
from mtp_jax.validate import ConfigError

REMAT = ("none", "dots", "full")


def advice(config: TrainConfig, shape: tuple[int, int, int], found: dict[str, int], memory: int | None) -> list[str]:
    """Options of the command line that lower what a device holds, each with its reason; what costs least comes first.

    Args:
      config: the run.
      shape: its mesh, (data, fsdp, tensor).
      found: bytes of a device, of `parameters` and `optimizer` at the least.
      memory: what it has, if that is known: whether the state alone is too much.
    """
    data, fsdp, tensor = shape
    parts, state = config.grad_accumulation, found["parameters"] + found["optimizer"]
    rows = config.data.batch_size // parts // (data * fsdp)
    lines = []
    if data > 1 and _fits(config, (1, data * fsdp, tensor), parts):
        lines.append(
            f"--mesh.data 1 --mesh.fsdp {data * fsdp}: parameters and optimizer are split over all devices, from "
            f"{state / 2**30:.2f} GiB to about {state / data / 2**30:.2f}"
        )
    if rows > 1:
        lines.append(
            f"--grad-accumulation {parts * rows}: a device reads 1 sequence at a time instead of {rows}, "
            f"and holds a gradient of {found['parameters'] / 2**30:.2f} GiB meanwhile"
        )
    for remat in REMAT[REMAT.index(config.model.remat) + 1 :]:
        what = "attention" if remat == "dots" else "whole blocks, an eighth to a third more work"
        lines.append(f"--model.remat {remat}: the backward pass recomputes {what} instead of keeping it")
    if rows == 1 and fsdp % 2 == 0 and _fits(config, (data, fsdp // 2, 2 * tensor), 2 * parts):
        lines.append(
            f"--mesh.data {data} --mesh.fsdp {fsdp // 2} --mesh.tensor {2 * tensor} --grad-accumulation {2 * parts}: "
            "two devices share a sequence's attention, feed-forward width and logits"
        )
    if memory is not None and state > memory:
        lines.append(f"more devices: the state alone is {state / 2**30:.2f} GiB on each of {data * fsdp * tensor}")
    elif not lines:
        lines.append("shorter sequences (--data.seq-len), or devices with more memory")
    return lines


def _fits(config: TrainConfig, shape: tuple[int, int, int], parts: int) -> bool:
    try:
        dataclasses.replace(config, grad_accumulation=parts).check_mesh(shape)
    except ConfigError:
        return False
    return True
