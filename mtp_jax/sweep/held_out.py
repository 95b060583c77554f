"""Held-out losses of a run of a sweep, by offset and by document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax import arrays
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.placement import place
from mtp_jax.data.store import Store
from mtp_jax.language_model import LanguageModel
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.sweep.intervals import ratio_interval
from mtp_jax.validate import require


def held_out_losses(run: LoadedRun, store: Store | Mixture, sequences: int) -> dict[str, Any]:
    """`loss`, `documents` and, of a mixture, `gate` over sequences of all held-out documents, the same for all runs."""
    window, time = run.config.head.window, run.config.data.seq_len
    found, of = [], []
    with jax.set_mesh(run.mesh):
        for document, tokens in stretches(store, sequences, time + window, 0):
            batch = place(one_sequence(tokens, window), run.mesh)
            found.append(jax.device_get(_held_out(run.model, batch)))
            of.append(document)
    return losses_of({name: by_document(of, np.concatenate([row[name] for row in found])) for name in found[0]})


def losses_of(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a results file has of held-out losses, from sums over the windows of each document: losses by offset and how
    many targets they are of, `[D, W]`, windows and the target's loss, `[D]`, and of a mixture `gate` `[D, R]` and its
    `entropy`."""
    losses_DW, counts_DW = sums["loss_W"], sums["count_W"]
    windows_D, joint_D, first_D = sums["windows"], losses_DW.sum(1), sums["first"]
    return {
        "loss": {
            "joint": ratio_interval(joint_D, windows_D),
            "first_token": ratio_interval(first_D, windows_D),
            "offsets": [ratio_interval(*columns) for columns in zip(losses_DW.T, counts_DW.T, strict=True)],
        },
        "documents": {
            name: rounded(values)
            for name, values in (("joint", joint_D), ("first_token", first_D), ("windows", windows_D))
        },
        **({"gate": _gate(sums, windows_D)} if "gate_R" in sums else {}),
    }


@jax.jit
def _held_out(model: LanguageModel, batch: dict[str, Array]) -> dict[str, Array]:
    """Sums over the positions of each sequence: losses by offset and of the target; of components also the gate. What
    a shortlist has not counts in none of them."""
    seen, targets_BTW = model.see(batch["tokens_BT"], batch["segments_BT"]), batch["targets_BTW"]
    nll_BTW = -model.head.log_likelihood(seen, targets_BTW)
    listed_BTW = nll_BTW != jnp.inf
    found = {
        "loss_W": jnp.sum(jnp.where(listed_BTW, nll_BTW, 0.0), axis=1),
        "count_W": jnp.sum(listed_BTW, axis=1, dtype=jnp.int32),
        "windows": jnp.sum(jnp.ones_like(targets_BTW[..., 0]), axis=1, dtype=jnp.int32),
        "first": -jnp.sum(arrays.log_prob(model.target(seen)[0], targets_BTW[..., 0]), axis=1),
    }
    log_w_BTR = model.head.gate(seen, targets_BTW[..., 0])
    if log_w_BTR is None:
        return found
    w_BTR = jnp.exp(log_w_BTR)
    return found | {
        "gate_R": jnp.sum(w_BTR, axis=1),
        "entropy": -jnp.sum(w_BTR * log_w_BTR, axis=(1, 2)),
    }


def one_sequence(tokens_S: np.ndarray, window: int) -> dict[str, np.ndarray]:
    """A batch of one sequence of S - W tokens of one document, each with its next W."""
    time = len(tokens_S) - window
    return {
        "tokens_BT": tokens_S[None, :time],
        "targets_BTW": np.stack([tokens_S[s : s + time] for s in range(1, window + 1)], axis=1)[None],
        "segments_BT": np.zeros((1, time), np.int32),
    }


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


def _gate(sums: Mapping[str, np.ndarray], windows_D: np.ndarray) -> dict[str, Any]:
    shares_R = sums["gate_R"].sum(0) / windows_D.sum()
    return {
        "entropy": float(sums["entropy"].sum() / windows_D.sum()),
        "effective": float(1 / np.sum(shares_R**2)),
        "shares": rounded(shares_R),
    }


def by_document(of: list[int], values_P: np.ndarray) -> np.ndarray:
    """Sums over the prompts of each document, in the order of the documents' first prompts."""
    places = {document: place for place, document in enumerate(dict.fromkeys(of))}
    sums = np.zeros((len(places), *values_P.shape[1:]), values_P.dtype)
    np.add.at(sums, [places[document] for document in of], values_P)
    return sums


def rounded(values: np.ndarray) -> list[float]:
    """Values as a results file holds them."""
    return [round(float(value), 5) for value in values]
