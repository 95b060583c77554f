"""Generation of tokens: prompts in, their continuations out, at once or as a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax.decode.config import DecodeConfig, prompt_ids
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.decoding import Decoding, Generation, Prompt
from mtp_jax.decode.tune import tuned
from mtp_jax.language_model import LanguageModel

MOMENT = 0.05
"""Seconds of decoding that a stream gives at once: nobody sees them pass."""


def generate(model: LanguageModel, prompts: Sequence[Prompt], **options: Any) -> Generation:
    """Continue every prompt. The output law is the target's, whatever `k` is.

    Args:
      model: a model, best one that `for_decoding` has laid out (it is laid out on the fly if not).
      prompts: token ids of each row; they may differ in length.
      options: the fields of `DecodeConfig`; max_new_tokens, temperature, top_k, top_p, seed and k may each be one
        value, or one per row. k may also be "auto". `row` is the number of the first row, if one seed is for all.

    Raises:
      ConfigError: a bad value; the message names it and what is allowed.
    """
    decoding = begin(model, prompts, DecodeConfig.of(options))
    decoding.advance()
    return decoding.result()


def begin(model: LanguageModel, prompts: Sequence[Prompt], config: DecodeConfig) -> Decoding:
    """A `Decoding` of the prompts that has not begun. Arguments and errors as in `generate`."""
    decoder, prompts = for_decoding(model), prompt_ids(prompts)
    return Decoding(decoder, prompts, tuned(decoder, prompts, config))


def stream(model: LanguageModel, prompt: Prompt, config: DecodeConfig) -> Iterator[tuple[np.ndarray, int]]:
    """Continue one prompt and yield, for each forward, (the new tokens, how many of them were accepted drafts).

    The last token of a forward is the target's own unless the row ended before it. Forwards that take less than
    `MOMENT` together are decoded in one go: to enter the loop takes as long as a forward of a small model. Errors as in
    `generate`.
    """
    decoding = begin(model, [prompt], config)
    seen, forwards = 0, 1
    while True:
        for tokens, accepted in decoding.parts(seen):
            seen += len(tokens)
            yield tokens, accepted
        if decoding.done:
            return
        begun = time.perf_counter()
        decoding.advance(forwards)
        decoding.wait()
        seconds = time.perf_counter() - begun
        forwards = 2 * forwards if 2 * seconds < MOMENT else max(1, forwards // 2) if seconds > MOMENT else forwards
