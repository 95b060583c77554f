"""Evaluation: held-out losses, for the training loop and for a run that was loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.data.batches import held_out_batches
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.placement import place, shard_of
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.expectation import Expectation, expectation, hidden_states
from mtp_jax.decode.generate import generate
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import split
from mtp_jax.train.step import batch_loss, target_counts

ROWS = 8
"""Texts that are written and looked at together, on a device."""


def batch_sizes(config: TrainConfig, store: Store | Mixture, mesh: Mesh) -> dict[str, Any]:
    """What `mtp_jax.data.batches` is told of a run's batches: sizes, the part that this process reads, whether
    documents come in rows (those of a head on a base do, and conversations), and whether with a normaliser."""
    data, shard = config.data, shard_of(mesh, config.data.batch_size)
    sizes = {"seq_len": data.seq_len, "window": config.head.window, "batch_size": data.batch_size}
    rows, normalised = bool(config.base) or store.masked, is_normalised(config, store)
    return {**sizes, "shard": shard, "rows": rows, "normalised": normalised}


def is_normalised(config: TrainConfig, store: Store | Mixture) -> bool:
    """Whether a run reads the normaliser of the law that its head is compared with: at its temperature, and kept."""
    return bool(config.head.against_target) and store.law_temperature == config.head.temperature


def held_out(config: TrainConfig, store: Store | Mixture, mesh: Mesh, limit: int | None) -> list[Any]:
    """The held-out batches of a config, on the mesh."""
    found = held_out_batches(store.valid, limit=limit, **batch_sizes(config, store, mesh))
    return [place(batch, mesh, config.data.batch_size) for batch in found]


def evaluate(
    loss: Callable[..., Any], params: Any, batches: list[Any], stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Mean losses over batches, each target weighing the same. `loss` is a compiled `batch_loss`.

    Before each batch but the first `stop` is asked: if it says so, the sums of those that were made are returned, which
    tell no more than whether they are finite.
    """
    counts_2W = target_counts(batches)
    sums: list[Any] = []
    for batch in batches:
        if sums and stop():
            break
        sums.append(loss(params, batch, counts_2W))
        # One batch is worked on while the next is begun, so that `stop` is asked at the pace of the devices.
        jax.block_until_ready(sums[-2:][0])
    value, aux = jax.tree.map(lambda *parts: sum(np.asarray(part) for part in parts), *sums)
    return named({"loss": value, **aux})


def store_of(run: LoadedRun) -> Store | Mixture:
    """The data of a loaded run, which is only read."""
    return prepare(run.config.data, tokenizer=run.tokenizer, reading=True)


def evaluate_run(run: LoadedRun, limit: int | None = None, store: Store | Mixture | None = None) -> dict[str, float]:
    """The held-out metrics of a loaded run, over `limit` batches, spread over what is held out, or all.

    `store`: the run's data, if it is open already.
    """
    graph, params = split(run.model)
    with jax.set_mesh(run.mesh):
        batches = held_out(run.config, store or store_of(run), run.mesh, limit)
        return evaluate(jax.jit(functools.partial(batch_loss, graph)), params, batches)


def expected_of_run(
    run: LoadedRun,
    prompts: list[np.ndarray],
    temperature: float,
    k: int,
    new_tokens: int,
    draft_temperatures: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """What drafting is expected to count on texts that the run writes behind prompts.

    Args:
      prompts: token ids.
      temperature: of the texts.
      k: drafts per forward.
      new_tokens: how long a text is, at most.
      draft_temperatures: those of `HeadConfig` to look at; by default the run's own alone.

    Returns:
      A row for each draft temperature.

    Raises:
      ConfigError: as decoding does.
    """
    heads = [
        dataclasses.replace(run.config.head, draft_temperature=each)
        for each in draft_temperatures or [run.config.head.draft_temperature]
    ]
    parts: list[list[Expectation]] = [[] for _ in heads]
    with jax.set_mesh(run.mesh):
        model = nnx.merge(*split(run.model))  # the same arrays, for a head that drafts otherwise
        for first, some, count in groups(run, prompts):
            config = DecodeConfig(new_tokens, temperature, row=first, k=0, stop_tokens=run.stop_tokens)
            texts = generate(run.decoder, some, **vars(config)).tokens
            states, config = hidden_states(run.model, some, texts), dataclasses.replace(config, k=k)
            for part, head in zip(parts, heads, strict=True):
                model.head.config = head
                part.append(expectation(model, some, texts, config, states).first(count))
    return [
        {
            "temperature": temperature,
            "draft_temperature": head.draft_temperature,
            "verifier": "token",
            "k": k,
            "prompts": len(prompts),
            "tokens_per_forward": whole.tokens_per_forward,
            "acceptance": whole.acceptance,
            "overlap": whole.overlap,
        }
        for head, whole in zip(heads, map(Expectation.together, parts), strict=True)
    ]


def groups(run: LoadedRun, prompts: list[np.ndarray]) -> Iterator[tuple[int, list[np.ndarray], int]]:
    """Prompts as they are looked at together: the number of the first, some of them, filled up with copies of it to
    what the devices divide, and how many are not copies."""
    devices = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    for first in range(0, len(prompts), devices * ROWS):
        some = prompts[first : first + devices * ROWS]
        yield first, some + some[:1] * (-len(some) % devices), len(some)


def named(metrics: Any, window: int = 0) -> dict[str, float]:
    """Metrics as flat scalars: vectors become `loss_offset_1`.., and what is derived from them is added.

    Steps of a head on a base do without the loss of the model's own next token: with the `window` of the head its
    losses are named by their offsets all the same, and no `joint_loss` is made of them.
    `joint_loss` is the sum of the offsets' means: -log q of a whole window, where all windows are whole.
    With a shortlist, `loss_offset` is the mean over the targets that it has (and `joint_loss` the sum of those), and
    `listed` their fraction; `loss` counts the others as 0, so it compares runs with one list alone. In the same way
    `kl_offset`, `overlap_offset` and the others against the target's law are means over the targets that have no other
    before them in their window, and `listed_before` is the fraction of those.
    `gate_effective`, of a mixture, is 1 / sum_r share_r^2: R if all components have the same mean weight, 1 if one has
    all of it.
    """
    flat: dict[str, float] = {}
    if "listed" in metrics:
        listed = metrics["listed"][-len(metrics["loss_offset"]) :]  # steps on a base have no loss of the first offset
        listed = np.where(listed, listed, np.nan)
        metrics = metrics | {"loss_offset": metrics["loss_offset"] / listed}
    if "listed_before" in metrics:
        before = np.where(metrics["listed_before"], metrics["listed_before"], np.nan)
        ours = metrics.keys() & {"kl_offset", "overlap_offset", "acceptance_offset", "lk_offset"}
        metrics = metrics | {name: metrics[name] / before for name in ours}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim == 0:
            flat[name] = float(value)
        else:
            first = window - len(value) + 1 if name == "loss_offset" and window else 1
            flat |= {f"{name}_{i}": float(v) for i, v in enumerate(value, first)}
    if not window or "loss_first_token" in metrics:
        flat["joint_loss"] = float(np.sum(metrics["loss_offset"]))
    if "gate_share" in metrics:
        flat["gate_effective"] = float(1 / np.sum(np.square(metrics["gate_share"])))
    return flat
