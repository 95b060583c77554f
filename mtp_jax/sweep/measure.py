"""Measurements of a run of a sweep: losses, acceptance, the costs of a training step and of decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mtp_jax.arrays import random_key
from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.decode import bench_runs
from mtp_jax.bench.train import NEXT_TOKEN, measure_steps, next_token
from mtp_jax.config import MeshConfig, TrainConfig
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Generation
from mtp_jax.decode.generate import generate
from mtp_jax.mesh import make_mesh
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.loading import LoadedRun, load
from mtp_jax.state import build_model
from mtp_jax.sweep.config import MeasureConfig, Sweep, Variant
from mtp_jax.sweep.held_out import by_document, held_out_losses, stretches
from mtp_jax.sweep.intervals import ratio_interval, resample
from mtp_jax.validate import require

SLACK = 0.01  # of its steps, by which a reading may be late


def measure(
    run_dir: epath.PathLike,
    variant: Variant,
    reference_steps: int,
    cost: Mapping[str, Any],
    config: MeasureConfig,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The `readings` and what was `measured` of a finished run, as a results file has them, and its training tokens.

    `cost` is that of its shape, from `costs`, and `reference_steps` how many the run has that it is compared with.
    Measured are the averaged parameters where the run keeps them. Nothing of `run_dir` is changed.

    Raises:
      ConfigError: the run kept no checkpoint early enough for a reading, or there is too little held-out text.
      CheckpointError: a checkpoint is damaged.
    """
    with Checkpoints(run_dir) as checkpoints:
        kept, every = checkpoints.steps(), variant.config.checkpoint_every
        data_sha256 = checkpoints.meta()["data_sha256"]
    readings = {
        name: saved_step(kept, every, step)
        for name, step in readings_of(variant.config.steps, reference_steps, config, cost).items()
    }
    main = max(readings.values())
    measured = {}
    for step in sorted(set(readings.values()), reverse=True):
        run = load(run_dir, step, weights="ema" if variant.config.ema_decay else "params")
        store = prepare(run.config.data, tokenizer=run.tokenizer, reading=True)
        progress(f"step {step}: held-out loss")
        found = held_out_losses(run, store, config.held_out_sequences)
        found["decoding"] = []
        for temperature, k in _decoded(config, run.config.head.window - 1, step == main):
            progress(f"step {step}: acceptance at T = {temperature:g}, {k} drafts")
            found["decoding"].append(acceptance(run, store, config, temperature, k))
        measured[str(step)] = found
    return {"data_sha256": data_sha256, "readings": readings, "measured": measured}


def _decoded(config: MeasureConfig, most: int, at_end: bool) -> list[tuple[float, int]]:
    """The temperatures and numbers of drafts at which acceptance is measured."""
    first, *others = config.temperatures
    found = [(first, k) for k in range(most, 0, -1)] or [(first, 0)]
    return found + [(t, most) for t in others] if at_end else found


def readings_of(steps: int, reference_steps: int, config: MeasureConfig, cost: Mapping[str, Any]) -> dict[str, float]:
    """How many steps a run is read after, at most, by what is equal: steps, training FLOPs, wall-clock of training."""
    over, budget = cost["over_reference"], reference_steps
    return {
        "steps": steps,
        "flops": min(steps, budget / over["predicted"]),
        "seconds": min(steps, budget / over["measured"]),
        **{name: fraction * steps for name, fraction in config.lengths.items()},
    }


def saved_step(kept: list[int], every: int, most: float) -> int:
    """The step of those that are saved `every` so many that is nearest to `most`, if it is not later by more than
    `SLACK`, else the last one before: a comparison gives a run hardly more than its share, and for want of a checkpoint
    no less. The end of a run is saved in any case."""
    latest, end, nearest = most * (1 + SLACK), max(kept, default=0), round(most / every) * every
    due = end if most <= end <= latest else nearest if nearest <= latest else int(most) // every * every
    require(
        due in kept,
        f"A reading is due after {due} steps (at most {most:.0f}), and the run has the checkpoints {kept}. Train it "
        "again, with a checkpoint_every that is low enough and keep_checkpoints so high that all stay.",
    )
    return due


