"""Text completion. Stop strings are looked for on the host, between short runs of the loop."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import ENDLESS
from mtp_jax.decode.generate import begin
from mtp_jax.language_model import LanguageModel
from mtp_jax.validate import ConfigError, require

FORWARDS = 16  # between two looks at the text


def stop_bytes(stop: str | Sequence[str] | None) -> list[bytes]:
    """Stop strings, one, several or none, as bytes. Raises `ConfigError` on an empty one, and on what is no text."""
    strings = [] if stop is None else [stop] if isinstance(stop, str | bytes) else list(stop)
    for string in strings:
        check_text("stop", string)
    require("" not in strings, f"stop is {stop!r}; an empty string stops everything. Leave it out.")
    return [string.encode("utf-8", "surrogateescape") for string in strings]


def check_text(name: str, text: object) -> None:
    """Raise `ConfigError` on what is no text that UTF-8 can write; a byte of a command line that is none stays."""
    require(isinstance(text, str), f"{name} is {text!r}; it must be a string.")
    try:
        str(text).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is {text!r}, which has half a surrogate pair: it is no text.") from None


def prompt_texts(prompts: Any) -> list[str]:
    """Several prompts as a list of strings. Raises `ConfigError` on anything else."""
    several = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping)
    require(
        several,
        f"The prompt is {reprlib.repr(prompts)}; it must be a string, or prompts a list of strings.",
    )
    found: list[str] = list(prompts)
    for i, prompt in enumerate(found):
        check_text(f"Prompt {i}", prompt)
    return found


def find_stop(text: bytes, stops: Sequence[bytes]) -> int | None:
    """Where the stop string begins that is complete first (the longest, if several are at once); None if none is.

    So the answer does not change when more text follows.
    """
    found = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def held_back(text: bytes, stops: Sequence[bytes]) -> int:
    """How many bytes at the end of `text` may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def continue_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: DecodeConfig,
    stop: str | Sequence[str] | None = (),
) -> list[str]:
    """Continue every text, up to and without the first of its stop strings.

    A row with a stop string ends at most `FORWARDS` forwards behind it; what it decodes there is thrown away.

    Args:
      model: as in `generate`, its mesh in scope.
      tokenizer: its tokenizer.
      texts: the prompts.
      config: how they are continued.
      stop: stop strings, one or several. They are found in bytes, wherever tokens begin and end.

    Raises:
      ConfigError: a bad value; the message names it and what is allowed.
    """
    stops, texts = stop_bytes(stop), prompt_texts(texts)
    decoding = begin(model, [tokenizer.encode_prompt(text) for text in texts], config)
    while True:
        rows = [tokenizer.decode_bytes(row) for row in decoding.result().tokens]
        ends = [find_stop(row, stops) for row in rows]
        decoding.end(np.array([end is not None for end in ends]))
        if decoding.done:
            return [row[:end].decode("utf-8", "replace") for row, end in zip(rows, ends, strict=True)]
        decoding.advance(FORWARDS if stops else ENDLESS)
