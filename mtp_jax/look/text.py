"""Tokens as text that a figure can show, and what views of a text begin with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.decode.text import check_text
from mtp_jax.heads.base import Seen
from mtp_jax.heads.encoded import EncodedHead
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.language_model import LanguageModel
from mtp_jax.validate import require

if TYPE_CHECKING:
    from mtp_jax.runs.loading import LoadedRun


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
        return "".join(map(drawn, text)) or f"<{token}>"


def drawn(character: str) -> str:
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


def text_tokens(run: LoadedRun, text: str, room: int = 0) -> np.ndarray:
    """The ids of a text, `[1, T]`, behind which there is room for so many."""
    check_text("text", text)
    tokens_T, most = run.encode(text), run.config.model.context_length - room
    require(
        1 <= len(tokens_T) <= most,
        f"The text has {len(tokens_T)} tokens; the model reads 1..{most} (context_length). Give another one.",
    )
    return np.asarray(tokens_T, np.int32)[None]


def check_mixture(run: LoadedRun) -> None:
    """Refuse a head that has no components to look at."""
    head = run.model.head
    require(
        isinstance(head, (MixtureHead, EncodedHead)),
        f"The run's head is of kind {head.config.kind}; what is shown here are the components of a mixture.",
    )


def read(model: LanguageModel, tokens_1T: Array) -> tuple[Seen, Array, Array]:
    """What the model sees of a text, the target's law behind it, `[1, V]`, and the token behind each: the text's, and
    behind the last one the target's most likely."""
    seen, last_1 = model.see(tokens_1T), jnp.full((1,), tokens_1T.shape[1] - 1, jnp.int32)
    law_1V = model.target(seen.at(last_1))[0][:, 0]
    chosen_1 = jnp.argmax(law_1V, axis=-1).astype(jnp.int32)
    return seen, law_1V, jnp.concatenate([seen.tokens_BT[:, 1:], chosen_1[:, None]], axis=1)
