"""Data benchmark: what the data of a run cost, tokenising documents, reading batches, and what training waits for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mtp_jax.bench.config import DataBenchConfig
from mtp_jax.config import TrainConfig
from mtp_jax.data.batches import batches
from mtp_jax.data.placement import place
from mtp_jax.data.preparation import batched, cache_dir, prepare
from mtp_jax.data.sources import documents, load_source
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.runs.layout import versions
from mtp_jax.train.checks import check_machine
from mtp_jax.train.step import make_trainer


def bench_data(
    config: TrainConfig, bench: DataBenchConfig, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure the data of `config`. Rates are per second of processor time, summed over threads: per core.

    Returns:
      `prepare_bytes_per_second`: documents read from the source and tokenised, in bytes of text (None for a store that
        is all there is of its source);
      `read_tokens_per_second`: tokens of training batches, by one thread; `read_seconds` of a batch;
      `step_seconds` and `wait_seconds` of a training step of this model: all of it, and what of it was spent waiting
        for its batch; `wait_fraction` their ratio. All are medians but the rates.
    """
    data, window, mesh = config.data, config.head.window, check_machine(config)
    progress("preparing")
    store = prepare(data)
    prepared = None
    if data.source != "store":
        progress("tokenising")
        prepared = _prepare_rate(config, bench.seconds)
    progress("reading")
    sizes: dict[str, Any] = {
        "seq_len": data.seq_len, "window": window, "batch_size": data.batch_size, "seed": data.seed
    }  # fmt: skip
    read, per_batch = _read_rate(batches(store.train, **sizes, threads=1), bench.seconds)
    progress("compiling the training step")
    with jax.set_mesh(mesh):
        trainer, found = make_trainer(config), batches(store.train, **sizes)
        state = trainer.init()
        steps, waits = [], []
        for step in range(bench.steps + 1):
            progress(f"step {step} of {bench.steps}")
            begin = time.perf_counter()
            batch = place(next(found), mesh)
            got = time.perf_counter()
            state, metrics = trainer.step(state, batch)
            jax.block_until_ready((state, metrics))
            if step:  # the first compiles
                steps.append(time.perf_counter() - begin)
                waits.append(got - begin)
    return {
        "source": data.source,
        "tokenizer": data.tokenizer,
        "batch_size": data.batch_size,
        "seq_len": data.seq_len,
        "prepare_bytes_per_second": prepared,
        "read_tokens_per_second": read,
        "read_seconds": per_batch,
        "step_seconds": float(np.median(steps)),
        "wait_seconds": float(np.median(waits)),
        "wait_fraction": float(np.sum(waits) / np.sum(steps)),
        "cores": os.cpu_count(),
        "versions": versions(),
    }


def _prepare_rate(config: TrainConfig, seconds: float) -> float:
    """Bytes of documents per second of processor time, from the source to token ids."""
    source, tokenizer = load_source(config.data), load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    size, begin, end = 0, time.process_time(), time.perf_counter() + seconds
    for batch in batched(documents(source, cache_dir(config.data) / "tfds")):
        texts = [text for _, text in batch]
        tokenizer.encode_batch(texts)
        size += sum(map(len, texts))
        if time.perf_counter() > end:
            break
    return size / (time.process_time() - begin)


def _read_rate(found: Any, seconds: float) -> tuple[float, float]:
    """Tokens per second of processor time, and the median seconds of a batch."""
    next(found)  # the threads start, and the first epoch is permuted
    times, tokens = [], 0
    begin, end = time.process_time(), time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        tokens += next(found)["tokens_BT"].size
        times.append(time.perf_counter() - now)
    return tokens / (time.process_time() - begin), float(np.median(times))
