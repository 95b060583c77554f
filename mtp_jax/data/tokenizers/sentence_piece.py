"""Tokenizer `sentencepiece:PATH`: a SentencePiece `.model` file, or a directory that holds a `tokenizer.model`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_jax.data.tokenizers.base import choose_end, join, meaningful, read_model, to_utf8, utf8
from mtp_jax.validate import ConfigError

FILE = "tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece model. Text that is not UTF-8 is encoded with U+FFFD in its place."""

    def __init__(self, data: bytes, end_of_document: str = "", name: str = "sentencepiece"):
        """From the bytes of a model file.

        Raises:
          ConfigError: the package is not installed, or it is no such file, or it does not say what ends a document, or
            has not what `end_of_document` names.
        """
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(
                f"DataConfig.tokenizer is {name!r} and the package sentencepiece is not installed; "
                "`pip install 'mtp_jax[sentencepiece]'`."
            ) from error
        try:
            processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size: int = processor.vocab_size()
        except RuntimeError as error:
            raise ConfigError(
                f"DataConfig.tokenizer is {name!r}, which is not a model of SentencePiece. A tokenizer.json is named "
                "'hf:PATH'."
            ) from error
        # Control symbols are never found in text; user-defined ones are.
        control = {processor.id_to_piece(id): id for id in range(self.vocab_size) if processor.is_control(id)}
        own = processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else None
        self._end = choose_end(name, end_of_document, own, control)
        self.end_of_document = control[self._end]
        self._processor, self._data, self.name = processor, data, name

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of `text`, int32."""
        return np.array(self._processor.encode(utf8(to_utf8(text))[0]), np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of every text, on all cores."""
        return [np.array(ids, np.int32) for ids in self._processor.encode([utf8(text)[0] for text in texts])]

    def replaced(self, text: bytes) -> int:
        """How many U+FFFD stand in `text` for what is not UTF-8."""
        return utf8(text)[1]

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The bytes of `ids`: a space for every U+2581, the first one too, and bytes of characters as they are."""
        return join(self._pieces, ids)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of a whole document."""
        return self._processor.decode(meaningful(self._pieces, ids))

    def to_json(self) -> dict[str, Any]:
        """The hash of the file and the token that ends a document; not where the file is."""
        return {"name": "sentencepiece", "sha256": hashlib.sha256(self._data).hexdigest(), "end_of_document": self._end}

    def files(self) -> dict[str, bytes]:
        """The model file as it was read."""
        return {FILE: self._data}

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """What each id stands for."""

        def piece(id: int) -> bytes:
            text = self._processor.id_to_piece(id)
            if self._processor.is_byte(id):  # <0x0A>
                return bytes.fromhex(text[3:5])
            special = self._processor.is_control(id) or self._processor.is_unknown(id)
            return b"" if special else text.replace("\u2581", " ").encode()

        return [piece(id) for id in range(self.vocab_size)]


def load(argument: str, end_of_document: str) -> SentencePieceTokenizer:
    """The tokenizer in the file or directory `argument`."""
    return SentencePieceTokenizer(
        read_model("sentencepiece", argument, FILE), end_of_document, f"sentencepiece:{argument}"
    )
