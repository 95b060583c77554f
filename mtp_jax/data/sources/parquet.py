"""Source `parquet`: local Parquet files, one document per row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources import base
from mtp_jax.data.sources.base import DataError, Part, Record, Unreadable
from mtp_jax.data.sources.files import Files
from mtp_jax.validate import ConfigError, require

BATCH = 1024  # rows in memory at a time


class Parquet:
    """The column `DataConfig.field` of the files that `DataConfig.files` matches: strings or bytes, null for none.

    `meta.text` is the field `text` of the struct `meta`. A document is called `file:row`. A part is a range of row
    groups of one file. With `fields` a document is the `Record` of those columns that there are.
    """

    def __init__(self, config: SourceConfig, fields: Sequence[str] = ()):
        """Raises `ConfigError` if no file matches, or pyarrow is not installed."""
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"DataConfig.source is {config.source}, which needs pyarrow: pip install 'mtp_jax[parquet]' ({error})."
            ) from error
        self.files, self.field, self.fields = Files.matching(config.files), config.field, tuple(fields)

    def fingerprint(self) -> dict[str, Any]:
        """That of the files, and the column."""
        return {**self.files.fingerprint(), "field": list(self.fields) or self.field}

    def parts(self, data_dir: Path) -> list[Part]:
        """Row groups. Raises `ConfigError` if a file has no such column."""
        parts = []
        for name in self.files.names:
            with self._opened(name) as file:
                columns = self._leaves(name, file) if self.fields else [self._column(name, file)]
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                parts += [
                    Part(name, *group)
                    for group in base.grouped(
                        [sum(group.column(i).total_uncompressed_size for i in columns) for group in groups]
                    )
                    if file.metadata.num_rows
                ]
        require(bool(parts), f"The source has no documents: no row is in {self.files}. Change DataConfig.files.")
        return parts

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The rows of a part. Nothing is kept in `data_dir`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        with self._opened(part.name) as file:
            row = sum(file.metadata.row_group(i).num_rows for i in range(part.begin))
            groups = range(part.begin, part.end)
            if self.fields:
                columns = [name for name in self.fields if name in file.schema_arrow.names]
                for batch in file.iter_batches(BATCH, row_groups=groups, columns=columns, use_threads=False):
                    for value in batch.to_pylist():
                        where = f"{self.files.root / part.name}, row {row}"
                        yield f"{part.name}:{row}", Record.having(self.fields, value, where)
                        row += 1
                return
            for batch in file.iter_batches(BATCH, row_groups=groups, columns=[self.field], use_threads=False):
                values: Any = batch.column(0)
                inner = self.field.split(".")[1:] if batch.schema.names[0] != self.field else []
                texts = pc.struct_field(values, inner) if inner else values  # type: ignore
                for value in texts.cast(pa.large_binary()).to_pylist():  # strings need not be UTF-8
                    null = Unreadable.because(f"{self.files.root / part.name}, row {row}: it is null")
                    yield f"{part.name}:{row}", null if value is None else value
                    row += 1

    def _leaves(self, name: str, file: Any) -> list[int]:
        """The numbers of the leaves below the columns `fields`."""
        schema = file.metadata.schema
        roots = [schema.column(i).path.partition(".")[0] for i in range(len(schema))]
        found = [i for i, root in enumerate(roots) if root in self.fields]
        require(
            bool(found),
            f"{self.files.root / name} has none of the columns {', '.join(self.fields)}; it has "
            f"{', '.join(map(repr, dict.fromkeys(roots))) or 'none'}.",
        )
        return found

    def _column(self, name: str, file: Any) -> int:
        """The number of the column among the leaves of the schema."""
        leaves = [file.metadata.schema.column(i) for i in range(len(file.metadata.schema))]
        paths = [leaf.path for leaf in leaves]
        # The annotated ones are strings, JSON, enumerations and decimals.
        texts = [
            leaf.path
            for leaf in leaves
            if leaf.physical_type == "BYTE_ARRAY"
            and leaf.logical_type.type in ("NONE", "STRING", "JSON", "ENUM")
            and leaf.max_repetition_level == 0
        ]
        require(
            self.field in texts,
            f"DataConfig.field is {self.field!r}, and {self.files.root / name} has no such column of strings or bytes. "
            f"Such columns are {', '.join(map(repr, texts)) or 'none'}; all are {', '.join(map(repr, paths))}.",
        )
        return paths.index(self.field)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """The open file, read in small pieces. What goes wrong while it is read is a `DataError` that names it."""
        import pyarrow
        import pyarrow.parquet

        path = self.files.root / name
        try:
            with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                yield file
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"Cannot read {path}: {error}") from error
