"""Tokenizers: text to token ids and back.

A tokenizer is named `kind` or `kind:argument`; the kind is an entry of `TOKENIZERS` and the argument is the entry's own
affair (a path, say). To add a kind, write a class that follows `Tokenizer` and give it one line in `TOKENIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtp_jax.config import require
from mtp_jax.registry import lookup


class Tokenizer(Protocol):
    """What the framework asks of a tokenizer. Ids lie in [0, vocab_size); `end_of_document` is one of them."""

    @property
    def name(self) -> str:
        """The name that `load_tokenizer` knows it by."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        ...

    @property
    def end_of_document(self) -> int:
        """The id that ends every document of a prepared data set."""
        ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of `text`, int32, without `end_of_document`."""
        ...

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The bytes that `ids` stand for. Special ids, and ids that the tokenizer does not have, stand for none."""
        ...

    def decode(self, ids: npt.ArrayLike) -> str:
        """`decode_bytes` as UTF-8, with U+FFFD in place of what is not."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All that decides how text is encoded, as JSON values: equal if and only if the encodings are equal."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes themselves; 256 ends a document. Any bytes survive the way there and back."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """The bytes of `text` (UTF-8 if it is a `str`) as int32 ids."""
        # Command-line arguments hold bytes that are not UTF-8 as surrogate escapes; these go back to what they were.
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The bytes among `ids`, in order; ids outside [0, 255] are skipped."""
        values = np.asarray(ids, np.int64)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes()

    def decode(self, ids: npt.ArrayLike) -> str:
        """`decode_bytes` as UTF-8, with U+FFFD in place of what is not (half a character at the end, say)."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        """`{"name": "bytes"}`: there is nothing else to know."""
        return {"name": self.name}


def _bytes(argument: str) -> Tokenizer:
    require(not argument, f"DataConfig.tokenizer is 'bytes:{argument}'; bytes takes no argument. Write 'bytes'.")
    return ByteTokenizer()


TOKENIZERS: dict[str, Callable[[str], Tokenizer]] = {
    "bytes": _bytes,
}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name` (`DataConfig.tokenizer`): `kind` or `kind:argument`, as in "bytes".

    Raises `ConfigError` on an unknown kind, with the nearest one that exists.
    """
    kind, _, argument = name.partition(":")
    return lookup(TOKENIZERS, kind, "DataConfig.tokenizer")(argument)
