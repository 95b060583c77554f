"""Endings of file names: what a file holds, and how it is compressed. Imports no library."""

from __future__ import annotations

import os

from mtp_jax.validate import require

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
NO_TEXT = (
    *(".csv", ".tsv", ".bin", ".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4", ".pdf", ".doc", ".docx", ".xls", ".xlsx"),
    *(".npy", ".npz", ".pkl", ".pickle", ".arrow", ".feather", ".h5", ".hdf5", ".orc", ".avro", ".tfrecord"),
    *(".safetensors", ".pt", ".pth", ".db", ".sqlite", ".png", ".jpg", ".wav", ".mp3"),
)


def split_ending(name: str) -> tuple[str, str]:
    """(the name's own ending, the ending of its compression), both in small letters; empty where there is none."""
    stem, last = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")


def kind_of(name: str) -> str:
    """The source that reads a file or a glob of this name: `jsonl`, `parquet` or `text`.

    Raises `ConfigError` on an ending of something else, and on two compressions.
    """
    own, packed = split_ending(name)
    require(
        own not in NO_TEXT and own not in COMPRESSED and not (own == ".parquet" and packed),
        f"DataConfig.source is {name!r}: what ends in {own}{packed} is nothing that is read. Give text, JSON lines "
        f"({', '.join(KINDS)}), plain or compressed once ({', '.join(COMPRESSED)}), or Parquet.",
    )
    return KINDS.get(own, "text")
