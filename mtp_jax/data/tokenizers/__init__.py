"""Tokenizers: text to token ids and back.

A tokenizer is named `kind` or `kind:argument`; the kind is an entry of `TOKENIZERS` and the argument is the entry's own
affair (a path, say). To add a kind, write a class that follows `Tokenizer`, in a file of its own, and give it one line
in `TOKENIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtp_jax.data.tokenizers.base import Tokenizer, utf8
from mtp_jax.data.tokenizers.byte import ByteTokenizer
from mtp_jax.data.tokenizers.hf import HFTokenizer
from mtp_jax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from mtp_jax.registry import lookup

__all__ = [
    "TOKENIZERS",
    "ByteTokenizer",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "kept_tokenizer",
    "load_tokenizer",
    "utf8",
]

# kind: (argument, end_of_document) to the tokenizer. The libraries are imported when a tokenizer is made.
TOKENIZERS: dict[str, Callable[[str, str], Tokenizer]] = {
    "bytes": ByteTokenizer.load,
    "hf": HFTokenizer.load,
    "sentencepiece": SentencePieceTokenizer.load,
}


def load_tokenizer(name: str, end_of_document: str = "") -> Tokenizer:
    """The tokenizer called `name` (`DataConfig.tokenizer`): `kind` or `kind:argument`, as in "bytes" or "hf:PATH".

    `end_of_document` (`DataConfig.end_of_document`) is the special token that ends documents; empty: its own.

    Raises `ConfigError` on an unknown kind, with the nearest one that exists, a file that is missing or no tokenizer,
    and an end of documents that it does not have.
    """
    kind, _, argument = name.partition(":")
    return lookup(TOKENIZERS, kind, "DataConfig.tokenizer")(argument, end_of_document)


def kept_tokenizer(directory: Any, name: str, end_of_document: str = "") -> Tokenizer:
    """The tokenizer `name` from the copy of its `files` in `directory`, or from where it came if there is no copy."""
    kind = name.partition(":")[0]
    return load_tokenizer(f"{kind}:{directory}" if directory.exists() else name, end_of_document)
