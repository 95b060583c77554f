"""Measurements of a run of a sweep: readings, losses and acceptance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from mtp_jax.data.mixture import Mixture
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Generation
from mtp_jax.decode.generate import generate
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.loading import LoadedRun, load
from mtp_jax.sweep.config import MeasureConfig, Variant
from mtp_jax.sweep.held_out import by_document, held_out_losses, stretches
from mtp_jax.sweep.intervals import of_drafting
from mtp_jax.sweep.on_base import BaseTexts, base_texts, held_out_row_losses, in_rows
from mtp_jax.validate import require

SLACK = 0.01  # of its steps, by which a reading may be late


@dataclass(frozen=True)
class Steps:
    """How many steps a run has, the one that it is compared with, and the run of the sweep that has the fewest."""

    own: int
    reference: int
    least: int


def measure(
    run_dir: epath.PathLike,
    variant: Variant,
    steps: Steps,
    cost: Mapping[str, Any],
    config: MeasureConfig,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The `readings` and what was `measured` of a finished run, as a results file has them, and its training tokens.

    `cost` is that of its shape, from `costs`.
    Measured are the averaged parameters where the run keeps them. Nothing of `run_dir` is changed.

    Raises:
      ConfigError: the run kept no checkpoint early enough for a reading, or there is too little held-out text.
      CheckpointError: a checkpoint is damaged.
    """
    with Checkpoints(run_dir) as checkpoints:
        kept, every = checkpoints.steps(), variant.config.checkpoint_every
        data_sha256 = checkpoints.meta()["data_sha256"]
    readings = {name: saved_step(kept, every, step) for name, step in readings_of(steps, config, cost).items()}
    main = max(readings.values())
    measured, texts, texts_dir = {}, dict[float, BaseTexts](), epath.Path(run_dir).parent / "texts"
    for step in sorted(set(readings.values()), reverse=True):
        run = load(run_dir, step, weights="ema" if variant.config.ema_decay else "params")
        store = prepare(run.config.data, tokenizer=run.tokenizer, reading=True)
        progress(f"step {step}: held-out loss")
        losses = held_out_row_losses if in_rows(store) else held_out_losses
        found = losses(run, store, config.held_out_sequences)
        found["decoding"], most = [], run.config.head.window - 1
        for temperature, ks in _decoded(config, most, step == main):
            if config.suite:
                if temperature not in texts:
                    progress(f"the base writes at T = {temperature:g}")
                    texts[temperature] = base_texts(run, config, temperature, texts_dir / f"{temperature:g}.json")
                progress(f"step {step}: expected acceptance at T = {temperature:g}")
                found["decoding"] += texts[temperature].expected(run, ks)
                continue
            for k in ks:
                progress(f"step {step}: acceptance at T = {temperature:g}, {k} drafts")
                found["decoding"].append(acceptance(run, store, config, temperature, k))
        measured[str(step)] = found
    return {"data_sha256": data_sha256, "readings": readings, "measured": measured}


def _decoded(config: MeasureConfig, most: int, at_end: bool) -> list[tuple[float, list[int]]]:
    """The temperatures at which acceptance is measured, and the numbers of drafts at each."""
    first, *others = config.temperatures
    ks = [k for k in range(most, 0, -1) if k == most or not config.ks or k in config.ks] or [0]
    return [(first, ks), *((t, ks if config.suite else [most]) for t in others if at_end or config.suite)]


def readings_of(steps: Steps, config: MeasureConfig, cost: Mapping[str, Any]) -> dict[str, float]:
    """How many steps a run is read after, at most, by what is equal: steps, training FLOPs, wall-clock of training."""
    over = cost["over_reference"]
    return {
        "steps": steps.least,
        "flops": min(steps.own, steps.reference / over["predicted"]),
        "seconds": min(steps.own, steps.reference / over["measured"]),
        **{name: fraction * steps.own for name, fraction in config.lengths.items()},
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
    counts = map(by, (np.array(emitted_P), forwards_P, accepted_Pk, drafted_Pk))
    return of_drafting(temperature, DecodeConfig(1, temperature).rule, k, *counts)
