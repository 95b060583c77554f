"""What is measured of a run of a sweep: losses, acceptance, speed, the cost of a training step, components."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.decode import bench_decode, bench_runs
from mtp_jax.bench.train import NEXT_TOKEN, measure_steps, next_token
from mtp_jax.checkpoint import Checkpoints
from mtp_jax.config import MeshConfig, TrainConfig, require
from mtp_jax.data import Mixture, Store, load_tokenizer, prepare
from mtp_jax.decode import pick
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.generate import Generation, generate
from mtp_jax.loading import LoadedRun, load
from mtp_jax.losses.mixture import conditionals
from mtp_jax.mesh import make_mesh
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.sweep.config import MeasureConfig, Sweep, Variant
from mtp_jax.sweep.intervals import ratio_interval, resample
from mtp_jax.train.evaluate import place
from mtp_jax.train.step import build_model

SLACK = 0.01  # of its steps, by which a reading may be late
WINDOWS, SEEN = 6, 8  # windows that are shown of each component, and how often one was seen at least


def measure(
    run_dir: epath.PathLike,
    variant: Variant,
    reference_steps: int,
    cost: Mapping[str, Any],
    config: MeasureConfig,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The `readings` and what was `measured` of a finished run, as a results file has them, and its training tokens.

    `cost` is that of its shape (see `costs`), and `reference_steps` how many the run has that it is compared with.
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
        store = prepare(run.config.data, tokenizer=run.tokenizer)
        progress(f"step {step}: held-out loss")
        found = held_out_losses(run, store, config.held_out_sequences, variant.whole and step == main)
        found["decoding"] = []
        for temperature, draft, k in _decoded(config, run.config.head.window - 1, step == main):
            progress(f"step {step}: acceptance at T = {temperature:g}, {k} {draft} drafts")
            found["decoding"].append(acceptance(run, store, config, temperature, draft, k))
        found["speed"] = []
        if variant.whole and step == readings["seconds"]:
            progress(f"step {step}: speed")
            found["speed"] = speed(run, store, config)
            found["load"] = os.getloadavg()[0] / (os.cpu_count() or 1)  # of one process alone about 1
        measured[str(step)] = found
    return {"data_sha256": data_sha256, "readings": readings, "measured": measured}


def _decoded(config: MeasureConfig, most: int, at_end: bool) -> list[tuple[float, str, int]]:
    """The temperatures, kinds and numbers of drafts at which acceptance is measured."""
    first, draft = config.temperatures[0], config.drafts[0]
    found = [(first, draft, k) for k in range(most, 0, -1)] or [(first, draft, 0)]
    if at_end:
        found += [(t, draft, most) for t in config.temperatures[1:]] + [(first, d, most) for d in config.drafts[1:]]
    return found


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
    """A model as it begins, on one device, as `load` gives a trained one."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        model = jax.jit(functools.partial(build_model, config))(jax.random.key(config.seed))
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    return LoadedRun(model, tokenizer, config, mesh, 0, {})


def held_out_losses(run: LoadedRun, store: Store | Mixture, sequences: int, components: bool) -> dict[str, Any]:
    """`loss`, `documents`, `gate` and `components` over sequences of all held-out documents, the same for all runs."""
    window, time = run.config.head.window, run.config.data.seq_len
    found, seen, of = [], Components(run, window), []
    with jax.set_mesh(run.mesh):
        for document, tokens in stretches(store, sequences, time + window, 0):
            batch = one_sequence(tokens, window)
            row = jax.device_get(_held_out(run.model, place(batch, run.mesh)))
            found.append(row)
            of.append(document)
            if components:
                seen.add(batch, row["posterior_BTR"])
    sums = {name: _by_document(of, np.concatenate([row[name] for row in found])) for name in SUMS}
    losses_DW, counts_DW = sums["loss_BW"], sums["count_BW"]
    windows_D, joint_D, first_D = sums["windows_B"], losses_DW.sum(1), sums["first_B"]
    shares_R = sums["gate_BR"].sum(0) / windows_D.sum()
    return {
        "loss": {
            "joint": ratio_interval(joint_D, windows_D),
            "first_token": ratio_interval(first_D, windows_D),
            "offsets": [ratio_interval(*columns) for columns in zip(losses_DW.T, counts_DW.T, strict=True)],
        },
        "documents": {
            name: _rounded(values)
            for name, values in (("joint", joint_D), ("first_token", first_D), ("windows", windows_D))
        },
        "gate": {
            "entropy": float(sums["entropy_B"].sum() / windows_D.sum()),
            "effective": float(1 / np.sum(shares_R**2)),
            "shares": _rounded(shares_R),
        },
        "components": seen.found(),
    }


