"""Benchmark of the training step with a CPD head against that of the same trunk with a plain next-token head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from mtp_jax.bench.config import TrainBenchConfig
from mtp_jax.bench.timing import interleave, ratio, summary
from mtp_jax.config import TrainConfig
from mtp_jax.data.batches import batches
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.placement import place
from mtp_jax.data.store import Store
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.shortlist import most_frequent, put_listed
from mtp_jax.runs.base import open_base
from mtp_jax.runs.layout import versions
from mtp_jax.train.checks import check_machine
from mtp_jax.train.costs import costs, peak_flops
from mtp_jax.train.evaluate import batch_sizes, is_normalised
from mtp_jax.train.step import make_trainer

NEXT_TOKEN = "next token"


def bench_train(
    config: TrainConfig, bench: TrainBenchConfig, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure whole training steps (forward, backward, optimizer) of `config` with each rank and return rows.

    A row's `step_ratio` is its step time over that of `next_token`, `predicted_ratio` the same in FLOPs.
    """
    configs = {NEXT_TOKEN: next_token(config)}
    heads = {rank: dataclasses.replace(config.head, circuit="cpd", rank=rank) for rank in bench.ranks}
    configs |= {f"R = {rank}": dataclasses.replace(config, head=head) for rank, head in heads.items()}
    rows, mesh = measure_steps(configs, bench.repetitions, progress), check_machine(config)
    for name, row in rows.items():
        row |= {"head": name, "step_ratio": ratio({n: r["rounds"] for n, r in rows.items()}, name, NEXT_TOKEN)}
        row["tokens_per_second"] = row["tokens"] / row["seconds"]["median"]
        peak = peak_flops(mesh.devices.flat[0])
        rate = row["flops"] / row["seconds"]["median"]
        row["mfu"] = None if peak is None else rate / (peak * mesh.devices.size)
        row["flops_per_second"] = rate
        row["predicted_ratio"] = row["flops"] / rows[NEXT_TOKEN]["flops"]
    return {
        "rows": [{name: value for name, value in row.items() if name != "rounds"} for row in rows.values()],
        "repetitions": bench.repetitions,
        "mesh": dict(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "versions": versions(),
    }


def next_token(config: TrainConfig) -> TrainConfig:
    """The same trunk with an independent head of one offset, all of it trained: a next-token model by the same code."""
    head = HeadConfig(circuit="independent", window=1, rank=1, factors="full", balance="none")
    return dataclasses.replace(config, head=head, init_from="", base="")


def measure_steps(
    configs: Mapping[str, TrainConfig],
    repetitions: int,
    progress: Callable[[str], None] = lambda _: None,
    stores: Mapping[str, Store | Mixture] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Steps of several runs on random tokens, interleaved in one process: what is known of each beforehand (`tokens`,
    `flops`, bytes), its times by `rounds`, and their median and quartiles, `seconds`. Those that `stores` names read
    the first batch of their data, which has the hidden states of a base."""
    rows, steps = {}, {}
    for name, config in configs.items():
        # What a base was imported from may be gone: its tokenizer is its own.
        mesh = check_machine(config, open_base(config.base).tokenizer if name in stores else None)
        with jax.set_mesh(mesh):
            progress(f"compiling {name}")
            rows[name], steps[name] = _prepare(config, mesh, stores.get(name))
    progress("measuring")
    rounds = interleave(steps, repetitions)
    for name, row in rows.items():
        row |= {"rounds": rounds[name], "seconds": summary(rounds[name])}
    return rows


def _random_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    data, window = config.data, config.head.window
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (data.batch_size, data.seq_len + window), dtype=np.int32)
    ahead = np.arange(data.seq_len)[:, None] + np.arange(1, window + 1)[None]
    return {
        "tokens_BT": tokens[:, : data.seq_len],
        "targets_BTW": tokens[:, ahead],
        "valid_BTW": np.ones((data.batch_size, data.seq_len, window), bool),
        "segments_BT": np.zeros((data.batch_size, data.seq_len), np.int32),
    }


def _prepare(config: TrainConfig, mesh: Any, store: Store | Mixture | None) -> tuple[dict[str, Any], Callable[[], Any]]:
    """What is known of a run's step beforehand, and a function that takes one."""
    data = config.data
    trainer = make_trainer(config, trunk=store is None)
    state = trainer.init()
    if store is None:
        batch = place(_random_batch(config), mesh)
    else:
        batch = place(next(batches(store.train, seed=data.seed, **batch_sizes(config, store, mesh))), mesh)
        if config.head.shortlist:  # tokens that it has not are no work
            ids, _ = most_frequent(store.train.frequencies(config.model.vocab_size), config.head.shortlist)
            state = dataclasses.replace(state, params=put_listed(state.params, ids))
    step = trainer.step.lower(state, batch).compile()  # type: ignore[attr-defined]
    normalised = store is not None and is_normalised(config, store)
    memory, cost = step.memory_analysis(), costs(config, state.whole, normalised)
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
