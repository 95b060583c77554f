"""Tokenizer `hf:PATH`: a `tokenizer.json` of Hugging Face, or a directory that holds one."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_jax.data.tokenizers.base import FileTokenizer, utf8
from mtp_jax.validate import ConfigError, require

# The first of these that a tokenizer has ends its documents. Ends of turns come last: a base model may have both.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<eos>", "[EOS]")
ENDS += ("<|eot_id|>", "<|im_end|>")


class HFTokenizer(FileTokenizer):
    """A tokenizer of the `tokenizers` library. It encodes all of a text and adds nothing.

    Truncation, padding, dropout and the special tokens of a template are switched off, whatever the file says. The
    bytes of ids are exact for byte-level tokenizers: parts of a character come as they are.
    """

    kind, file = "hf", "tokenizer.json"

    def __init__(self, data: bytes, end_of_document: str = "", name: str = ""):
        """As `FileTokenizer`. Raises `ConfigError` too if text can say what ends a document."""
        super().__init__(data, end_of_document, name)
        # Some files have it as an ordinary word, which would be found in text.
        self._tok.add_special_tokens([self._end])
        self.vocab_size = 1 + max(self._tok.get_vocab(with_added_tokens=True).values())
        require(
            self.end_of_document not in self.encode(self._end),
            f"DataConfig.end_of_document is {self._end!r} and the tokenizer {self.name!r} reads it in text too, so a "
            "document that contains it would end there. Choose another special token, or give the SentencePiece model "
            "that the file was made from, if there is one: 'sentencepiece:PATH'.",
        )

    def _open(self, data: bytes) -> tuple[str, dict[str, int]]:
        import tokenizers

        try:
            self._tok = tok = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing more special
            raise ConfigError(
                f"DataConfig.tokenizer is {self.name!r}, which is not a {self.file} of Hugging Face: {error}. A "
                "SentencePiece model is named 'sentencepiece:PATH'."
            ) from error
        _settled(tok)
        tok.encode_special_tokens = True
        added = {token.content: id for id, token in tok.get_added_tokens_decoder().items()}
        return next((end for end in ENDS if end in added), ""), added

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of every text, on all cores ($RAYON_NUM_THREADS of them)."""
        encodings = self._tok.encode_batch_fast([utf8(text)[0] for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_special(self, text: str) -> np.ndarray:
        """The ids of `text`, in which special tokens stand for themselves."""
        (encoding,) = self._reading_special.encode_batch_fast([text], add_special_tokens=False)  # finds no offsets
        return np.array(encoding.ids, np.int32)

    @functools.cached_property
    def _reading_special(self) -> Any:
        """The same tokenizer, but for special tokens in text."""
        import tokenizers

        found = tokenizers.Tokenizer.from_buffer(self._data)
        return _settled(found)

    @property
    def special(self) -> dict[str, int]:
        """The ids of the special tokens by their text."""
        return {token.content: id for id, token in self._tok.get_added_tokens_decoder().items() if token.special}

    def begins(self) -> list[int]:
        """What the file itself puts in front of a text."""
        return self._reading_special.encode("", add_special_tokens=True).ids

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of a whole document."""
        if self._byte_level:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self._tok.decode(self._meaningful(ids))

    @functools.cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self._data).get("decoder") or {}
        return [part.get("type") for part in decoder.get("decoders", [decoder])] == ["ByteLevel"]

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """What each id stands for."""
        added = self._tok.get_added_tokens_decoder()
        tokens = {id: token for token, id in self._tok.get_vocab().items() if id not in added}
        found = _byte_level_pieces(tokens) if self._byte_level else self._pieces_in_the_middle(tokens)
        # An added token is text as it is, whatever the decoder.
        found |= {id: b"" if token.special else token.content.encode() for id, token in added.items()}
        return [found.get(id, b"") for id in range(self.vocab_size)]

    def _pieces_in_the_middle(self, tokens: dict[int, str]) -> dict[int, bytes]:
        """What the library decodes for each id between two others: decoders trim at the ends of a text."""
        letter = next((id for id, token in tokens.items() if len(token) == 1 and token.isalpha()), min(tokens))
        alone, twice = self._tok.decode([letter]), self._tok.decode([letter, letter])
        texts = self._tok.decode_batch([[letter, id, letter] for id in tokens])
        found = {}
        for (id, token), text in zip(tokens.items(), texts, strict=True):
            middle = text.removeprefix(alone).removesuffix(twice.removeprefix(alone))
            # Byte fallback: one byte of a character is no text yet.
            byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            found[id] = bytes.fromhex(token[3:5]) if byte else middle.encode()
        return found


def _settled(tok: Any) -> Any:
    """`tok` without truncation, padding and dropout: the ids of a text are always all and the same."""
    tok.no_truncation()
    tok.no_padding()
    if getattr(tok.model, "dropout", None):
        tok.model.dropout = None
    return tok


def _byte_level_pieces(tokens: dict[int, str]) -> dict[int, bytes]:
    alphabet = byte_alphabet()
    return {
        # A token with other letters is not made of bytes: it was put in as text.
        id: bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
        for id, token in tokens.items()
    }


def byte_alphabet() -> dict[str, int]:
    """The byte that each letter stands for in the tokens of a byte-level BPE (GPT-2's `bytes_to_unicode`, inverted).

    Visible Latin-1 characters stand for themselves, and the other bytes, in order, for the letters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
