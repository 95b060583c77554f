"""Paths of documents: what a source that is no name stands for, by what is there and by endings. Imports no library."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from mtp_jax.validate import require

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSON = (".jsonl", ".ndjson", ".json")
KINDS = {**dict.fromkeys(JSON, "jsonl"), ".parquet": "parquet"}
NO_TEXT = (
    *(".csv", ".tsv", ".bin", ".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4", ".pdf", ".doc", ".docx", ".xls", ".xlsx"),
    *(".npy", ".npz", ".pkl", ".pickle", ".arrow", ".feather", ".h5", ".hdf5", ".orc", ".avro", ".tfrecord"),
    *(".safetensors", ".pt", ".pth", ".db", ".sqlite", ".png", ".jpg", ".wav", ".mp3"),
)
MIXTURE = re.compile(r"[\d.]+:")
WILD = re.compile(r"[*?\[]")


def resolve(source: str) -> tuple[str, str] | None:
    """(the kind of source, its files) that `DataConfig.source` stands for; None if it is a name.

    What is there goes before what it could mean: a prepared directory, then files, then `WEIGHT:DIRECTORY,...` and
    `KIND:FILES`. Raises `ConfigError` on what no source reads.
    """
    path = os.path.expanduser(source)
    if source and os.path.exists(os.path.join(path, "manifest.json")):
        return "store", source
    if re.fullmatch(r"[\w-]*", source):
        return None
    require(
        not os.path.isdir(path),
        f"DataConfig.source is {source!r}, a directory that `mtp-jax data prepare` did not make (no manifest.json). To "
        f"read its files, give {os.path.join(source, '*')!r}, or a glob with their ending.",
    )
    kind, _, files = source.partition(":")
    kind = "mixture" if MIXTURE.match(source) else kind
    if files and kind in ("mixture", "text", *KINDS.values()) and not matching(source)[1]:
        return kind, source if kind == "mixture" else files
    return _kind(source), source


def matching(pattern: str) -> tuple[Path, list[str]]:
    """The files of a path or a glob (`**` crosses directories): a root, and names below it with `/`, sorted.

    The root is the path up to the first wildcard. A file or a directory that is there is no wildcard: `lr[0.1]`, say.
    """
    parts, root, wild = Path(os.path.expanduser(pattern)).parts, Path(), 0
    while wild < len(parts) - 1 and (os.path.isdir(root / parts[wild]) or not WILD.search(parts[wild])):
        root, wild = root / parts[wild], wild + 1
    rest = Path(*parts[wild:])
    found = [str(rest)] if os.path.isfile(root / rest) else glob.glob(str(rest), root_dir=root, recursive=True)
    return root, sorted({Path(name).as_posix() for name in found if os.path.isfile(root / name)})


def split_ending(name: str) -> tuple[str, str]:
    """(the name's own ending, the ending of its compression), both in small letters; empty where there is none."""
    stem, last = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")


def _kind(pattern: str) -> str:
    """The source that reads a file or what a glob matches: `jsonl`, `parquet` or `text`."""
    own, _ = split_ending(pattern)
    names, first = [pattern], {}
    if WILD.search(own or pattern) and not os.path.isfile(os.path.expanduser(pattern)):
        root, found = matching(pattern)
        names = [str(root / name) for name in found] or names
    for name in names:
        own, packed = split_ending(name)
        require(
            own not in NO_TEXT and own not in COMPRESSED and not (own == ".parquet" and packed),
            f"DataConfig.source is {pattern!r}: {name!r}, by its ending {own}{packed}, is nothing that is read. Give "
            f"text, JSON lines ({', '.join(JSON)}), plain or compressed once ({', '.join(COMPRESSED)}), or Parquet. "
            f"If it is text all the same, say 'text:{pattern}'.",
        )
        first.setdefault(KINDS.get(own, "text"), name)
    require(
        len(first) == 1,
        f"DataConfig.source is {pattern!r}, which matches files of several kinds: "
        f"{', '.join(f'{kind} ({name!r})' for kind, name in first.items())}. Give a glob with the ending of one kind, "
        f"or say what all of them are, such as 'text:{pattern}'.",
    )
    return next(iter(first))
