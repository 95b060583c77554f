"""Tokenizer `sentencepiece:PATH`: a SentencePiece `.model` file, or a directory that holds a `tokenizer.model`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_jax.data.tokenizers.base import FileTokenizer, utf8
from mtp_jax.validate import ConfigError


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model. The bytes of ids have a space for every U+2581, the first one too."""

    kind, file = "sentencepiece", "tokenizer.model"

    def _open(self, data: bytes) -> tuple[str, dict[str, int]]:
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(
                f"DataConfig.tokenizer is {self.name!r} and the package sentencepiece is not installed; "
                "`pip install 'mtp_jax[sentencepiece]'`."
            ) from error
        try:
            processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = processor.vocab_size()
        except RuntimeError as error:
            raise ConfigError(
                f"DataConfig.tokenizer is {self.name!r}, which is not a model of SentencePiece. A tokenizer.json is "
                "named 'hf:PATH'."
            ) from error
        self._processor = processor
        # Control symbols are never found in text; user-defined ones are.
        control = {processor.id_to_piece(id): id for id in range(self.vocab_size) if processor.is_control(id)}
        return processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else "", control

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of every text, on all cores."""
        return [np.array(ids, np.int32) for ids in self._processor.encode([utf8(text)[0] for text in texts])]

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of a whole document."""
        return self._processor.decode(self._meaningful(ids))

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
