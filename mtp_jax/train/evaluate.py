"""Held-out losses, for the training loop and for a run that was loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.data import Mixture, Store, held_out_batches, prepare
from mtp_jax.loading import LoadedRun
from mtp_jax.sharding import RULES
from mtp_jax.train.step import batch_loss, split, target_counts


def place(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch as part of the global one."""
    sharding = jax.NamedSharding(mesh, RULES.rows_B)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def held_out(config: TrainConfig, store: Store | Mixture, mesh: Mesh, limit: int | None) -> list[Any]:
    """The held-out batches of a config, on the mesh."""
    found = held_out_batches(
        store.valid,
        seq_len=config.data.seq_len,
        window=config.head.window,
        batch_size=config.data.batch_size,
        limit=limit,
        shard=(jax.process_index(), jax.process_count()),
    )
    return [place(batch, mesh) for batch in found]


def evaluate(loss: Callable[..., Any], params: Any, batches: list[Any]) -> dict[str, float]:
    """Mean losses over batches, each target weighing the same. `loss` is a compiled `batch_loss`."""
    count_W = target_counts(batches)
    sums = [loss(params, batch, count_W) for batch in batches]
    value, aux = jax.tree.map(lambda *parts: sum(np.asarray(part) for part in parts), *sums)
    return named({"loss": value, **aux})


def evaluate_run(run: LoadedRun, limit: int | None = None) -> dict[str, float]:
    """The held-out metrics of a loaded run, over its first `limit` batches or all."""
    graph, params = split(run.model)
    with jax.set_mesh(run.mesh):
        batches = held_out(run.config, prepare(run.config.data, tokenizer=run.tokenizer), run.mesh, limit)
        return evaluate(jax.jit(functools.partial(batch_loss, graph)), params, batches)


def named(metrics: Any) -> dict[str, float]:
    """Metrics as flat scalars: vectors become `loss_offset_1`.., and what is derived from them is added.

    `joint_loss` is the sum of the offsets' means: -log q of a whole window, where all windows are whole.
    With a shortlist, `loss_offset` is the mean over the targets that it has (and `joint_loss` the sum of those), and
    `listed` their fraction; `loss` counts the others as 0, so it compares runs with one list alone.
    `gate_effective` is 1 / sum_r share_r^2: R if all components have the same mean weight, 1 if one has all of it.
    """
    flat: dict[str, float] = {}
    if "listed" in metrics:
        metrics = metrics | {
            "loss_offset": metrics["loss_offset"] / np.where(metrics["listed"], metrics["listed"], np.nan)
        }
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim == 0:
            flat[name] = float(value)
        else:
            flat |= {f"{name}_{i + 1}": float(v) for i, v in enumerate(value)}
    flat["joint_loss"] = float(np.sum(metrics["loss_offset"]))
    flat["gate_effective"] = float(1 / np.sum(np.square(metrics["gate_share"])))
    return flat
