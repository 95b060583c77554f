"""Measurements of a head on a base: held-out losses by row, and what drafting is expected to count on the base's texts.

All heads on a base with target `ntp` preserve one law, so the texts are the same for all of them, and what is expected
of drafts on them needs no decoding: differences between heads are then those of their laws, and not of draws.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.suite import chosen_records, read_suite
from mtp_jax.data.batches import held_out_batches
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.placement import place
from mtp_jax.data.store import Store
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.expectation import Expectation, expectation, hidden_states
from mtp_jax.decode.generate import generate
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.runs.paths import write_json
from mtp_jax.state import split
from mtp_jax.sweep.config import MeasureConfig
from mtp_jax.sweep.held_out import losses_of
from mtp_jax.sweep.intervals import of_drafting
from mtp_jax.train.step import batch_loss, target_counts
from mtp_jax.validate import require


def in_rows(store: Store | Mixture) -> bool:
    """Whether a store has what is looked at by rows: conversations, or hidden states."""
    return store.masked or store.hidden is not None


def held_out_row_losses(run: LoadedRun, store: Store | Mixture, count: int) -> dict[str, Any]:
    """`loss`, `documents` and, of a mixture, `gate`, over `count` rows that lie evenly over what is held out: of the
    windows that are supervised whole."""
    graph, params = split(run.model)
    loss = jax.jit(functools.partial(batch_loss, graph))
    sizes: dict[str, Any] = {"seq_len": run.config.data.seq_len, "window": run.config.head.window, "batch_size": 1}
    found = []
    with jax.set_mesh(run.mesh):
        for row in held_out_batches(store.valid, limit=count, rows=True, **sizes):
            whole_BT1 = row["valid_BTW"].all(axis=2, keepdims=True)
            batch = place({**row, "valid_BTW": row["valid_BTW"] & whole_BT1}, run.mesh)
            _, means = jax.device_get(loss(params, batch, target_counts([batch])))
            found.append(_sums(means, int(whole_BT1.sum())))
    window = sizes["window"]
    require(
        any(row["windows"] for row in found),
        f"No held-out row has {window + 1} tokens in a row of which {window} are supervised. Hold out more "
        "(data.valid_fraction), or lower head.window.",
    )
    return losses_of({name: np.stack([row[name] for row in found]) for name in found[0]})


def _sums(means: dict[str, Any], windows: int) -> dict[str, Any]:
    """What `held_out.losses_of` is given of a row, from the means over its windows."""
    found = {
        "loss_W": means["loss_offset"] * windows,
        "count_W": means.get("listed", np.ones_like(means["loss_offset"])) * windows,
        "windows": windows,
        "first": means["loss_first_token"] * windows,
    }
    if "gate_share" in means:
        found |= {"gate_R": means["gate_share"] * windows, "entropy": means["gate_entropy"] * windows}
    return found


@dataclass(frozen=True)
class BaseTexts:
    """What a base wrote at one temperature behind the prompts of a suite, in parts, and their hidden states."""

    temperature: float
    parts: list[tuple[list[np.ndarray], list[np.ndarray], DecodeConfig, Any]]

    def expected(self, run: LoadedRun, ks: Sequence[int]) -> list[dict[str, Any]]:
        """Entries of `decoding`: what each number of drafts is expected to count with the head of `run`, which is on
        that base. Their documents are the prompts."""
        with jax.set_mesh(run.mesh):
            each = [expectation(run.model, prompts, texts, *how) for prompts, texts, *how in self.parts]
        most = Expectation.together(each)
        found = []
        for k in ks:
            counts = most.with_drafts(k)
            by_text = counts.emitted_B, counts.forwards_B, counts.accepted_Bk, counts.drafted_Bk
            found.append({"expected": True, **of_drafting(self.temperature, "token", k, *by_text)})
        return found


def suite_prompts(run: LoadedRun, config: MeasureConfig) -> list[np.ndarray]:
    """The ids of the prompts of a suite, by length: little of a batch is padding.

    Raises `ConfigError` as the suite's records do: one is not readable, or leaves no room for an answer.
    """
    bench = BenchConfig(suite=config.suite, prompts=config.prompts, new_tokens=config.new_tokens)
    records = chosen_records(read_suite(config.suite), bench)
    return sorted((record.encode(run, config.new_tokens) for record in records), key=len)


def base_texts(run: LoadedRun, config: MeasureConfig, temperature: float, kept: epath.Path) -> BaseTexts:
    """Let the base of `run` answer the suite, without drafts. Prompt i, by length, is sampled as row i.

    The answers are kept in the file `kept`, and read from it where they are of the same base, prompts and numbers.
    Errors are those of `suite_prompts`.
    """
    prompts = suite_prompts(run, config)
    base = {name: run.meta["base"][name] for name in ("sha256", "step")}
    of = {**base, "dtype": run.config.model.dtype, "temperature": temperature, "new_tokens": config.new_tokens}
    of |= {"batch_size": config.batch_size, "prompts": [prompt.tolist() for prompt in prompts]}
    found = json.loads(kept.read_text()) if kept.exists() else {}
    answers = [np.array(ids, np.int32) for ids in found["texts"]] if found.get("of") == of else []
    parts = []
    with jax.set_mesh(run.mesh):
        for first in range(0, 0 if answers else len(prompts), config.batch_size):
            some = prompts[first : first + config.batch_size]
            plain = DecodeConfig(config.new_tokens, temperature, row=first, k=0, stop_tokens=run.stop_tokens)
            answers += generate(run.decoder, some, **vars(plain)).tokens
        if found.get("of") != of:
            write_json(kept, {"of": of, "texts": [ids.tolist() for ids in answers]})
        for first in range(0, len(prompts), config.batch_size):
            some, texts = (values[first : first + config.batch_size] for values in (prompts, answers))
            decode = DecodeConfig(config.new_tokens, temperature, stop_tokens=run.stop_tokens)
            parts.append((some, texts, decode, hidden_states(run.model, some, texts)))
    return BaseTexts(temperature, parts)
