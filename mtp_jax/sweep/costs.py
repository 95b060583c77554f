"""Costs of the runs of a sweep: a training step and an iteration of decoding of every shape, in one process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mtp_jax.arrays import random_key
from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.decode import bench_runs
from mtp_jax.bench.train import NEXT_TOKEN, measure_steps, next_token
from mtp_jax.config import MeshConfig, TrainConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.mesh import make_mesh
from mtp_jax.runs.base import open_base
from mtp_jax.runs.layout import holds_run
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import build_model, split
from mtp_jax.sweep.config import MeasureConfig, Sweep
from mtp_jax.sweep.intervals import resample


def costs(
    sweep: Sweep, shapes: Mapping[str, TrainConfig], progress: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """What a run of every shape costs, whatever it learns: a training step, beside next-token models of the same
    trunks, and `iteration_seconds` of decoding with each k, 0 included. All in one process, in turn.

    `shapes`: the configs of the runs that are whole, as they are trained. A head that is trained from cached hidden
    states reads them here too, and has no next-token model beside it: no trunk is in its step.
    """
    stores = {name: store for name, config in shapes.items() if (store := _cached(config)) is not None}
    plain = {name: next_token(config) for name, config in shapes.items() if name not in stores}
    trunks = {config: f"{NEXT_TOKEN} of {name}" for name, config in plain.items()}  # one for each trunk
    configs = {**{name: config for config, name in trunks.items()}, **shapes}
    found = measure_steps(configs, sweep.measure.rounds, progress, stores)
    decoding = decoding_costs(shapes, sweep.measure, progress)

    def over(name: str, other: str) -> dict[str, float]:
        own, base = found[name], found[other]
        ratios = np.array(own["rounds"]) / np.array(base["rounds"])
        error = float(np.std(np.median(ratios[resample(len(ratios))], axis=1)))  # of the clock
        return {"predicted": own["flops"] / base["flops"], "measured": float(np.median(ratios)), "error": error}

    return {
        name: {
            "seconds": found[name]["seconds"]["median"],
            "flops": found[name]["flops"],
            "peak_bytes": found[name]["peak_bytes"],
            "head_parameters": found[name]["head_parameters"],
            **({"over_next_token": over(name, trunks[plain[name]])} if name in plain else {}),
            "over_reference": over(name, sweep.variants[name].reference),
            "decoding": decoding[name],
        }
        for name in shapes
    }


def decoding_costs(
    configs: Mapping[str, TrainConfig], measure: MeasureConfig, progress: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """How long an iteration with each k takes at batch 1, by round, of models with these configs that nothing has
    trained."""
    most = max(config.head.window for config in configs.values())
    chosen = {config.head.window - 1 for config in configs.values()} | {0, *measure.ks}
    bench = BenchConfig(
        prompts=1,  # what a prompt says does not change what an iteration takes
        prompt_tokens=measure.prompt_tokens,
        new_tokens=measure.new_tokens,
        temperatures=measure.temperatures if measure.suite else measure.temperatures[:1],
        ks=tuple(k for k in range(most) if not measure.ks or k in chosen),
        repetitions=measure.rounds,
    )
    bases: dict[str, Any] = {}
    found = bench_runs({name: untrained(config, bases) for name, config in configs.items()}, bench, progress)
    names = ("temperature", "k", "dtype", "iteration_seconds")
    return {name: [{n: row[n] for n in names} for row in found[name]["rows"]] for name in configs}


def _cached(config: TrainConfig) -> Store | None:
    """The data of a head that is trained from a base's cached hidden states; None of any other run."""
    if not config.base or not holds_run(config.base):
        return None
    store = prepare(config.data, tokenizer=open_base(config.base).tokenizer, reading=True)
    return store if isinstance(store, Store) and store.hidden is not None else None


def untrained(config: TrainConfig, bases: dict[str, Any] | None = None) -> LoadedRun:
    """A model as it begins, on one device, as `load` gives a trained one. Its texts mean nothing, and nothing ends
    them. `bases`: what models on one base share, filled here."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    if config.base and holds_run(config.base):
        tokenizer = open_base(config.base).tokenizer
    else:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    tokenizer.conventions = dataclasses.replace(tokenizer.conventions, stops=(-1,))
    config = config.with_tokenizer(tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        model = jax.jit(functools.partial(build_model, config))(random_key(config.seed))
        if bases is not None and config.base:
            graph, params = split(model)
            own = bases.setdefault(config.base, {name: tree for name, tree in params.items() if name != "head"})
            model = nnx.merge(graph, {**params, **own})
    return LoadedRun(model, tokenizer, config, mesh, 0, {})
