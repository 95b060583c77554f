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
from mtp_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.heads.config import AGAINST_TARGET, HeadConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.runs.base import is_there, open_base
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import build_model, split
from mtp_jax.sweep.config import MeasureConfig, Sweep
from mtp_jax.sweep.intervals import resample
from mtp_jax.sweep.on_base import suite_prompts

TIMED = 24  # tokens of a text in which iterations of a pretrained model are timed


def costs(
    sweep: Sweep, shapes: Mapping[str, TrainConfig], progress: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """What a run of every shape costs, whatever it learns: a training step, beside next-token models of the same
    trunks, in turn, and `iteration_seconds` of decoding with each k, beside k = 0. All in one process.

    `shapes`: the configs of the runs that are whole, as they are trained. Those that cost the same are measured once. A
    head that is trained from cached hidden states reads them here too, and has no next-token model beside it: no trunk
    is in its step.
    """
    alike: dict[TrainConfig, str] = {}  # the first of those that cost the same
    same = {name: alike.setdefault(_at_any_rate(config), name) for name, config in shapes.items()}
    whole, shapes = shapes, {name: shapes[name] for name in alike.values()}
    stores = {name: store for name, config in shapes.items() if (store := _cached(config)) is not None}
    plain = {name: next_token(config) for name, config in shapes.items() if name not in stores}
    trunks = {config: f"{NEXT_TOKEN} of {name}" for name, config in plain.items()}  # one for each trunk
    configs = {**{name: config for config, name in trunks.items()}, **shapes}
    bases: dict[str, Any] = {}
    if sweep.measure.suite:  # whose prompts must fit, which is known before anything is trained
        suite_prompts(untrained(next(iter(shapes.values())), bases), sweep.measure)
    found = measure_steps(configs, sweep.measure.rounds, progress, stores)
    jax.clear_caches()  # the programs of all steps, see `_beside_plain`
    decoding = decoding_costs(shapes, sweep.measure, progress, bases)

    def over(name: str, other: str) -> dict[str, float]:
        own, base = found[name], found[other]
        ratios = np.array(own["rounds"]) / np.array(base["rounds"])
        error = float(np.std(np.median(ratios[resample(len(ratios))], axis=1)))  # of the clock
        return {"predicted": own["flops"] / base["flops"], "measured": float(np.median(ratios)), "error": error}

    return {
        name: {
            "seconds": found[one]["seconds"]["median"],
            "flops": found[one]["flops"],
            "peak_bytes": found[one]["peak_bytes"],
            "head_parameters": found[one]["head_parameters"],
            **({"over_next_token": over(one, trunks[plain[one]])} if one in plain else {}),
            "over_reference": over(one, same[sweep.variants[name].reference]),
            "decoding": decoding[one],
        }
        for name in whole
        for one in [same[name]]
    }


def _at_any_rate(config: TrainConfig) -> TrainConfig:
    """A config without what changes neither a step's cost nor an iteration's."""
    rate = {"learning_rate": 1.0, "warmup_steps": 0, "schedule": "constant", "weight_decay": 1.0}
    optimizer = dataclasses.replace(config.optimizer, **rate)
    every = dict.fromkeys(("steps", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints"), 1)
    head, average = dataclasses.replace(config.head, draft_temperature=1.0), bool(config.ema_decay) / 2
    return dataclasses.replace(config, head=head, optimizer=optimizer, seed=0, ema_decay=average, **every)


def decoding_costs(
    configs: Mapping[str, TrainConfig],
    measure: MeasureConfig,
    progress: Callable[[str], None],
    bases: dict[str, Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """How long an iteration with each k takes at batch 1, by round, of models with these configs that nothing has
    trained. `bases`: what those on one base share."""
    most = max(config.head.window for config in configs.values())
    chosen = {config.head.window - 1 for config in configs.values()} | {0, *measure.ks}
    bench = BenchConfig(
        prompts=1,  # what a prompt says does not change what an iteration takes
        prompt_tokens=measure.prompt_tokens,
        new_tokens=min(measure.new_tokens, TIMED) if measure.suite else measure.new_tokens,
        temperatures=measure.temperatures if measure.suite else measure.temperatures[:1],
        verifiers=("token",) if measure.suite else (),  # for which acceptance is expected
        ks=tuple(k for k in range(most) if not measure.ks or k in chosen),
        repetitions=measure.rounds,
    )
    alike: dict[TrainConfig, str] = {}  # the first of those that decode alike
    same = {name: alike.setdefault(_untaught(config), name) for name, config in configs.items()}
    if all(config.head.target == "ntp" for config in configs.values()):
        rows = _beside_plain({name: configs[name] for name in alike.values()}, bench, progress, bases)
    else:
        models = {name: untrained(configs[name], bases) for name in alike.values()}
        rows = {name: found["rows"] for name, found in bench_runs(models, bench, progress).items()}
    names = ("temperature", "k", "dtype", "iteration_seconds")
    return {name: [{n: row[n] for n in names} for row in rows[same[name]]] for name in configs}


def _beside_plain(
    configs: Mapping[str, TrainConfig],
    bench: BenchConfig,
    progress: Callable[[str], None],
    bases: dict[str, Any] | None,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of heads whose plain decoding is that of one trunk: each head in turn beside k = 0, and of their times what
    they would be if k = 0 had taken them all as long."""
    rows = {}
    for name, config in configs.items():
        progress(f"iterations of {name}")
        rows[name] = bench_runs({name: untrained(config, bases)}, bench, progress)[name]["rows"]
        jax.clear_caches()  # the programs of ten heads are more pieces of memory than Linux lets a process have
    plain: dict[Any, dict[str, float]] = {}  # of each cell, by head
    for name, row in ((name, row) for name, found in rows.items() for row in found if row["k"] == 0):
        plain.setdefault(_clock(configs[name], row), {})[name] = float(np.median(row["iteration_seconds"]))
    for name, row in ((name, row) for name, found in rows.items() for row in found):
        alike = plain[_clock(configs[name], row)]
        scale = float(np.median(list(alike.values()))) / alike[name]
        row["iteration_seconds"] = [scale * seconds for seconds in row["iteration_seconds"]]
    return rows


def _clock(config: TrainConfig, row: dict[str, Any]) -> Any:
    """What decodes alike with k = 0."""
    return config.model, config.base, row["temperature"], row["dtype"]


def _untaught(config: TrainConfig) -> TrainConfig:
    """A config without what only training looks at."""
    learnt = (*AGAINST_TARGET, "nll_weight", "ntp_weight", "gamma", "z_weight", "balance", "balance_weight")
    plain = {name: getattr(HeadConfig(), name) for name in (*learnt, "loss_fraction", "init_noise")}
    head = dataclasses.replace(config.head, **plain)
    return dataclasses.replace(
        _at_any_rate(config), head=head, optimizer=OptimizerConfig(warmup_steps=0), ema_decay=0.0
    )


def _cached(config: TrainConfig) -> Store | Mixture | None:
    """The data of a head that is trained from a base's cached hidden states; None of any other run."""
    if not config.base or not is_there(config.base):
        return None
    store = prepare(config.data, tokenizer=open_base(config.base).tokenizer, reading=True)
    return store if store.hidden is not None else None


class Untrained(LoadedRun):
    """A model as it begins. Its texts mean nothing, and nothing ends them."""

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """None of the ids that there are."""
        return (-1,)


def untrained(config: TrainConfig, bases: dict[str, Any] | None = None) -> Untrained:
    """A model of a config, on one device, as `load` gives a trained one. `bases`: what models on one base share,
    filled here."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    if config.base and is_there(config.base):
        tokenizer = open_base(config.base).tokenizer
    else:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    config = config.with_tokenizer(tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        model = jax.jit(functools.partial(build_model, config))(random_key(config.seed))
        if bases is not None and config.base:
            graph, params = split(model)
            own = bases.setdefault(config.base, {name: tree for name, tree in params.items() if name != "head"})
            model = nnx.merge(graph, {**params, **own})
    return Untrained(model, tokenizer, config, mesh, 0, {})
