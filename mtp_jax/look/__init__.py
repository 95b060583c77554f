"""Views into a trained model: what its gate, its components and its drafts say about a text, as arrays and as figures.

For notebooks, such as `experiments/notebooks/reload_checkpoint.ipynb`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtp_jax.decode.spans import Completion
from mtp_jax.look.ahead import Ahead, ahead, plot_ahead
from mtp_jax.look.gate import Gate, entropy, gate, plot_gate
from mtp_jax.look.text import Vocabulary
from mtp_jax.look.window import Window, plot_window, window

if TYPE_CHECKING:
    from mtp_jax.data.tokenizers.conventions import Messages
    from mtp_jax.runs.loading import LoadedRun

__all__ = [
    "Ahead",
    "Gate",
    "Vocabulary",
    "Window",
    "ahead",
    "complete",
    "entropy",
    "gate",
    "plot_ahead",
    "plot_gate",
    "plot_window",
    "window",
]


def complete(run: LoadedRun, prompt: str | Messages, *, stop: str | Sequence[str] = (), **options: Any) -> Completion:
    """Continue a text or answer a conversation, and keep which tokens were drafts; a notebook shows them green.

    Arguments as in `LoadedRun.stream`.
    """
    spans = run.stream(prompt, stop=stop, **options)
    return Completion(tuple(spans), spans.summary)
