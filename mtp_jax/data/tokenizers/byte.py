"""Tokenizer `bytes`: every byte is a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_jax.data.tokenizers.base import Tokenizer, to_utf8
from mtp_jax.validate import require


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes themselves; 256 ends a document. Any bytes survive the way there and back."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """The bytes of `text` (UTF-8 if it is a `str`) as int32 ids."""
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def replaced(self, text: bytes) -> int:
        """0: any bytes are kept."""
        return 0

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

    def files(self) -> dict[str, bytes]:
        """None: there is nothing to keep."""
        return {}

    @classmethod
    def load(cls, argument: str, end_of_document: str) -> ByteTokenizer:
        """The tokenizer `bytes`. Raises `ConfigError` if it is given anything."""
        require(not argument, f"DataConfig.tokenizer is 'bytes:{argument}'; bytes takes no argument. Write 'bytes'.")
        require(
            not end_of_document,
            f"DataConfig.end_of_document is {end_of_document!r} and the tokenizer is 'bytes', which ends documents "
            "with its id 256. Leave end_of_document empty.",
        )
        return cls()