def one_sequence(tokens_S: np.ndarray, window: int) -> dict[str, np.ndarray]:
    """A batch of one sequence of S - W tokens of one document, each with its next W."""
    time = len(tokens_S) - window
    return {
        "tokens_BT": tokens_S[None, :time],
        "targets_BTW": np.stack([tokens_S[s : s + time] for s in range(1, window + 1)], axis=1)[None],
        "segments_BT": np.zeros((1, time), np.int32),
    }


SUMS = "loss_BW", "count_BW", "windows_B", "first_B", "gate_BR", "entropy_B"


@jax.jit
def _held_out(model: LanguageModel, batch: dict[str, Array]) -> dict[str, Array]:
    """Sums over the positions of each sequence: losses by offset and of the target, the gate; and the posterior of
    the components given the window. What a shortlist has not counts in none of them."""
    x_BTD, targets_BTW, head = model(batch["tokens_BT"], batch["segments_BT"]), batch["targets_BTW"], model.head
    log_w_BTR = head.log_weights(x_BTD)
    logp_BTRW = head.factor_log_probs(x_BTD, targets_BTW)
    nll_BTW = -head.log_likelihood(x_BTD, targets_BTW) if head.shortlist else -conditionals(logp_BTRW, log_w_BTR)
    listed_BTW = nll_BTW != jnp.inf
    w_BTR = jnp.exp(log_w_BTR)
    return {
        "loss_BW": jnp.sum(jnp.where(listed_BTW, nll_BTW, 0.0), axis=1),
        "count_BW": jnp.sum(listed_BTW, axis=1),
        "windows_B": jnp.sum(jnp.ones_like(targets_BTW[..., 0]), axis=1),
        "first_B": -jnp.sum(pick.log_prob(head.target_log_probs(x_BTD), targets_BTW[..., 0]), axis=1),
        "gate_BR": jnp.sum(w_BTR, axis=1),
        "entropy_B": -jnp.sum(w_BTR * log_w_BTR, axis=(1, 2)),
        "posterior_BTR": jax.nn.softmax(log_w_BTR + jnp.sum(logp_BTRW, axis=-1), axis=-1),
    }


class Components:
    """What each component is responsible for: the windows of text that its posterior prefers."""

    def __init__(self, run: LoadedRun, window: int):
        self.run, self.window = run, window
        self.mass: dict[tuple[int, ...], np.ndarray] = collections.defaultdict(lambda: np.zeros(run.config.head.rank))
        self.count: collections.Counter[tuple[int, ...]] = collections.Counter()

    def add(self, batch: Mapping[str, np.ndarray], posterior_BTR: np.ndarray) -> None:
        """Count the windows of a batch, each with its posterior."""
        windows = map(tuple, batch["targets_BTW"].reshape(-1, self.window).tolist())
        for key, weight_R in zip(windows, posterior_BTR.reshape(-1, posterior_BTR.shape[-1]), strict=True):
            self.mass[key] += weight_R
            self.count[key] += 1

    def found(self) -> list[dict[str, Any]]:
        """Of each component, the share of all windows and those in which it weighs most beyond it."""
        if not self.count:
            return []
        share_R = np.sum(list(self.mass.values()), axis=0) / self.count.total()
        common = [key for key, count in self.count.items() if count >= SEEN]
        if not common:
            return [{"share": float(share), "windows": []} for share in share_R]
        mass_NR = np.stack([self.mass[key] for key in common])
        lift_NR = mass_NR / np.array([self.count[key] for key in common])[:, None] / share_R
        # Windows that are frequent and its own: mass times log lift, the component's part of the mutual information.
        score_NR = mass_NR * np.log(np.maximum(lift_NR, 1e-9))
        decode = self.run.tokenizer.decode
        return [
            {
                "share": float(share_R[r]),
                "windows": [
                    [decode(list(common[n])), round(float(lift_NR[n, r]), 2)]
                    for n in np.argsort(-score_NR[:, r], kind="stable")[:WINDOWS]
                    if lift_NR[n, r] > 1
                ],
            }
            for r in range(len(share_R))
        ]


