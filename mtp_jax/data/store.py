"""Token store: every document of a source, tokenised once, in memory-mapped files. `prepare` makes it.

A store is a directory. For each split it holds the tokens end to end (`train.tokens.bin`, little-endian), the `int64`
offsets where documents begin (`train.offsets.npy`), and their names (`train.names.jsonl`); conversations have a loss
mask too, a byte for each token (`train.mask.bin`), 1 where it is supervised. `manifest.json` says what it is and what
it was made from, and `tokenizer/` holds the files of its tokenizer, if it has any.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mtp_jax.data.tokenizers import Tokenizer, kept_tokenizer
from mtp_jax.validate import ConfigError, require

SPLITS = ("train", "valid")
MANIFEST, TOKENIZER_DIR = "manifest.json", "tokenizer"


class Names(Sequence[str]):
    """The names of a split's documents, read when one is asked for: there may be millions."""

    def __init__(self, path: Path, count: int):
        self._path, self._count = path, count

    @functools.cached_property
    def _names(self) -> list[str]:
        # JSON has no line breaks but those between the names.
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._names[index]


@dataclass(frozen=True)
class Documents:
    """The documents of one split. Item i is an int32 array of ids, which ends with the end-of-document token where the
    store has no loss mask.

    `tokens` is the memory map of all documents end to end, uint16 or uint32; document i is
    `tokens[offsets[i] : offsets[i + 1]]` and is called `names[i]`. `mask`, uint8, has 1 for each token that is
    supervised; without one all are. `hidden` `[rows, T, D]`: a base's hidden states, by row, and `normaliser`
    `[rows, T]` in float32 that of its law there. `split` is its name in messages.
    """

    split: str
    tokens: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]
    mask: np.ndarray | None = None
    hidden: np.ndarray | None = None
    normaliser: np.ndarray | None = None

    def require_some(self) -> None:
        """Raise `ConfigError` if there are none."""
        require(
            len(self) > 0,
            f"The {self.split} split has no documents. The split is by the hash of a document's content: "
            "change DataConfig.valid_fraction, or give the source more (and smaller) documents.",
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end included."""
        return np.diff(self.offsets)

    def frequencies(self, vocab_size: int) -> np.ndarray:
        """The share `[V]` that each token has, among those that are supervised."""
        # In parts: counting makes a wide copy of what may be terabytes on disk.
        counts_V = np.zeros(vocab_size, int)
        for i in range(0, len(self.tokens), 2**24):
            part = self.tokens[i : i + 2**24]
            part = part if self.mask is None else part[self.mask[i : i + 2**24] == 1]
            counts_V += np.bincount(part, minlength=vocab_size)
        return counts_V / max(1, counts_V.sum())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int32)

    def mask_of(self, index: int) -> np.ndarray:
        """Which tokens of a document are supervised: 1 or 0 for each."""
        index = range(len(self))[index]
        begin, end = self.offsets[index], self.offsets[index + 1]
        return np.ones(end - begin, np.uint8) if self.mask is None else self.mask[begin:end]


@dataclass(frozen=True)
class Store:
    """An opened store: its directory, its manifest, and the two splits, which share no document.

    `manifest["splits"][split]` gives the counts `documents` and `tokens` and the `sha256` of the tokens; of a masked
    store also the count `supervised`, and the `sha256` is that of the tokens and the mask behind them.
    """

    path: Path
    manifest: dict[str, Any]
    train: Documents
    valid: Documents

    @property
    def sha256(self) -> str:
        """The hash of the training tokens, and of their mask: where it is the same, the batches are."""
        return self.manifest["splits"]["train"]["sha256"]

    @property
    def masked(self) -> bool:
        """Whether it has a loss mask."""
        return bool(self.manifest.get("mask"))

    @property
    def sampled(self) -> dict[str, Any] | None:
        """The law that its texts were sampled from, if a model wrote them: temperature, top_k, top_p."""
        found = self.manifest.get("sampled")
        return found and {name: found[name] for name in ("temperature", "top_k", "top_p")}

    @property
    def hidden(self) -> dict[str, Any] | None:
        """What its hidden states are, if it has some: seq_len, width, dtype, taps, the base with its sha256, and as
        `temperature` the `law_temperature`."""
        return self.manifest.get("hidden")

    @property
    def law_temperature(self) -> float | None:
        """That of the base's law whose normaliser is beside the hidden states; None where there is none."""
        return (self.hidden or {}).get("temperature")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was made with: its own copy."""
        made = self.manifest["tokenizer"]
        return kept_tokenizer(self.path / TOKENIZER_DIR, made["name"], made.get("end_of_document", ""))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open the store in `path`; no token is read. Raises `ConfigError` if a file is missing or damaged."""
        path = Path(os.path.expanduser(path))
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            train, valid = (_open_split(path, manifest, split) for split in SPLITS)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"The token store {path} is damaged, or is none ({type(error).__name__}: {error}). If it is one, "
                "delete it, to have it made again; if it is none, name another directory."
            ) from error
        return cls(path, manifest, train, valid)


def share(counts: Mapping[str, int]) -> str:
    """Which part of a masked split's tokens is supervised, as per cent."""
    return f"{counts['supervised'] / max(1, counts['tokens']):.1%}"


def _open_split(path: Path, manifest: dict[str, Any], split: str) -> Documents:
    counts, dtype = manifest["splits"][split], np.dtype(manifest["dtype"])
    tokens = _mapped(path / f"{split}.tokens.bin", dtype, counts["tokens"])
    mask = _mapped(path / f"{split}.mask.bin", np.dtype(np.uint8), counts["tokens"]) if manifest.get("mask") else None
    offsets = np.load(path / f"{split}.offsets.npy", mmap_mode="r")
    if len(offsets) != counts["documents"] + 1 or offsets[-1] != counts["tokens"]:
        raise ValueError(f"{split}.offsets.npy does not fit {split}.tokens.bin")
    names, hidden, normaliser = Names(path / f"{split}.names.jsonl", counts["documents"]), None, None
    if states := manifest.get("hidden"):
        file, kind = path / f"{split}.hidden.bin", ml_dtypes.finfo(states["dtype"]).dtype
        row = states["seq_len"] * states["width"]
        hidden = _mapped(file, kind, file.stat().st_size // (row * kind.itemsize) * row)
        hidden = hidden.reshape(-1, states["seq_len"], states["width"])
        if states.get("temperature") is not None:
            shape = hidden.shape[:2]
            normaliser = _mapped(path / f"{split}.normaliser.bin", np.dtype(np.float32), math.prod(shape))
            normaliser = normaliser.reshape(shape)
    return Documents(split, tokens, offsets, names, mask, hidden, normaliser)


def _mapped(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size, expected = file.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{file.name} has {size} bytes and should have {expected}")
    # An empty file cannot be mapped.
    return np.memmap(file, dtype, "r") if size else np.empty(0, dtype)
