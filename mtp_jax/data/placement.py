"""Placement of batches on the mesh: which rows a process reads, and where they go."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from mtp_jax.sharding import RULES
from mtp_jax.validate import require


def shard_of(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(index, count): this process's devices hold the part `index` of `count` equal parts of a batch's rows.

    Raises `ConfigError` if they do not hold neighbouring rows: the mesh is laid out across the processes.
    """
    held = jax.NamedSharding(mesh, RULES.rows_B).addressable_devices_indices_map((batch_size,)).values()
    ranges = {index[0].indices(batch_size)[:2] for index in held if index is not None}
    first, last = min(begin for begin, _ in ranges), max(end for _, end in ranges)
    size = last - first
    require(
        sum(end - begin for begin, end in ranges) == size and first % size == 0 and batch_size % size == 0,
        f"The mesh {dict(mesh.shape)} gives process {jax.process_index()} the rows {sorted(ranges)} of a batch of "
        f"{batch_size}, which are no block of it. Let mesh.tensor divide the devices of a process, or the other way.",
    )
    return first // size, batch_size // size


def place(batch: Any, mesh: Mesh, batch_size: int | None = None) -> Any:
    """This process's rows of a batch (of `batch_size` in all, by default these) as part of the global one."""
    sharding = jax.NamedSharding(mesh, RULES.rows_B)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size or len(rows), *rows.shape[1:]))
        for name, rows in batch.items()
    }
