"""Prompts: the beginnings of held-out documents, or of files."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from mtp_jax.data.mixture import Mixture
from mtp_jax.data.sources.files import Files
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.validate import require

MANY = 4096  # conversations that are looked at for those that fit


def held_out_prompts(store: Store | Mixture, count: int, length: int, seed: int = 0) -> list[tuple[str, Any]]:
    """`count` held-out documents chosen by `seed`: (name, first `length` tokens). None ends with its prompt.

    Raises `ConfigError` if there are not that many of that length.
    """
    documents = store.valid
    lengths = documents.lengths
    order = np.random.default_rng(seed).permutation(len(documents))
    long = [int(i) for i in order if lengths[i] > length]
    require(
        len(long) >= count,
        f"{count} prompts were asked for and {len(long)} held-out documents have more than {length} tokens; "
        "ask for fewer or shorter ones, or hold out more (data.valid_fraction).",
    )
    return [(documents.names[i], documents[i][:length]) for i in long[:count]]


def some_prompts(store: Store | Mixture, count: int, length: int) -> list[np.ndarray]:
    """What `count` held-out documents begin with, or what there is of that: conversations up to their first answer, if
    that takes at most `length` tokens; of text the first `length` tokens, or fewer, so that each has one more."""
    documents, lengths = store.valid, np.sort(store.valid.lengths)[::-1]
    if store.masked:
        begins = ((i, int(np.argmax(documents.mask_of(i)))) for i in range(len(documents)))
        fitting = [(i, begin) for i, begin in itertools.islice(begins, MANY) if 0 < begin <= length]
        count = min(count, len(fitting))
        return [documents[i][:begin] for i, begin in (fitting[n * len(fitting) // count] for n in range(count))]
    count = min(count, int(np.sum(lengths > 1)))
    if not count:
        return []
    return [ids for _, ids in held_out_prompts(store, count, min(length, int(lengths[count - 1]) - 1))]


def file_prompts(files: str, tokenizer: Tokenizer, count: int, length: int, seed: int = 0) -> list[tuple[str, Any]]:
    """`count` of the files that a glob matches, chosen by `seed`: (name, first `length` tokens).

    Raises `ConfigError` if no file matches, or not that many have that length.
    """
    source = Files.matching(files)
    order = np.random.default_rng(seed).permutation(len(source.names))
    texts = ((source.names[i], tokenizer.encode_prompt(source.content(source.names[i]))) for i in order)
    long = [(name, tokens[:length]) for name, tokens in texts if len(tokens) >= length]
    require(
        len(long) >= count,
        f"{count} prompts were asked for and {len(long)} files of {files!r} have {length} tokens or more; "
        "ask for fewer or shorter ones, or give more files.",
    )
    return long[:count]
