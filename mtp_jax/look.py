"""Views into a trained model: what its gate and its components say about a text, as arrays and as figures.

For notebooks, such as `experiments/notebooks/reload_checkpoint.ipynb`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.decode.spans import Completion
from mtp_jax.decode.text import check_text
from mtp_jax.heads.base import Seen
from mtp_jax.heads.encoded import EncodedHead
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.language_model import LanguageModel
from mtp_jax.plots import PALETTE, dress
from mtp_jax.validate import require

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


@dataclass(frozen=True)
class Window:
    """The law of the W tokens that follow a prompt, in probabilities.

    `weights_R`: the gate's. `factors_RWV`: p_rs, what component r says about offset s. `joint_WV`: the law of each
    offset given the most likely token of `joint_WV` at every offset before it; the first is the target's. It is what
    greedy decoding drafts from. `posterior_WR`: the weights of the components at each offset, given those tokens.
    Behind an encoder the first offset is the model's own law: it is that of each component.
    `vocabulary`: the V tokens as text.
    """

    prompt: str
    weights_R: np.ndarray
    factors_RWV: np.ndarray
    joint_WV: np.ndarray
    posterior_WR: np.ndarray
    vocabulary: Vocabulary

    @property
    def marginal_WV(self) -> np.ndarray:
        """The law of each offset alone, whatever comes before it: sum_r w_r p_rs."""
        return np.einsum("r,rwv->wv", self.weights_R, self.factors_RWV)

    @property
    def path_W(self) -> np.ndarray:
        """Token ids: the most likely token at each offset, given the ones before it."""
        return self.joint_WV.argmax(-1)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens as text that a figure can show."""

    tokenizer: Tokenizer

    def __getitem__(self, token: int) -> str:
        if token == self.tokenizer.end_of_document:
            return "<end>"
        if token >= self.tokenizer.vocab_size:  # a model's table may be longer than its tokenizer's
            return f"<{token}>"
        text = self.tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
        return "".join(map(_drawn, text)) or f"<{token}>"


def gate(run: LoadedRun, text: str) -> Gate:
    """The gate's weights at every token of `text`. Raises `ConfigError` if it is empty or longer than the context."""
    _check(run)
    tokens_1T = _tokens(run, text)
    with jax.set_mesh(run.mesh):
        log_w_1TR = _log_weights(run.model, tokens_1T)
    vocabulary = Vocabulary(run.tokenizer)
    return Gate(tuple(vocabulary[int(token)] for token in tokens_1T[0]), np.exp(np.asarray(log_w_1TR[0], np.float64)))


def entropy(p: np.ndarray) -> np.ndarray:
    """The entropy of the distributions along the last axis, in nats."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)


def window(run: LoadedRun, prompt: str) -> Window:
    """What each component, their marginal and their joint say about what follows `prompt`. Errors as in `gate`."""
    _check(run)
    tokens_1T = _tokens(run, prompt)
    with jax.set_mesh(run.mesh):
        found = jax.device_get(_window_law(run.model, tokens_1T))
    factors_WRV, joint_WV, posterior_WR = (np.exp(np.stack(part, dtype=np.float64)) for part in found)
    factors_RWV = factors_WRV.swapaxes(0, 1)
    return Window(prompt, posterior_WR[0], factors_RWV, joint_WV, posterior_WR, Vocabulary(run.tokenizer))


def complete(run: LoadedRun, prompt: str, *, stop: str | Sequence[str] = (), **options: Any) -> Completion:
    """Continue a text and keep which tokens were accepted drafts; a notebook shows them green.

    Arguments as in `LoadedRun.stream`.
    """
    spans = run.stream(prompt, stop=stop, **options)
    return Completion(tuple(spans), spans.summary)


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


def plot_window(window: Window, top: int = 3) -> Figure:
    """The `top` most likely tokens at each offset: of each component, of their marginal and of their joint.

    The number in a component's cell is its weight given the tokens that the joint prefers at the offsets before.
    """
    from matplotlib.figure import Figure

    rank, width, _ = window.factors_RWV.shape
    rows = [(f"component {r + 1}", PALETTE[r % len(PALETTE)], window.factors_RWV[r]) for r in range(rank)]
    rows += [
        ("marginal of\neach offset", "0.5", window.marginal_WV),
        ("joint, given\nthose before", "0.15", window.joint_WV),
    ]
    height = 0.25 + 0.19 * top
    figure = Figure(figsize=(1.6 + 2.1 * width, 1.1 + height * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), width, sharex=True, squeeze=False)
    for (name, colour, law_WV), line in zip(rows, grid, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", weight="bold", color=colour, labelpad=34)
        for axes, law_V in zip(line, law_WV, strict=True):
            best = np.argsort(-law_V, kind="stable")[:top]
            axes.barh(range(len(best)), law_V[best], color=colour, height=0.7)
            labels = [window.vocabulary[int(token)] for token in best]
            axes.set_yticks(range(len(best)), labels, family="monospace", size="medium", parse_math=False)
            axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(len(best) - 0.5, -0.5))
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right"]].set_visible(False)
    for s in range(width):
        given = "".join(window.vocabulary[int(token)] for token in window.path_W[:s])
        title = f"offset {s + 1}" + (f"\ngiven {given}" if s else "\n ")
        grid[0, s].set_title(title, size="medium", weight="bold", parse_math=False)
        grid[-1, s].set_xlabel("probability")
        for r in range(rank):
            grid[r, s].annotate(f"w = {window.posterior_WR[s, r]:.2f}", (0.98, 0.06), xycoords="axes fraction",
                                ha="right", va="bottom", size="small", color="0.3")  # fmt: skip
    prompt = "".join(map(_drawn, window.prompt))
    prompt = prompt if len(prompt) <= 60 else f"...{prompt[-60:]}"
    figure.suptitle(f"After {prompt}", x=0.01, ha="left", weight="bold", parse_math=False)
    return figure


def _drawn(character: str) -> str:
    """A character as the figures' font shows it: white space by signs, what the font has not as an escape."""
    signs = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
    has = character in signs or (character.isprintable() and ord(character) in _glyphs())
    return signs.get(character, character) if has else character.encode("unicode_escape").decode()


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that matplotlib's default fonts both have, proportional and monospaced."""
    from matplotlib import font_manager

    fonts = (font_manager.get_font(font_manager.findfont(family)) for family in ("DejaVu Sans", "DejaVu Sans Mono"))
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def _tokens(run: LoadedRun, text: str) -> np.ndarray:
    """`[1, T]`."""
    check_text("text", text)
    tokens_T, most = run.encode(text), run.config.model.context_length
    require(
        1 <= len(tokens_T) <= most,
        f"The text has {len(tokens_T)} tokens; the model reads 1..{most} (context_length). Give another one.",
    )
    return np.asarray(tokens_T, np.int32)[None]


