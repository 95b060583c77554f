"""Sources of documents, by name.

To add a source, write a class that follows `Source`, in a file of its own, and give it one line in `SOURCES`.

Python code and data sets of TFDS are read through TFDS builders: `LocalDocuments` makes one of any source. Text, JSON
lines and Parquet are read where they lie, in ranges; a TFDS copy of them would only take their space again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources.base import PART_BYTES, DataError, Part, Source, documents
from mtp_jax.data.sources.jsonl import JsonLines
from mtp_jax.data.sources.parquet import Parquet
from mtp_jax.data.sources.python import Packages, Stdlib
from mtp_jax.data.sources.text import Text
from mtp_jax.data.sources.tfds import TfdsDataset
from mtp_jax.registry import lookup
from mtp_jax.validate import ConfigError, require

__all__ = ["PART_BYTES", "SOURCES", "DataError", "Part", "Source", "documents", "load_records", "load_source"]

SOURCES: dict[str, Callable[[SourceConfig], Source]] = {
    "jsonl": JsonLines,
    "packages": Packages,
    "parquet": Parquet,
    "stdlib": Stdlib,
    "text": Text,
    "tfds": TfdsDataset,
}


RECORDS: dict[str, Callable[[SourceConfig, Sequence[str]], Source]] = {"jsonl": JsonLines, "parquet": Parquet}


def load_records(config: SourceConfig, fields: Sequence[str]) -> Source:
    """The source that `config` names, each document a `Record` of `fields`.

    Raises `ConfigError` if it has no records, or the config names a field of its own.
    """
    require(
        config.source in RECORDS,
        f"DataConfig.source is {config.source!r}, which has no records of {', '.join(fields)}; give JSON lines or "
        "Parquet, such as 'chats.jsonl', or 'jsonl:FILES' where the ending is another.",
    )
    require(
        config.field == SourceConfig.field,
        f"DataConfig.field is {config.field!r}, and of records {', '.join(fields)} are read. Leave field out, and "
        "rename the record's own.",
    )
    return RECORDS[config.source](config, fields)


def load_source(config: SourceConfig) -> Source:
    """The source that `config` names. Raises `ConfigError` on an unknown name or a source that has no documents."""
    if config.source not in SOURCES and os.path.exists(config.source):
        files = os.path.join(config.source, "*") if os.path.isdir(config.source) else f"./{config.source}"
        raise ConfigError(
            f"DataConfig.source is {config.source!r}, which is no source's name but is there; give {files!r}, "
            "for a path is one with a slash, a dot or a wildcard in it."
        )
    return lookup(SOURCES, config.source, "DataConfig.source")(config)