def costs(sweep: Sweep, progress: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, Any]]:
    """What a run of every shape costs, whatever it learns: a training step, beside next-token models of the same
    trunks, and `iteration_seconds` of decoding with each k, 0 included. All in one process, in turn."""
    shapes = {name: variant.config for name, variant in sweep.variants.items() if variant.whole}
    plain = {name: next_token(config) for name, config in shapes.items()}
    trunks = {config: f"{NEXT_TOKEN} of {name}" for name, config in plain.items()}  # one for each trunk
    configs = {**{name: config for config, name in trunks.items()}, **shapes}
    found = measure_steps(configs, sweep.measure.rounds, progress)
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
            "over_next_token": over(name, trunks[plain[name]]),
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
    bench = BenchConfig(
        prompts=1,  # what a prompt says does not change what an iteration takes
        prompt_tokens=measure.prompt_tokens,
        new_tokens=measure.new_tokens,
        temperatures=measure.temperatures[:1],
        ks=tuple(range(max(config.head.window for config in configs.values()))),
        repetitions=measure.rounds,
    )
    found = bench_runs({name: untrained(config) for name, config in configs.items()}, bench, progress)
    names = ("temperature", "k", "dtype", "iteration_seconds")
    return {name: [{n: row[n] for n in names} for row in found[name]["rows"]] for name in configs}


def untrained(config: TrainConfig) -> LoadedRun:
    """A model as it begins, on one device, as `load` gives a trained one. Its texts mean nothing, and nothing ends
    them."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    tokenizer.conventions = dataclasses.replace(tokenizer.conventions, stops=(-1,))
    config = config.with_tokenizer(tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        model = jax.jit(functools.partial(build_model, config))(random_key(config.seed))
    return LoadedRun(model, tokenizer, config, mesh, 0, {})


def acceptance(
    run: LoadedRun, store: Store | Mixture, config: MeasureConfig, temperature: float, k: int
) -> dict[str, Any]:
    """An entry of `decoding`: how many tokens a forward gives with k drafts, with intervals over documents.

    Prompt i is sampled as row i, whatever the run: where the target is the same, so is the text. It ends at a stop
    token: what lies behind one no head has learnt.
    """
    prompts = stretches(store, config.prompts, config.prompt_tokens, config.new_tokens)
    options = {"max_new_tokens": config.new_tokens, "temperature": temperature, "k": k, "stop_tokens": run.stop_tokens}
    parts: list[Generation] = []
    with jax.set_mesh(run.mesh):
        for first in range(0, len(prompts), config.batch_size):
            tokens = [tokens for _, tokens in prompts[first : first + config.batch_size]]
            parts.append(generate(run.decoder, tokens, row=first, **options))
    of = [document for document, _ in prompts]
    emitted_P = [len(row) - 1 for part in parts for row in part.tokens]
    forwards_P, accepted_Pk, drafted_Pk = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("forwards", "accepted", "drafted")
    )
    by = functools.partial(by_document, of)
    emitted_D, forwards_D = by(np.array(emitted_P)), by(forwards_P)
    columns = zip(by(accepted_Pk).T, by(drafted_Pk).T, strict=True)
    return {
        "temperature": temperature,
        "verifier": DecodeConfig(1, temperature).rule,
        "draft": "joint",  # older files know of another kind
        "k": k,
        "verification_steps": int(forwards_P.sum()),
        "tokens_per_forward": ratio_interval(emitted_D, forwards_D),
        "acceptance": [ratio_interval(accepted_D, drafted_D) for accepted_D, drafted_D in columns],
        "documents": {"emitted": emitted_D.tolist(), "forwards": forwards_D.tolist()},
    }