def _check(run: LoadedRun) -> None:
    """Refuse a head that has no components to look at."""
    head = run.model.head
    require(
        isinstance(head, (MixtureHead, EncodedHead)),
        f"The run's head is of kind {head.config.kind}; what is shown here are the components of a mixture.",
    )


def _read(model: LanguageModel, tokens_1T: Array) -> tuple[Seen, Array, Array]:
    """What the model sees of a text, the target's law behind it, `[1, V]`, and the token behind each: the text's, and
    behind the last one the target's most likely."""
    seen, last_1 = model.see(tokens_1T), jnp.full((1,), tokens_1T.shape[1] - 1, jnp.int32)
    law_1V = model.target(seen.at(last_1))[0][:, 0]
    chosen_1 = jnp.argmax(law_1V, axis=-1).astype(jnp.int32)
    return seen, law_1V, jnp.concatenate([seen.tokens_BT[:, 1:], chosen_1[:, None]], axis=1)


@jax.jit
def _log_weights(model: LanguageModel, tokens_1T: Array) -> Array:
    seen, _, next_1T = _read(model, tokens_1T)
    found_1TR = model.head.gate(seen, next_1T)
    assert found_1TR is not None
    return found_1TR


@jax.jit
def _window_law(model: LanguageModel, tokens_1T: Array) -> list[tuple[Array, ...]]:
    """For each offset: log p_rs `[R, V]`, the joint's law `[V]` and the log posterior `[R]`, along the joint's path.
    Behind an encoder the first offset is the model's own law, whatever the component."""
    seen, law_1V, next_1T = _read(model, tokens_1T)
    last_1 = 0 * seen.tokens_BT[:, 0] + tokens_1T.shape[1] - 1  # placed as rows are
    here, window, found = seen.at(last_1), model.head.config.window, []
    if isinstance(model.head, EncodedHead):
        head, mixture = model.head, model.head.mixture
        cache, _ = head.extend(head.init_cache(*tokens_1T.shape), seen, next_1T, 0 * last_1, None)
        joint = head.begin(here, next_1T[:, -1], window=window, cache=cache, position_B=last_1)
        alike_RV = jnp.broadcast_to(law_1V[0], (joint.log_alpha_BR.shape[1], law_1V.shape[1]))
        found.append((alike_RV, law_1V[0], joint.log_alpha_BR[0]))
    else:
        assert isinstance(model.head, MixtureHead)
        mixture, joint = model.head, model.head.joint(here, window)
    for s, logp_1RV in enumerate(joint.logp_BRV):
        listed = mixture.shortlist if s >= mixture.whole else None
        factors_RV = listed.spread(logp_1RV[0]) if listed else logp_1RV[0]
        law_1V = mixture.next_log_probs(joint) if found else law_1V
        found.append((factors_RV, law_1V[0], joint.log_alpha_BR[0]))
        joint = mixture.condition(joint, jnp.argmax(law_1V, axis=-1))
    return list(zip(*found, strict=True))
