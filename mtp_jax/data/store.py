"""The token store: every document of a source, tokenised once, in memory-mapped files.

A store is a directory of the cache, named by a hash of all that its contents depend on, so a changed source, tokenizer
or split gets another directory and never old tokens. For each split it holds the tokens end to end (`train.tokens.bin`,
little-endian), the `int64` offsets where documents begin (`train.offsets.npy`), and their names (`train.names.json`);
`manifest.json` says what it is. It is written aside and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.config import ConfigError, DataConfig, require
from mtp_jax.data.sources import Source, documents, is_held_out, load_source
from mtp_jax.data.tokenizers import Tokenizer, load_tokenizer

FORMAT = 1
SPLITS = ("train", "valid")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """The documents of one split. Item i is an int32 array of ids that ends with the end-of-document token.

    `tokens` is the memory map of all documents end to end, uint16 or uint32; document i is
    `tokens[offsets[i] : offsets[i + 1]]` and is called `names[i]`. `split` is its name in messages.
    """

    split: str
    tokens: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]

    def require_some(self) -> None:
        """Raise `ConfigError` if there are none."""
        require(
            len(self) > 0,
            f"The {self.split} split has no documents. The split is by the hash of a document's name: "
            "change DataConfig.valid_fraction, or give the source more (and smaller) documents.",
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int32)


@dataclass(frozen=True)
class Store:
    """An opened store: its directory, its manifest, and the two splits, which share no document.

    `manifest["splits"][split]` gives the counts `documents` and `tokens` and the `sha256` of the tokens.
    """

    path: Path
    manifest: dict[str, Any]
    train: Documents
    valid: Documents

    @property
    def sha256(self) -> str:
        """The hash of the training tokens: where it is the same, the batches are."""
        return self.manifest["splits"]["train"]["sha256"]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open the store in `path`; no token is read. Raises `ConfigError` if a file is missing or damaged."""
        path = Path(path)
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            train, valid = (_open_split(path, manifest, split) for split in SPLITS)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The token store {path} is damaged: {error}. Delete it, to have it made again."
            ) from error
        return cls(path, manifest, train, valid)


def prepare(config: DataConfig, log: Callable[[str], None] = logger.info, tokenizer: Tokenizer | None = None) -> Store:
    """Open the token store that `config` describes, made first if the cache has none; only then `log` gets one line.

    `tokenizer` is that of `config`, for those who have it: a run keeps a copy of its own, whose original may be gone.
    Any number of processes may call this at once. Empty documents are left out. Raises `ConfigError` on an unknown
    source or tokenizer, a split without documents, or a cache that cannot be written, and `RuntimeError` if the
    source changes while it is read or cannot be (`DataError`).
    """
    source = load_source(config)
    tokenizer = tokenizer or load_tokenizer(config.tokenizer, config.end_of_document)
    identity = {
        "format": FORMAT,
        "source": config.source,
        "fingerprint": source.fingerprint(),
        "tokenizer": tokenizer.to_json(),
        "valid_fraction": config.valid_fraction,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    cache = cache_dir(config)
    path = cache / "tokens" / f"{_slug(config.source)}-{_slug(config.tokenizer)}-{digest}"
    if not path.exists():
        _make(path, identity, source, tokenizer, cache / "tfds", log)
    store = Store.open(path)
    for split in (store.train, store.valid):
        split.require_some()
    return store


def cache_dir(config: DataConfig) -> Path:
    """Where the prepared data sets of `config` are kept."""
    return Path(config.cache_dir or os.environ.get("MTP_JAX_CACHE") or "~/.cache/mtp_jax").expanduser().absolute()


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)[-40:]


def _make(
    path: Path,
    identity: dict[str, Any],
    source: Source,
    tokenizer: Tokenizer,
    data_dir: Path,
    log: Callable[[str], None],
) -> None:
    begin = time.monotonic()
    scratch = path.parent / f".{path.name}-{uuid.uuid4().hex}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"The cache directory {path.parent} cannot be written ({error}). Set --data.cache_dir or $MTP_JAX_CACHE."
        ) from error
    try:
        splits = _write(scratch, source, tokenizer, data_dir, identity["valid_fraction"])
        if source.fingerprint() != identity["fingerprint"]:
            raise RuntimeError(f"The documents of source {identity['source']} changed while being read. Run it again.")
        manifest = {**identity, "dtype": _dtype(tokenizer).str, "splits": splits, "versions": {"numpy": np.__version__}}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        try:
            scratch.rename(path)
        except OSError:
            # A directory with files in it is never replaced: another process has finished the same store first.
            if not path.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    counts = " and ".join(f"{splits[s]['tokens']:,} tokens of {splits[s]['documents']:,} {s} documents" for s in SPLITS)
    log(f"Prepared {identity['source']} in {time.monotonic() - begin:.1f} s: {counts}, in {path}")


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _write(
    directory: Path, source: Source, tokenizer: Tokenizer, data_dir: Path, valid_fraction: float
) -> dict[str, dict[str, Any]]:
    """Write the files of every split and return their counts, as in the manifest."""
    dtype = _dtype(tokenizer)
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    offsets = {split: [0] for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    files = {split: (directory / f"{split}.tokens.bin").open("wb") for split in SPLITS}
    try:
        for name, text in documents(source, data_dir):
            if not text:
                continue
            split = "valid" if is_held_out(name, valid_fraction) else "train"
            tokens = np.append(tokenizer.encode(text), tokenizer.end_of_document)
            data = tokens.astype(dtype).tobytes()
            files[split].write(data)
            hashes[split].update(data)
            names[split].append(name)
            offsets[split].append(offsets[split][-1] + len(tokens))
    finally:
        for file in files.values():
            file.close()
    for split in SPLITS:
        np.save(directory / f"{split}.offsets.npy", np.array(offsets[split], np.int64))
        (directory / f"{split}.names.json").write_text(json.dumps(names[split]))
    return {
        split: {"documents": len(names[split]), "tokens": offsets[split][-1], "sha256": hashes[split].hexdigest()}
        for split in SPLITS
    }


def _open_split(path: Path, manifest: dict[str, Any], split: str) -> Documents:
    counts, dtype = manifest["splits"][split], np.dtype(manifest["dtype"])
    file = path / f"{split}.tokens.bin"
    size, expected = file.stat().st_size, counts["tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(f"{file.name} has {size} bytes and should have {expected}")
    # An empty file cannot be mapped.
    tokens = np.memmap(file, dtype, "r") if size else np.empty(0, dtype)
    offsets = np.load(path / f"{split}.offsets.npy")
    return Documents(split, tokens, offsets, json.loads((path / f"{split}.names.json").read_text()))
