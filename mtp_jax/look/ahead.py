"""What a head drafts behind a prompt, beside what the model itself says there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.language_model import LanguageModel
from mtp_jax.look.laws import Row, plot_laws
from mtp_jax.look.text import Vocabulary, read, text_tokens
from mtp_jax.plots import PALETTE
from mtp_jax.validate import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mtp_jax.runs.loading import LoadedRun


@dataclass(frozen=True)
class Ahead:
    """Laws of the W - 1 tokens behind the one that the target chose, in probabilities.

    Both are at the temperature whose law the head has learnt (`HeadConfig.temperature`). `path_W`: the token that the
    target prefers behind the prompt, and then the ones that the head prefers, each given those before. `draft_KV`: the
    head's law of each of the latter, `target_KV` the target's own given the same tokens. `vocabulary`: the V tokens as
    text.
    """

    prompt: str
    path_W: np.ndarray
    draft_KV: np.ndarray
    target_KV: np.ndarray
    vocabulary: Vocabulary

    @property
    def overlap_K(self) -> np.ndarray:
        """How far the two agree, sum_v min(q, p): the chance that the verifier `token` accepts a draft of that law."""
        return np.minimum(self.draft_KV, self.target_KV).sum(-1)


def ahead(run: LoadedRun, prompt: str) -> Ahead:
    """What the head of any kind drafts behind `prompt`.

    Raises `ConfigError` if there is no head, or the prompt is empty or leaves no room for the drafts.
    """
    window = run.config.head.window
    require(window > 1, "The run has no head that drafts; take one with head.window of 2 or more.")
    tokens_1T = text_tokens(run, prompt, window - 1)
    with jax.set_mesh(run.mesh):
        path_W, draft_KV = (np.asarray(found) for found in _drafts(run.model, tokens_1T))
        whole_1T = np.concatenate([tokens_1T, path_W[None, :-1]], axis=1)
        target_TV = np.asarray(_target(run.model, whole_1T))
    draft_KV, target_KV = (np.exp(law.astype(np.float64)) for law in (draft_KV, target_TV[tokens_1T.shape[1] :]))
    return Ahead(prompt, path_W, draft_KV, target_KV, Vocabulary(run.tokenizer))


def plot_ahead(ahead: Ahead, top: int = 4) -> Figure:
    """The `top` most likely tokens of each offset, of the head and of the target, and how far the two agree."""
    rows: list[Row] = [
        ("drafts of\nthe head", PALETTE[2], ahead.draft_KV),
        ("the model\nitself", "0.35", ahead.target_KV),
    ]
    titles = []
    for s, overlap in enumerate(ahead.overlap_K):
        given = "".join(ahead.vocabulary[int(token)] for token in ahead.path_W[: s + 1])
        titles.append(f"draft {s + 1}\ngiven {given}\noverlap {overlap:.0%}")
    return plot_laws(ahead.prompt, rows, titles, ahead.vocabulary, top)[0]


@jax.jit
def _drafts(model: LanguageModel, tokens_1T: Array) -> tuple[Array, Array]:
    """The target's most likely token and the head's behind it, `[W]`, and the log laws of the latter, `[K, V]`."""
    seen, _, next_1T = read(model, tokens_1T)
    last_1 = 0 * seen.tokens_BT[:, 0] + tokens_1T.shape[1] - 1  # placed as rows are
    head, window = model.head, model.head.config.window
    cache, memo = head.extend(head.init_cache(*tokens_1T.shape), seen, next_1T, 0 * last_1, None)
    draft = head.begin(seen.at(last_1), next_1T[:, -1], window=window, cache=cache, position_B=last_1, memo=memo)
    path, laws = [next_1T[:, -1]], []
    for _ in range(window - 1):
        laws.append(head.next_log_probs(draft))
        path.append(jnp.argmax(laws[-1], axis=-1).astype(jnp.int32))
        draft = head.condition(draft, path[-1])
    return jnp.stack(path)[:, 0], jnp.stack(laws)[:, 0]


@jax.jit
def _target(model: LanguageModel, tokens_1T: Array) -> Array:
    logp_TV = model.target(model.see(tokens_1T))[0][0]
    return jax.nn.log_softmax(logp_TV / model.head.config.temperature, axis=-1)
