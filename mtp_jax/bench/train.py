"""The training step with a CPD head against that of the same trunk with a plain next-token head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mtp_jax.bench.config import TrainBenchConfig
from mtp_jax.bench.timing import interleave, ratio, summary
from mtp_jax.config import HeadConfig, TrainConfig
from mtp_jax.run_dir import versions
from mtp_jax.train.checks import check_machine
from mtp_jax.train.costs import costs, peak_flops
from mtp_jax.train.evaluate import place
from mtp_jax.train.step import make_trainer

NEXT_TOKEN = "next token"


def bench_train(
    config: TrainConfig, bench: TrainBenchConfig, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure whole training steps (forward, backward, optimizer) of `config` with each rank and return rows.

    The baseline is the same trunk with an independent head of one offset, whose loss is that of a next-token model by
    the same code. A row's `step_ratio` is its step time over the baseline's, `predicted_ratio` the same in FLOPs.
    """
    heads = {NEXT_TOKEN: HeadConfig(kind="independent", window=1, rank=1, factors="full", balance="none")}
    heads |= {f"R = {rank}": dataclasses.replace(config.head, kind="cpd", rank=rank) for rank in bench.ranks}
    mesh, rows, steps = check_machine(config), {}, {}
    with jax.set_mesh(mesh):
        for name, head in heads.items():
            progress(f"compiling {name}")
            tied = config.model.tie_embeddings and head.has_unembedding
            model = dataclasses.replace(config.model, tie_embeddings=tied)
            run = dataclasses.replace(config, head=head, model=model)
            if name == NEXT_TOKEN:  # that is a whole training run, whatever this one freezes
                run = dataclasses.replace(run, init_from="", freeze="none")
            rows[name], steps[name] = _prepare(run, mesh)
        progress("measuring")
        seconds = interleave(steps, bench.repetitions)
    for name, row in rows.items():
        row |= {"head": name, "seconds": summary(seconds[name]), "step_ratio": ratio(seconds, name, NEXT_TOKEN)}
        row["tokens_per_second"] = row["tokens"] / row["seconds"]["median"]
        peak = peak_flops(mesh.devices.flat[0])
        rate = row["flops"] / row["seconds"]["median"]
        row["mfu"] = None if peak is None else rate / (peak * mesh.devices.size)
        row["flops_per_second"] = rate
        row["predicted_ratio"] = row["flops"] / rows[NEXT_TOKEN]["flops"]
    return {
        "rows": list(rows.values()),
        "repetitions": bench.repetitions,
        "mesh": dict(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "versions": versions(),
    }


def _prepare(config: TrainConfig, mesh: Any) -> tuple[dict[str, Any], Callable[[], Any]]:
    """What is known of a run's step beforehand, and a function that takes one."""
    data, window = config.data, config.head.window
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (data.batch_size, data.seq_len + window), dtype=np.int32)
    ahead = np.arange(data.seq_len)[:, None] + np.arange(1, window + 1)[None]
    batch = place(
        {
            "tokens_BT": tokens[:, : data.seq_len],
            "targets_BTW": tokens[:, ahead],
            "valid_BTW": np.ones((data.batch_size, data.seq_len, window), bool),
            "segments_BT": np.zeros((data.batch_size, data.seq_len), np.int32),
        },
        mesh,
    )
    trainer = make_trainer(config)
    state = trainer.init()
    step = trainer.step.lower(state, batch).compile()  # type: ignore[attr-defined]
    memory, cost = step.memory_analysis(), costs(config, state.params)
    held = [state]

    def run() -> Any:
        held[0], metrics = step(held[0], batch)
        return held[0], metrics

    known = {
        "tokens": data.batch_size * data.seq_len,
        "flops": (cost.trunk_flops + cost.head_flops) * data.batch_size * data.seq_len,
        "head_parameters": cost.head_params,
        "state_bytes": memory.argument_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }
    return known, run
