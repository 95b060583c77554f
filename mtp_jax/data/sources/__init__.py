"""Sources of documents, by name.

To add a source, write a class that follows `Source`, in a file of its own, and give it one line in `SOURCES`.

Python code and data sets of TFDS are read through TFDS builders: `LocalDocuments` makes one of any source. Text, JSON
lines and Parquet are read where they lie, in ranges; a TFDS copy of them would only take their space again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources.base import PART_BYTES, DataError, Part, Source, documents
from mtp_jax.data.sources.jsonl import JsonLines
from mtp_jax.data.sources.parquet import Parquet
from mtp_jax.data.sources.python import Packages, Stdlib
from mtp_jax.data.sources.text import Text
from mtp_jax.data.sources.tfds import TfdsDataset
from mtp_jax.registry import lookup

__all__ = ["PART_BYTES", "SOURCES", "DataError", "Part", "Source", "documents", "is_held_out", "load_source"]

SOURCES: dict[str, Callable[[SourceConfig], Source]] = {
    "jsonl": JsonLines,
    "packages": Packages,
    "parquet": Parquet,
    "stdlib": Stdlib,
    "text": Text,
    "tfds": TfdsDataset,
}


def load_source(config: SourceConfig) -> Source:
    """The source that `config` names. Raises `ConfigError` on an unknown name or a source that has no documents."""
    return lookup(SOURCES, config.source, "DataConfig.source")(config)


def is_held_out(document: bytes, valid_fraction: float) -> bool:
    """Whether a document is held out: the hash of its content, as a number in [0, 1), lies below `valid_fraction`.

    It depends on nothing else, so copies of a document lie on one side, one stays there when others come and go, and a
    larger fraction holds out all that a smaller one does.
    """
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") < valid_fraction * 2**64
