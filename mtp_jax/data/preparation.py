"""Preparation of a token store: every document of a source is tokenised once, part by part.

Parts are tokenised by any number of processes, each into a directory of its own that is renamed when complete. What an
interruption leaves is continued, and in the end the parts are laid end to end in the order of the source: a store does
not depend on who made it. It is made aside (`.NAME.partial`) and renamed when complete.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from mtp_jax.data.config import DataConfig, SourceConfig
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.sources import DataError, Part, Source, is_held_out, load_source
from mtp_jax.data.store import MANIFEST, SPLITS, TOKENIZER_DIR, Store
from mtp_jax.data.tokenizers import Tokenizer, load_tokenizer
from mtp_jax.validate import ConfigError, require

FORMAT = 3
BATCH_BYTES = 2**20  # of documents that are tokenised at once

Progress = Callable[[int, int, int], None]
"""Called after each part with the parts that are done, all parts, and the bytes of documents read so far."""

logger = logging.getLogger(__name__)


def prepare(
    config: DataConfig,
    log: Callable[[str], None] = logger.info,
    tokenizer: Tokenizer | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: Progress = lambda done, total, size: None,
) -> Store | Mixture:
    """Open the token store that `config` describes, made first if there is none; only then `log` gets one line.

    Any number of processes may call this at once: one makes the store and the others wait. Empty documents are left
    out.

    Args:
      config: names the source, the tokenizer and the split. Source `store` is a store that was made before, and
        `mixture` several.
      log: for what was made.
      tokenizer: that of `config`, for those who have it: a run keeps a copy of its own, whose original may be gone.
      out: the directory of the store. By default it lies in the cache, named by a hash of all that its contents depend
        on, so that a changed source, tokenizer or split gets another directory and never old tokens.
      processes: how many tokenise.
      progress: called after each part.

    Raises:
      ConfigError: an unknown source or tokenizer, a split without documents, a directory that cannot be written or that
        holds another store.
      DataError: the source changes or fails while it is read, or the disk is full. What was finished is kept, and the
        next call goes on from there.
    """
    tokenizer = tokenizer or load_tokenizer(config.tokenizer, config.end_of_document)
    made = {"format": FORMAT, "tokenizer": tokenizer.to_json(), "valid_fraction": config.valid_fraction}
    if config.source == "store":
        store = Store.open(Path(config.files).expanduser())
        _check_same(store, made)
    elif config.source == "mixture":
        store = Mixture.open(config.files)
        for part in store.stores:
            _check_same(part, made)
    else:
        source = load_source(config)
        identity = {"source": config.source, "fingerprint": source.fingerprint(), **made}
        cache = cache_dir(config)
        path = Path(out).expanduser().absolute() if out else cache / "tokens" / _name(config, identity)
        task = _Task(path, identity, source, tokenizer, cache / "tfds", config.valid_fraction)
        if not task.there():
            task.make(log, processes, progress)
        require(
            out is None or (path / MANIFEST).exists(),
            f"{path} holds something that is no token store. Name another directory.",
        )
        store = Store.open(path)
        _check_same(store, identity)
    for documents in (store.train, store.valid):
        documents.require_some()
    return store


def cache_dir(config: SourceConfig) -> Path:
    """Where the prepared data sets of `config` are kept."""
    return Path(config.cache_dir or os.environ.get("MTP_JAX_CACHE") or "~/.cache/mtp_jax").expanduser().absolute()


def _name(config: DataConfig, identity: dict[str, Any]) -> str:
    def slug(name: str) -> str:
        return re.sub(r"\W+", "_", name)[-40:]

    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{slug(config.source)}-{slug(config.tokenizer)}-{digest}"


def _check_same(store: Store, identity: dict[str, Any]) -> None:
    """Refuse a store that was made with something else, by the name of what differs."""
    for name, value in identity.items():
        made = store.manifest.get(name)
        field = "files, or the documents themselves" if name == "fingerprint" else name
        change = "Prepare it again" if name == "format" else f"Change DataConfig.{field}"
        require(
            made == value,
            f"The token store {store.path} was made with {name} {json.dumps(made)}, and asked for is "
            f"{json.dumps(value)}. {change}, or name another directory.",
        )


@dataclass(frozen=True)
class _Task:
    """What a store is made of and where."""

    path: Path
    identity: dict[str, Any]
    source: Source
    tokenizer: Tokenizer
    data_dir: Path
    valid_fraction: float

    @property
    def scratch(self) -> Path:
        return self.path.parent / f".{self.path.name}.partial"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<u4")

    def make(self, log: Callable[[str], None], processes: int, progress: Progress) -> None:
        """Make the store, unless another process does, or finds it made."""
        try:
            with self._lock():
                if not self.there():
                    self._make(log, processes, progress)
                shutil.rmtree(self.scratch, ignore_errors=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"The disk is full ({error}). What is tokenised so far is kept in {self.scratch}: make room, and run "
                "it again to go on."
            ) from error

    def there(self) -> bool:
        """Whether something lies where the store belongs."""
        return self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))

    def _lock(self) -> Any:
        while True:
            try:
                self.scratch.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"The directory {self.path.parent} cannot be written ({error}). Set --data.cache-dir or "
                    "$MTP_JAX_CACHE, or name another directory."
                ) from error
            try:
                return filelock.FileLock(self.scratch / "lock").acquire()
            except FileNotFoundError:  # who held it has finished, and taken the directory away
                continue

    def _make(self, log: Callable[[str], None], processes: int, progress: Progress) -> None:
        begin = time.monotonic()
        parts = self.source.parts(self.data_dir)
        self._keep_if_same({**self.identity, "parts": [list(part) for part in parts]})
        size = 0
        for done, counts in enumerate(self._tokenise(parts, processes), 1):
            size += counts["bytes"]
            progress(done, len(parts), size)
        if self.source.fingerprint() != self.identity["fingerprint"]:
            shutil.rmtree(self.scratch)
            raise DataError(
                f"The documents of source {self.identity['source']} changed while being read. Run it again."
            )
        store = self.scratch / "store"
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()
        splits = {split: self._join(split, len(parts), store) for split in SPLITS}
        counts = [self._counts(i) for i in range(len(parts))]
        empty, replaced = (sum(count[name] for count in counts) for name in ("empty", "replaced"))
        for name, data in self.tokenizer.files().items():
            (store / TOKENIZER_DIR).mkdir(exist_ok=True)
            (store / TOKENIZER_DIR / name).write_bytes(data)
        manifest = {
            **self.identity,
            "dtype": self.dtype.str,
            "splits": splits,
            "empty_documents": empty,
            "replaced_characters": replaced,
            "versions": {"numpy": np.__version__},
        }
        (store / MANIFEST).write_text(json.dumps(manifest, indent=2))
        store.rename(self.path)
        log(
            f"Prepared {self.identity['source']} in {time.monotonic() - begin:.1f} s: "
            + " and ".join(
                f"{splits[s]['tokens']:,} tokens of {splits[s]['documents']:,} {s} documents" for s in SPLITS
            )
            + (f"; {empty:,} empty documents left out" if empty else "")
            + (f"; {replaced:,} U+FFFD in place of what is not UTF-8" if replaced else "")
            + f", in {self.path}"
        )

    def _keep_if_same(self, identity: dict[str, Any]) -> None:
        """Throw away what is there of another store: parts of what the source was before, say."""
        file, text = self.scratch / "identity.json", json.dumps(identity, sort_keys=True)
        if not file.exists() or file.read_text() != text:
            shutil.rmtree(self.scratch / "parts", ignore_errors=True)
            (self.scratch / "parts").mkdir()
            file.write_text(text)

    def _tokenise(self, parts: list[Part], processes: int) -> Iterator[dict[str, int]]:
        """Tokenise every part that is not there yet; yields the counts of each as it is done."""
        todo = []
        for index in range(len(parts)):
            if self._part(index).exists():
                yield self._counts(index)
            else:
                todo.append(index)
        if min(processes, len(todo)) <= 1:
            for index in todo:
                yield self.tokenise(index, parts[index])
            return
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX in it may hang
        with concurrent.futures.ProcessPoolExecutor(min(processes, len(todo)), context, _start_worker) as pool:
            futures = [pool.submit(self.tokenise, index, parts[index]) for index in todo]
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield future.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise DataError(
                    "A process that tokenised has died, for lack of memory perhaps. Run it again."
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def tokenise(self, index: int, part: Part) -> dict[str, int]:
        """Tokenise one part into its directory and return its counts."""
        scratch = self._part(index).with_suffix(".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        counts: dict[str, int] = {"bytes": 0, "empty": 0, "replaced": 0}
        writers = {split: _Writer(scratch, split, self.dtype) for split in SPLITS}
        try:
            for batch in batched(self.source.read(part, self.data_dir)):
                full = [(name, text) for name, text in batch if text]
                counts["bytes"] += sum(len(text) for _, text in full)
                counts["empty"] += len(batch) - len(full)
                counts["replaced"] += sum(self.tokenizer.replaced(text) for _, text in full)
                encoded = self.tokenizer.encode_batch([text for _, text in full])
                for (name, text), tokens in zip(full, encoded, strict=True):
                    split = "valid" if is_held_out(text, self.valid_fraction) else "train"
                    writers[split].add(name, np.append(tokens, self.tokenizer.end_of_document))
        finally:
            for writer in writers.values():
                writer.close()
        for split, writer in writers.items():
            counts[f"{split}_tokens"] = sum(writer.lengths)
        (scratch / "counts.json").write_text(json.dumps(counts))
        scratch.rename(self._part(index))
        return counts

    def _join(self, split: str, parts: int, store: Path) -> dict[str, Any]:
        """Lay the parts of a split end to end and return its entry of the manifest."""
        digest, lengths = hashlib.sha256(), [np.zeros(1, np.int64)]
        with (store / f"{split}.tokens.bin").open("wb") as out, (store / f"{split}.names.jsonl").open("wb") as names:
            for index in range(parts):
                directory = self._part(index)
                expected, size = self._counts(index)[f"{split}_tokens"] * self.dtype.itemsize, 0
                with (directory / f"{split}.tokens.bin").open("rb") as file:
                    while block := file.read(2**22):
                        out.write(block)
                        digest.update(block)
                        size += len(block)
                if size != expected:
                    shutil.rmtree(directory)
                    raise DataError(
                        f"{directory} has {size} bytes of {split} tokens and should have {expected}; it was damaged "
                        "and is deleted. Run it again to have it made anew."
                    )
                lengths.append(np.load(directory / f"{split}.lengths.npy"))
                names.write((directory / f"{split}.names.jsonl").read_bytes())
        offsets = np.cumsum(np.concatenate(lengths))
        np.save(store / f"{split}.offsets.npy", offsets)
        return {"documents": len(offsets) - 1, "tokens": int(offsets[-1]), "sha256": digest.hexdigest()}

    def _part(self, index: int) -> Path:
        return self.scratch / "parts" / f"{index:06}"

    def _counts(self, index: int) -> dict[str, int]:
        return json.loads((self._part(index) / "counts.json").read_text())


def _start_worker() -> None:
    """A process that tokenises: it leaves Ctrl-C to its parent, and is one of as many as there are to be threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"


class _Writer:
    """The files of one split of a part."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype):
        self._path, self._dtype = directory / f"{split}.lengths.npy", dtype
        self._tokens = (directory / f"{split}.tokens.bin").open("wb")
        self._names = (directory / f"{split}.names.jsonl").open("w")
        self.lengths: list[int] = []

    def add(self, name: str, tokens: np.ndarray) -> None:
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self._names.write(json.dumps(name) + "\n")
        self.lengths.append(len(tokens))

    def close(self) -> None:
        self._tokens.close()
        self._names.close()
        np.save(self._path, np.array(self.lengths, np.int64))


def batched(documents: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Documents in lists of about `BATCH_BYTES`."""
    batch, size = [], 0
    for name, text in documents:
        batch.append((name, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
