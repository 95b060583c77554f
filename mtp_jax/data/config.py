"""Data options: where documents come from, and the batches that are made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mtp_jax.data.paths import resolve
from mtp_jax.validate import at_least, fraction, require, typed


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from.

    `source` names an entry of `mtp_jax.data.sources.SOURCES`, or is what is read: a file or a glob, which is `jsonl`,
    `parquet` or `text` by its ending, or as in `jsonl:PATH`; `.gz`, `.bz2`, `.xz` and `.zst` are decompressed. Training
    also reads what `mtp-jax data prepare` made: a directory, or several as a mixture, as in
    `3:data/stories,1:data/code`, where 3 of 4 sequences are stories.
    """

    source: str = "stdlib"
    """The name of a source, a file or a quoted glob; for training also a prepared directory, or WEIGHT:DIRECTORY,..."""
    files: str = ""
    """The glob, where the source is given by name; for packages their names, with commas between (default: all)."""
    separator: str = ""
    """What lies between the documents of a text file, such as '<|endoftext|>' (default: a file is one document)."""
    field: str = "text"
    """Where the text is: field of a JSON line (dots descend), column of a Parquet file, feature of a TFDS example."""
    dataset: str = ""
    """The TFDS data set: a name such as ag_news_subset:1.0.0, or the directory where it was prepared."""
    split: str = "train"
    """The split of the TFDS data set, such as train[:1000]."""
    valid_fraction: float = 0.05
    """The share of the documents that is held out, by the hash of their content: copies of one lie on one side. Where
    the hash holds out none or all, as of one large file, the end of each is held out, so much of its bytes."""
    cache_dir: str | None = None
    """Where prepared data sets are kept (default: $MTP_JAX_CACHE, else ~/.cache/mtp_jax)."""
    max_bad: float = dataclasses.field(default=0.001, kw_only=True)
    """The share of the documents that may be unreadable: null, without the field, broken. They are left
    out; one always may."""

    def __post_init__(self) -> None:
        typed(self)
        found = None if self.files and self.source in _FILES else resolve(self.source)
        if found:
            require(
                self.files in ("", found[1]),
                f"DataConfig.source is {self.source!r}, which says what is read, and files is {self.files!r}; "
                "leave one of them out.",
            )
            object.__setattr__(self, "source", found[0])
            object.__setattr__(self, "files", found[1])
        require(
            0 < self.valid_fraction < 1,
            f"DataConfig.valid_fraction is {self.valid_fraction}; it must lie in (0, 1).",
        )
        fraction(self, "max_bad")
        require(
            self.source not in _FILES or bool(self.files),
            f"DataConfig.source is {self.source} and files is empty; give {_FILES.get(self.source)}.",
        )
        require(
            self.source != "tfds" or bool(self.dataset),
            "DataConfig.source is tfds and dataset is empty; give a name, such as --data.dataset ag_news_subset:1.0.0, "
            "or the directory of a prepared data set.",
        )
        require(
            all(self.field.split(".")),
            f"DataConfig.field is {self.field!r}; it must be a name, or names with dots between.",
        )
        for name, default, sources in (
            ("separator", "", ("text",)),
            ("field", "text", ("jsonl", "parquet", "tfds")),
            ("dataset", "", ("tfds",)),
            ("split", "train", ("tfds",)),
        ):
            value = getattr(self, name)
            require(
                value == default or self.source in sources,
                f"DataConfig.{name} is {value!r} and source is {self.source}; it is for source {' and '.join(sources)} "
                f"alone. Change the source, or leave {name} at {default!r}.",
            )


_GLOB = "a glob, such as --data.source 'stories/*.txt'"
_FILES = {
    **dict.fromkeys(("text", "jsonl", "parquet"), _GLOB),
    "store": "the directory that `mtp-jax data prepare` made, such as --data.source data/stories",
    "mixture": "weights and stores, such as --data.source 3:data/stories,1:data/code",
}


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """What the model reads: batches of `batch_size` sequences of `seq_len` tokens, over all devices and hosts.

    `source` can be documents, which are prepared first; or `store`, with the directory in `files`, where they are; or
    `mixture`, with several of them in `files`.
    `tokenizer` is `bytes`, `hf:PATH` (a `tokenizer.json`) or `sentencepiece:PATH` (a `.model`), and `end_of_document`
    its special token that ends documents, as text (default: its own, where it is plain which one that is).
    """

    tokenizer: str = "bytes"
    end_of_document: str = ""
    seq_len: int = 256
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seq_len", "batch_size")
