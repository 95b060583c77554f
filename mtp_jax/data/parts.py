"""Parts of a token store: what one process writes, and how they are laid end to end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from mtp_jax.data.encoding import Encoded
from mtp_jax.data.sources.base import DataError
from mtp_jax.data.store import SPLITS

MASK = np.dtype(np.uint8)


class PartWriter(contextlib.ExitStack):
    """Writes the documents of a part into `directory`, ids as `dtype`; a mask of each beside them if `masked`."""

    def __init__(self, directory: Path, dtype: np.dtype, masked: bool):
        super().__init__()
        self._directory, self._dtype = directory, dtype
        self._endings = ["tokens.bin", "names.jsonl", *["mask.bin"] * masked]
        self._lengths: dict[str, list[int]] = {split: [] for split in SPLITS}

    def __enter__(self) -> Self:
        super().__enter__()
        self._files: dict[str, list[BinaryIO]] = {
            split: [self.enter_context((self._directory / f"{split}.{name}").open("wb")) for name in self._endings]
            for split in SPLITS
        }
        return self

    def write(self, document: Encoded) -> None:
        """Write one document behind the others of its split."""
        tokens, names, *mask = self._files[document.split]
        tokens.write(document.ids.astype(self._dtype).data)
        names.write(json.dumps(document.name).encode() + b"\n")
        for file in mask:
            assert document.mask is not None
            file.write(document.mask.astype(MASK).data)
        self._lengths[document.split].append(len(document.ids))

    def finish(self) -> None:
        """Write the lengths, behind the last document."""
        for split, lengths in self._lengths.items():
            np.save(self._directory / f"{split}.lengths.npy", np.array(lengths, np.int64))


def join(parts: Sequence[Path], split: str, store: Path, dtype: np.dtype, masked: bool) -> dict[str, Any]:
    """Lay the parts of a split end to end in `store` and return its entry of the manifest.

    Raises `DataError` on a part that does not have the bytes that it should, which is deleted.
    """
    lengths = [np.load(part / f"{split}.lengths.npy") for part in parts]
    offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
    np.save(store / f"{split}.offsets.npy", offsets)
    with (store / f"{split}.names.jsonl").open("wb") as names:
        for part in parts:
            names.write((part / f"{split}.names.jsonl").read_bytes())
    digest, supervised = hashlib.sha256(), 0
    for kind, width in (("tokens", dtype.itemsize), *[("mask", MASK.itemsize)] * masked):
        with (store / f"{split}.{kind}.bin").open("w+b") as out:
            for part, expected in zip(parts, lengths, strict=True):
                _append(part, f"{split}.{kind}.bin", out, int(expected.sum()) * width)
            out.seek(0)
            while block := out.read(2**20):
                digest.update(block)
                supervised += int(np.frombuffer(block, MASK).sum()) if kind == "mask" else 0
    entry = {"documents": len(offsets) - 1, "tokens": int(offsets[-1]), "sha256": digest.hexdigest()}
    return entry | ({"supervised": supervised} if masked else {})


def _append(part: Path, name: str, out: BinaryIO, expected: int) -> None:
    before = out.tell()
    with (part / name).open("rb") as file:
        shutil.copyfileobj(file, out)
    size = out.tell() - before
    if size != expected:
        shutil.rmtree(part)
        what, split = ("mask" if "mask" in name else "tokens"), name.partition(".")[0]
        raise DataError(
            f"{part} has {size} bytes of {split} {what} and should have {expected}; it was damaged and is deleted. Run "
            "it again to have it made anew."
        )
