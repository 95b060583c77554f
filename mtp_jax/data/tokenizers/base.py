"""Tokenizer protocol, and what the tokenizers of files have in common."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtp_jax.validate import ConfigError, require


class Tokenizer(Protocol):
    """What the framework asks of a tokenizer. Ids lie in [0, vocab_size); `end_of_document` is one of them.

    Text never becomes `end_of_document`, whatever it says: a document that contains the string `<|endoftext|>` has the
    ids of those characters.
    """

    @property
    def name(self) -> str:
        """The name that `load_tokenizer` knows it by."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special ones included."""
        ...

    @property
    def end_of_document(self) -> int:
        """The id that ends every document of a prepared data set."""
        ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of `text`, int32, without `end_of_document`. Bytes that are not UTF-8: see `replaced`."""
        ...

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


def read_model(kind: str, argument: str, file: str) -> bytes:
    """The file that `kind:argument` names: itself, or `file` in the directory `argument`, local or in an object store.

    Raises `ConfigError` if there is none.
    """
    from etils import epath  # here, since bytes need no file

    require(
        bool(argument),
        f"DataConfig.tokenizer is {kind!r}; give the path of its file too, such as '{kind}:models/{file}'.",
    )
    path = epath.Path(argument).expanduser()
    path = path / file if path.is_dir() else path
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"DataConfig.tokenizer is '{kind}:{argument}' and {path} cannot be read ({type(error).__name__}). Give the "
            f"path of a {file}, or of the directory that holds it."
        ) from error


def choose_end(name: str, asked: str, own: str | None, special: Collection[str]) -> str:
    """The token that ends documents: the one that is `asked` for, or else the tokenizer's `own`.

    Raises `ConfigError` if there is neither, or if what is asked for is not among the `special` tokens.
    """
    listed = ", ".join(map(repr, sorted(special)[:20])) or "none"
    if asked:
        near = difflib.get_close_matches(asked, special, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        require(
            asked in special,
            f"DataConfig.end_of_document is {asked!r} and the tokenizer {name!r} has no such special token; {hint}"
            f"It has {listed}.",
        )
        return asked
    if own is None:
        raise ConfigError(
            f"DataConfig.end_of_document is empty and nothing says which token of {name!r} ends a document. "
            f"Set it to one of its special tokens: {listed}."
        )
    return own


def meaningful(pieces: Sequence[bytes], ids: npt.ArrayLike) -> list[int]:
    """Those of `ids` that stand for something: id i stands for `pieces[i]`, and ids outside for nothing."""
    return [i for i in np.asarray(ids, np.int64).ravel().tolist() if 0 <= i < len(pieces) and pieces[i]]


def join(pieces: Sequence[bytes], ids: npt.ArrayLike) -> bytes:
    """What `ids` stand for together."""
    return b"".join(pieces[i] for i in meaningful(pieces, ids))
