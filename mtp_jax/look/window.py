"""What the components of a mixture expect behind a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.heads.encoded import EncodedHead
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.language_model import LanguageModel
from mtp_jax.look.laws import Row, plot_laws
from mtp_jax.look.text import Vocabulary, check_mixture, read, text_tokens
from mtp_jax.plots import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mtp_jax.runs.loading import LoadedRun


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


def window(run: LoadedRun, prompt: str) -> Window:
    """What each component, their marginal and their joint say about what follows `prompt`. Errors as in `gate`."""
    check_mixture(run)
    tokens_1T = text_tokens(run, prompt)
    with jax.set_mesh(run.mesh):
        found = jax.device_get(_window_law(run.model, tokens_1T))
    factors_WRV, joint_WV, posterior_WR = (np.exp(np.stack(part, dtype=np.float64)) for part in found)
    factors_RWV = factors_WRV.swapaxes(0, 1)
    return Window(prompt, posterior_WR[0], factors_RWV, joint_WV, posterior_WR, Vocabulary(run.tokenizer))


def plot_window(window: Window, top: int = 3) -> Figure:
    """The `top` most likely tokens at each offset: of each component, of their marginal and of their joint.

    The number in a component's cell is its weight given the tokens that the joint prefers at the offsets before.
    """
    rank, width, _ = window.factors_RWV.shape
    rows: list[Row] = [(f"component {r + 1}", PALETTE[r % len(PALETTE)], window.factors_RWV[r]) for r in range(rank)]
    rows += [
        ("marginal of\neach offset", "0.5", window.marginal_WV),
        ("joint, given\nthose before", "0.15", window.joint_WV),
    ]
    given = ["".join(window.vocabulary[int(token)] for token in window.path_W[:s]) for s in range(width)]
    titles = [f"offset {s + 1}" + (f"\ngiven {text}" if s else "\n ") for s, text in enumerate(given)]
    figure, grid = plot_laws(window.prompt, rows, titles, window.vocabulary, top)
    for r, s in np.ndindex(rank, width):
        grid[r, s].annotate(f"w = {window.posterior_WR[s, r]:.2f}", (0.98, 0.06), xycoords="axes fraction",
                            ha="right", va="bottom", size="small", color="0.3")  # fmt: skip
    return figure


@jax.jit
def _window_law(model: LanguageModel, tokens_1T: Array) -> list[tuple[Array, ...]]:
    """For each offset: log p_rs `[R, V]`, the joint's law `[V]` and the log posterior `[R]`, along the joint's path.
    Behind an encoder the first offset is the model's own law, whatever the component."""
    seen, law_1V, next_1T = read(model, tokens_1T)
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