def stretches(store: Store | Mixture, count: int, length: int, more: int) -> list[tuple[int, np.ndarray]]:
    """`count` pieces of `length` tokens: (document, tokens). No two overlap, nor does what follows them by `more`.

    The first stretch of every held-out document, in a random order that is always the same, then the second ones, and
    so on.

    Raises `ConfigError` if the documents have not that many.
    """
    documents, size = store.valid, length + more
    order = np.random.default_rng(0).permutation(len(documents))
    turns = [(turn, int(i)) for i in order for turn in range(int(documents.lengths[i]) // size)]
    turns.sort(key=lambda at: at[0])  # stable: by turn, and in the order within
    require(
        len(turns) >= count,
        f"{count} stretches were asked for, and the held-out documents have {len(turns)} of {length} + {more} tokens; "
        "ask for fewer or shorter ones, or hold out more (data.valid_fraction).",
    )
    return [(i, documents[i][turn * size : turn * size + length]) for turn, i in turns[:count]]


def prompts_of(store: Store | Mixture, config: MeasureConfig) -> list[tuple[int, np.ndarray]]:
    """What acceptance is measured on: (document, tokens)."""
    return stretches(store, config.prompts, config.prompt_tokens, config.new_tokens)


def acceptance(
    run: LoadedRun, store: Store | Mixture, config: MeasureConfig, temperature: float, draft: str, k: int
) -> dict[str, Any]:
    """An entry of `decoding`: how many tokens a forward gives with k drafts, with intervals over documents.

    Prompt i is sampled with seed i, whatever the run: where the target is the same, so is the text.
    """
    prompts = prompts_of(store, config)
    options = {"max_new_tokens": config.new_tokens, "temperature": temperature, "draft": draft, "k": k}
    parts: list[Generation] = []
    with jax.set_mesh(run.mesh):
        for first in range(0, len(prompts), config.batch_size):
            tokens = [tokens for _, tokens in prompts[first : first + config.batch_size]]
            parts.append(generate(run.decoder, tokens, seed=first, **options))
    of = [document for document, _ in prompts]
    emitted_P = [len(row) - 1 for part in parts for row in part.tokens]
    forwards_P, accepted_Pk, drafted_Pk = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("forwards", "accepted", "drafted")
    )
    by = functools.partial(_by_document, of)
    emitted_D, forwards_D = by(np.array(emitted_P)), by(forwards_P)
    columns = zip(by(accepted_Pk).T, by(drafted_Pk).T, strict=True)
    return {
        "temperature": temperature,
        "verifier": DecodeConfig(1, temperature).rule,
        "draft": draft,
        "k": k,
        "verification_steps": int(forwards_P.sum()),
        "tokens_per_forward": ratio_interval(emitted_D, forwards_D),
        "acceptance": [ratio_interval(accepted_D, drafted_D) for accepted_D, drafted_D in columns],
        "documents": {"emitted": emitted_D.tolist(), "forwards": forwards_D.tolist()},
    }


def _by_document(of: list[int], values_P: np.ndarray) -> np.ndarray:
    """Sums over the prompts of each document, in the order of the documents' first prompts."""
    places = {document: place for place, document in enumerate(dict.fromkeys(of))}
    sums = np.zeros((len(places), *values_P.shape[1:]), values_P.dtype)
    np.add.at(sums, [places[document] for document in of], values_P)
    return sums


def speed(run: LoadedRun, store: Store | Mixture, config: MeasureConfig) -> list[dict[str, Any]]:
    """The entries of `speed`: tokens/s of one prompt at a time by k, against plain decoding, in one process.

    The prompts and seeds are the first ones of `acceptance`, and so is the text.
    """
    bench = bench_decode(
        run,
        BenchConfig(
            prompts=config.speed_prompts,
            prompt_tokens=config.prompt_tokens,
            new_tokens=config.new_tokens,
            temperatures=config.temperatures[:1],
            repetitions=config.repetitions,
        ),
        prompts=[tokens for _, tokens in prompts_of(store, config)[: config.speed_prompts]],
    )
    names = ("temperature", "k", "dtype", "plain_dtype", "tokens_per_second", "speedup", "verify_cost")
    return [{name: row[name] for name in (*names, "block_efficiency")} for row in bench["rows"]]


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in values]
