"""Tokenizer protocol, and what the tokenizers of files have in common."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from mtp_jax.data.tokenizers.conventions import FILE as CONVENTIONS
from mtp_jax.data.tokenizers.conventions import Conventions
from mtp_jax.validate import ConfigError, require


class Tokenizer(Protocol):
    """What the framework asks of a tokenizer.

    `name` is the one that `load_tokenizer` knows it by. Ids lie in [0, vocab_size), special ones included, and
    `end_of_document`, which ends every document of a prepared data set, is one of them. Text never becomes it, whatever
    it says: a document that contains the string `<|endoftext|>` has the ids of those characters. `conventions` are
    those of a pretrained model.
    """

    name: str
    vocab_size: int
    end_of_document: int
    conventions: Conventions = Conventions()

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of `text`, int32, without `end_of_document`. Of bytes that are not UTF-8 `replaced` tells."""
        ...

    def encode_special(self, text: str) -> np.ndarray:
        """The ids of `text`, in which special tokens stand for themselves: what a chat template renders, say."""
        raise ConfigError(f"The tokenizer {self.name!r} has no special tokens in text.")

    def encode_prompt(self, text: str | bytes, *, special: bool = False) -> np.ndarray:
        """The ids of a prompt, behind the one that begins every text of a pretrained model, if one does.

        `special`: special tokens in it stand for themselves; without it text never becomes one.
        """
        ids = self.encode_special(text) if special and isinstance(text, str) else self.encode(text)
        bos = self.conventions.bos
        return ids if bos is None or ids[:1].tolist() == [bos] else np.concatenate([np.array([bos], np.int32), ids])

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer: those of a pretrained model, or the end of a document."""
        return self.conventions.stops or (self.end_of_document,)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of every text, in order. Many at once is what makes preparing data fast."""
        ...

    def replaced(self, text: bytes) -> int:
        """How many U+FFFD stand in the encoding of `text` for bytes that are not UTF-8; 0 if any bytes are kept."""
        ...

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The bytes that `ids` stand for in the middle of a text: those of parts, joined, are those of the whole.

        Special ids, and ids that the tokenizer does not have, stand for none.
        """
        ...

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of a whole document, with U+FFFD in place of what is not UTF-8.

        That is `decode_bytes`, without the space that some tokenizers put before the first word.
        """
        ...

    def to_json(self) -> dict[str, Any]:
        """All that decides how text is encoded, as JSON values: equal if and only if the encodings are equal."""
        ...

    def files(self) -> dict[str, bytes]:
        """The files, by name, from which `load_tokenizer("kind:DIRECTORY")` makes the same tokenizer anywhere."""
        ...


class FileTokenizer(Tokenizer):
    """What the tokenizers of one file have in common. Text that is not UTF-8 is encoded with U+FFFD in its place.

    `kind` is their name in `TOKENIZERS`, `file` that of their file in a directory. `_open` reads the file and gives the
    token that ends documents, if the file says so, and all special tokens with their ids; id i stands for `_pieces[i]`.
    """

    kind: str
    file: str
    _pieces: Sequence[bytes]

    def __init__(self, data: bytes, end_of_document: str = "", name: str = ""):
        """From the bytes of the file. The token `end_of_document` ends documents; empty: the tokenizer's own.

        Raises `ConfigError` if it is no such file, does not say what ends a document, or has not what is asked for.
        """
        self._data, self.name = data, name or self.kind
        own, special = self._open(data)
        listed = ", ".join(map(repr, sorted(special)[:20])) or "none"
        near = difflib.get_close_matches(end_of_document, special, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        require(
            not end_of_document or end_of_document in special,
            f"DataConfig.end_of_document is {end_of_document!r} and the tokenizer {self.name!r} has no such special "
            f"token; {hint}It has {listed}.",
        )
        self._end = end_of_document or own
        require(
            bool(self._end),
            f"DataConfig.end_of_document is empty and nothing says which token of {self.name!r} ends a document. "
            f"Set it to one of its special tokens: {listed}.",
        )
        self.end_of_document = special[self._end]

    def _open(self, data: bytes) -> tuple[str, dict[str, int]]:
        raise NotImplementedError

    @classmethod
    def load(cls, argument: str, end_of_document: str) -> Self:
        """The tokenizer of the file `argument`, or of `file` in that directory, local or in an object store.

        Raises `ConfigError` if there is none.
        """
        from etils import epath  # here, since bytes need no file

        require(
            bool(argument),
            f"DataConfig.tokenizer is {cls.kind!r}; give the path of its file too, such as "
            f"'{cls.kind}:models/{cls.file}'.",
        )
        name, path = f"{cls.kind}:{argument}", epath.Path(argument).expanduser()
        kept = path / CONVENTIONS if path.is_dir() else None
        path = path / cls.file if path.is_dir() else path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"DataConfig.tokenizer is {name!r} and {path} cannot be read ({type(error).__name__}). Give the path "
                f"of a {cls.file}, or of the directory that holds it."
            ) from error
        found = cls(data, end_of_document, name)
        if kept is not None and kept.exists():
            found.conventions = Conventions.from_bytes(kept.read_bytes())
        return found

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of `text`, int32."""
        return self.encode_batch([to_utf8(text)])[0]

    def replaced(self, text: bytes) -> int:
        """How many U+FFFD stand in `text` for what is not UTF-8."""
        return utf8(text)[1]

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The bytes of `ids`."""
        return b"".join(self._pieces[i] for i in self._meaningful(ids))

    def to_json(self) -> dict[str, Any]:
        """The hash of the file and the token that ends a document; not where the file is."""
        found = {"name": self.kind, "sha256": hashlib.sha256(self._data).hexdigest(), "end_of_document": self._end}
        own = self.conventions != Conventions()
        return found | ({"conventions": hashlib.sha256(self.conventions.to_bytes()).hexdigest()} if own else {})

    def files(self) -> dict[str, bytes]:
        """The file as it was read, and a pretrained model's conventions."""
        own = self.conventions != Conventions()
        return {self.file: self._data, **({CONVENTIONS: self.conventions.to_bytes()} if own else {})}

    def _meaningful(self, ids: npt.ArrayLike) -> list[int]:
        """Those of `ids` that stand for something."""
        found = np.asarray(ids, np.int64).ravel().tolist()
        return [i for i in found if 0 <= i < len(self._pieces) and self._pieces[i]]


def to_utf8(text: str | bytes) -> bytes:
    """`text` as bytes. Command-line arguments hold bytes that are not UTF-8 as surrogate escapes; these come back."""
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def utf8(data: bytes) -> tuple[str, int]:
    """`data` as text, and how many U+FFFD it has in place of what is not UTF-8 (those in `data` do not count)."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())
