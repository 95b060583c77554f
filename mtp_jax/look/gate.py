"""What the gate of a mixture says about a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array

from mtp_jax.language_model import LanguageModel
from mtp_jax.look.text import Vocabulary, check_mixture, read, text_tokens
from mtp_jax.plots import PALETTE, dress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mtp_jax.runs.loading import LoadedRun

SHOWN_TOKENS = 128
"""The longest text of which a figure writes every token."""


@dataclass(frozen=True)
class Gate:
    """The weights w_r of the components at every position of a text.

    `tokens`: the T tokens as text. `weights_TR`: position t's law of the next W tokens, after token t was read, mixes
    the components with these; they sum to 1.
    """

    tokens: tuple[str, ...]
    weights_TR: np.ndarray

    @property
    def entropy_T(self) -> np.ndarray:
        """How undecided the gate is at each position, in nats: 0 for one component, log R for all alike."""
        return entropy(self.weights_TR)

    @property
    def share_R(self) -> np.ndarray:
        """The mean weight of each component over the text."""
        return self.weights_TR.mean(0)


def gate(run: LoadedRun, text: str) -> Gate:
    """The gate's weights at every token of `text`. Raises `ConfigError` if it is empty or longer than the context."""
    check_mixture(run)
    tokens_1T = text_tokens(run, text)
    with jax.set_mesh(run.mesh):
        log_w_1TR = _log_weights(run.model, tokens_1T)
    vocabulary = Vocabulary(run.tokenizer)
    return Gate(tuple(vocabulary[int(token)] for token in tokens_1T[0]), np.exp(np.asarray(log_w_1TR[0], np.float64)))


def entropy(p: np.ndarray) -> np.ndarray:
    """The entropy of the distributions along the last axis, in nats."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)


def plot_gate(gate: Gate) -> Figure:
    """The weight of each component by position and its mean, and the entropy of the weights."""
    from matplotlib.figure import Figure

    length, rank = gate.weights_TR.shape
    figure = Figure(figsize=(min(13.0, 4.0 + 0.12 * length), 2.6 + 0.3 * rank), layout="constrained")
    (heat, share), (line, key) = figure.subplots(2, 2, width_ratios=(5, 1), height_ratios=(0.3 * rank + 0.4, 1.4))
    edges_T = np.arange(length + 1) - 0.5
    mesh = heat.pcolormesh(edges_T, np.arange(rank + 1) - 0.5, gate.weights_TR.T, cmap="viridis", vmin=0, vmax=1)
    dress(heat, "Weight of each component after each token")
    heat.set(yticks=range(rank), yticklabels=[f"component {r + 1}" for r in range(rank)], ylim=(rank - 0.5, -0.5))
    dress(share, "Mean weight")
    share.barh(range(rank), gate.share_R, color=PALETTE[0], height=0.6)
    share.set(ylim=(rank - 0.5, -0.5), yticks=[], xlim=(0, 1), axisbelow=True)
    dress(line, "Entropy of the weights")
    line.step(range(length), gate.entropy_T, where="mid", color=PALETTE[0], lw=1.5)
    line.axhline(np.log(rank), color="0.4", ls=(0, (4, 3)), lw=1)
    line.annotate(f"log {rank}: all alike", (1, np.log(rank)), xycoords=("axes fraction", "data"), ha="right",
                  va="bottom", size="small", color="0.3")  # fmt: skip
    line.set(ylabel="nats", ylim=(0, max(1.25 * np.log(rank), 0.1)), xlabel="token that was read")
    for axes in (heat, line):
        axes.set_xlim(-0.5, length - 0.5)
        axes.grid(visible=False)
        axes.set_xticks([])
    if length <= SHOWN_TOKENS:
        turned = 90 if max(map(len, gate.tokens)) > 2 else 0
        line.set_xticks(range(length), gate.tokens, rotation=turned, family="monospace", size="small", parse_math=False)
        line.tick_params(axis="x", length=0)
    key.axis("off")
    figure.colorbar(mesh, cax=key.inset_axes((0, 0.3, 1, 0.14)), orientation="horizontal", label="weight")
    return figure


@jax.jit
def _log_weights(model: LanguageModel, tokens_1T: Array) -> Array:
    seen, _, next_1T = read(model, tokens_1T)
    found_1TR = model.head.gate(seen, next_1T)
    assert found_1TR is not None
    return found_1TR
