"""Preparation of a token store: every document of a source is tokenised once, part by part.

Parts are tokenised by any number of processes, each into a directory of its own that is renamed when complete. What an
interruption leaves is continued, and in the end the parts are laid end to end in the order of the source: a store does
not depend on who made it. It is made aside (`.NAME.partial`) and renamed when complete.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
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

from mtp_jax.data.chat import FIELDS, ChatEncoding, Conversations
from mtp_jax.data.config import DataConfig, SourceConfig
from mtp_jax.data.encoding import Encoding, PlainText, unreadable
from mtp_jax.data.held_out import is_one_sided, require_both
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.parts import PartWriter, join
from mtp_jax.data.sources import DataError, Part, Source, load_records, load_source
from mtp_jax.data.sources.base import Unreadable
from mtp_jax.data.store import MANIFEST, SPLITS, TOKENIZER_DIR, Store
from mtp_jax.data.tokenizers import Tokenizer, load_tokenizer
from mtp_jax.processes import end_with_parent
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
    reading: bool = False,
    chat: bool = False,
) -> Store | Mixture:
    """Open the token store that `config` describes, made first if there is none; only then `log` gets one line, and one
    more for each warning.

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
      reading: whether `config` is that of a run which is read: its cache may be somebody else's, or of another machine.
        Then one's own is taken for what is not there.
      chat: whether the documents are conversations (`mtp_jax.data.chat`), written by the tokenizer's own template.

    Raises:
      ConfigError: an unknown source or tokenizer, a split without documents, a directory that cannot be written or that
        holds another store.
      DataError: the source changes or fails while it is read, or the disk is full. What was finished is kept, and the
        next call goes on from there.
    """
    tokenizer = tokenizer or load_tokenizer(config.tokenizer, config.end_of_document)
    made = {"format": FORMAT, "tokenizer": tokenizer.to_json(), "valid_fraction": config.valid_fraction}
    if config.source in ("store", "mixture"):
        store = Store.open(config.files) if config.source == "store" else Mixture.open(config.files)
        for part in store.stores if isinstance(store, Mixture) else (store,):
            _check_same(part, made)
    else:
        encoding = ChatEncoding(tokenizer) if chat else PlainText(tokenizer)
        source = Conversations(load_records(config, FIELDS)) if chat else load_source(config)
        identity = {"source": config.source, "fingerprint": source.fingerprint(), **made, **encoding.identity}
        own = dataclasses.replace(config, cache_dir=None) if reading else config
        caches, name = (cache_dir(config), cache_dir(own)), Path("tokens", _name(config, identity))
        cache = next((cache for cache in caches if (cache / name).exists() or _is_writable(cache)), caches[0])
        path = Path(os.path.expanduser(out)).absolute() if out else cache / name
        task = _Task(path, identity, source, encoding, cache / "tfds", config.max_bad)
        if not task.there():
            task.make(log, processes, progress)
        store = Store.open(path)
        _check_same(store, {"chat": None, **identity})
    for documents in (store.train, store.valid):
        documents.require_some()
    return store


def cache_dir(config: SourceConfig) -> Path:
    """Where the prepared data sets of `config` are kept."""
    return Path(config.cache_dir or os.environ.get("MTP_JAX_CACHE") or "~/.cache/mtp_jax").expanduser().absolute()


def _is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.W_OK)


def _name(config: DataConfig, identity: dict[str, Any]) -> str:
    source, tokenizer = (re.sub(r"\W+", "_", name)[-40:] for name in (config.source, config.tokenizer))
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{source}-{tokenizer}-{digest}"


def _check_same(store: Store, identity: dict[str, Any]) -> None:
    """Refuse a store that was made with something else, by the name of what differs."""
    for name, value in identity.items():
        made = store.manifest.get(name)
        field = "files, or the documents themselves" if name == "fingerprint" else name
        change = {
            "format": "Prepare it again",
            "chat": "Give --chat and the same base for conversations, and neither for plain text",
        }.get(name, f"Change DataConfig.{field}")
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
    encoding: Encoding
    data_dir: Path
    max_bad: float = 0.001
    inside: bool = False  # the split falls inside of the documents

    @property
    def scratch(self) -> Path:
        return self.path.parent / f".{self.path.name}.partial"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.encoding.tokenizer.vocab_size <= 2**16 else "<u4")

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
        inside = self._begun(parts)
        counts, first = collections.Counter(), ""
        for done, found in enumerate(dataclasses.replace(self, inside=inside)._tokenise(parts, processes), 1):
            why = found.pop("first_unreadable", "")
            first = first or why
            counts.update(found)
            progress(done, len(parts), counts["bytes"])
        if self.source.fingerprint() != self.identity["fingerprint"]:
            shutil.rmtree(self.scratch)
            raise DataError(
                f"The documents of source {self.identity['source']} changed while being read. Run it again."
            )
        store = self.scratch / "store"
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()
        splits = {split: self._join(split, len(parts), store) for split in SPLITS}
        for name, data in self.encoding.tokenizer.files().items():
            (store / TOKENIZER_DIR).mkdir(exist_ok=True)
            (store / TOKENIZER_DIR / name).write_bytes(data)
        empty, replaced, bad, whole = (counts[name] for name in ("empty", "replaced", "unreadable", "documents"))
        if bad > max(1, self.max_bad * whole) or bad == whole > 0:
            raise DataError(
                f"{bad:,} of {whole:,} documents are unreadable ({first}), and DataConfig.max_bad is {self.max_bad:g}. "
                "Mend them, or set --max-bad to the share that may be left out."
            )
        manifest = {**self.identity, "dtype": self.dtype.str, "splits": splits}
        manifest |= {"empty_documents": empty, "replaced_characters": replaced, "unreadable_documents": bad}
        own, warnings = self.encoding.told(counts, splits)
        manifest |= {name: counts[name] for name in self.encoding.counted}
        (store / MANIFEST).write_text(json.dumps(manifest, indent=2))
        store.rename(self.path)
        said = [" and ".join(f"{n['tokens']:,} tokens of {n['documents']:,} {s} documents" for s, n in splits.items())]
        said += own
        if inside and all(entry["documents"] for entry in splits.values()):
            share = f"the last {self.identity['valid_fraction']:.3g} of its bytes"
            said += [f"held out is the end of each document ({share}), for the documents are too few to hold out some"]
        said += [f"{empty:,} empty documents left out"] * bool(empty)
        said += [f"{bad:,} unreadable ones too ({first})"] * bool(bad)
        said += [f"{replaced:,} U+FFFD in place of what is not UTF-8"] * bool(replaced)
        seconds = f"{time.monotonic() - begin:.1f} s"
        log(f"Prepared {self.identity['source']} in {seconds}: {'; '.join(said)}, in {self.path}")
        for warning in warnings:
            log(f"Warning: {warning}")

    def _begun(self, parts: list[Part]) -> bool:
        """Whether the split falls inside of the documents. Of what was begun only parts of the same source stay."""
        file, made_of = self.scratch / "identity.json", json.dumps({**self.identity, "parts": parts}, sort_keys=True)
        known = {f"{made_of}\n{json.dumps(inside)}": inside for inside in (False, True)}
        begun = known.get(file.read_text()) if file.exists() else None
        if begun is not None:
            return begun
        shutil.rmtree(self.scratch / "parts", ignore_errors=True)
        (self.scratch / "parts").mkdir()
        texts = (text for part in parts for _, text in self.source.read(part, self.data_dir))
        if self.encoding.divisible:
            inside = is_one_sided(texts, self.identity["valid_fraction"])
        else:
            require_both(texts, self.identity["valid_fraction"])
            inside = False
        file.write_text(f"{made_of}\n{json.dumps(inside)}")
        return inside

    def _tokenise(self, parts: list[Part], processes: int) -> Iterator[dict[str, Any]]:
        """Tokenise every part that is not there yet; yields the counts of each as it is done."""
        todo = [index for index in range(len(parts)) if not self._part(index).exists()]
        for index in set(range(len(parts))).difference(todo):
            yield json.loads((self._part(index) / "counts.json").read_text())
        work = todo, [parts[index] for index in todo]
        if min(processes, len(todo)) <= 1:
            yield from map(self.tokenise, *work)
            return
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX in it may hang
        with concurrent.futures.ProcessPoolExecutor(min(processes, len(todo)), context, _start_worker) as pool:
            try:
                yield from pool.map(self.tokenise, *work)
            except concurrent.futures.process.BrokenProcessPool as error:
                raise DataError(
                    "A process that tokenised has died, for lack of memory perhaps. Run it again."
                ) from error

    def tokenise(self, index: int, part: Part) -> dict[str, Any]:
        """Tokenise one part into its directory and return its counts."""
        scratch = self._part(index).with_suffix(f".{os.getpid()}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        counts, fraction = collections.Counter({"bytes": 0}), self.identity["valid_fraction"]
        with PartWriter(scratch, self.dtype, self.encoding.masked) as writer:
            for batch in batched(self.source.read(part, self.data_dir)):
                full = [(name, text) for name, text in batch if text]
                bad = [text.why for _, text in batch if isinstance(text, Unreadable)]
                for why in bad:
                    unreadable(counts, why)
                counts["bytes"] += sum(len(text) for _, text in full)
                counts["empty"] += len(batch) - len(full) - len(bad)
                counts["documents"] += len(batch)
                for document in self.encoding.encode(full, fraction, self.inside, counts):
                    writer.write(document)
            writer.finish()
        (scratch / "counts.json").write_text(json.dumps(counts))
        scratch.rename(self._part(index))
        return counts

    def _join(self, split: str, parts: int, store: Path) -> dict[str, Any]:
        """Lay the parts of a split end to end and return its entry of the manifest."""
        return join([self._part(i) for i in range(parts)], split, store, self.dtype, self.encoding.masked)

    def _part(self, index: int) -> Path:
        return self.scratch / "parts" / f"{index:06}"


def _start_worker() -> None:
    """A process that tokenises: it ends with its parent, leaves Ctrl-C to it, and is one of as many as there are to be
    threads.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"


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
