"""Source `tfds`: a data set of TensorFlow Datasets, by name or by its directory, without TensorFlow."""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources import base
from mtp_jax.data.sources.base import DataError, Part
from mtp_jax.data.sources.files import Files
from mtp_jax.validate import ConfigError, require


class TfdsDataset:
    """The strings in feature `DataConfig.field` of split `DataConfig.split` (`train[:10%]`, say) of a data set.

    `DataConfig.dataset` is the directory of a data set that was prepared in a format with random access, or a name such
    as `ag_news_subset:1.0.0`, which is then downloaded and prepared in the cache. `meta/text` may be written
    `meta.text`. A document is called `split:number`.
    """

    def __init__(self, config: SourceConfig):
        """Reads nothing: what is wrong with a data set shows in `parts`."""
        self.dataset, self.split, self.field = config.dataset, config.split, config.field
        self.directory = Path(config.dataset).expanduser()
        self.is_directory = (self.directory / "dataset_info.json").is_file()

    def fingerprint(self) -> dict[str, Any]:
        """What is read; of a directory also its files, of a name the version of TFDS, which knows the newest."""
        found: dict[str, Any] = {"split": self.split, "field": self.field}
        if not self.is_directory:
            return {**found, "dataset": self.dataset, "tfds": importlib.metadata.version("tensorflow-datasets")}
        names = sorted(p.relative_to(self.directory).as_posix() for p in self.directory.rglob("*") if p.is_file())
        return {**found, **Files(self.directory, tuple(names)).fingerprint()}

    def parts(self, data_dir: Path) -> list[Part]:
        """Ranges of examples, by their average size. The data set is made in `data_dir` if it has a name."""
        builder, examples = self._open(data_dir)
        require(
            len(examples) > 0,
            f"The source has no documents: split {self.split} of {self.dataset} is empty. Change DataConfig.split.",
        )
        splits = builder.info.splits.values()
        size = sum(s.num_bytes for s in splits) // max(1, sum(s.num_examples for s in splits))
        step = max(1, base.PART_BYTES // max(1, size))
        return [Part("", begin, min(begin + step, len(examples))) for begin in range(0, len(examples), step)]

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The examples of a part."""
        from mtp_jax.data.sources.builder import read_fields

        _, examples = self._open(data_dir)
        values = read_fields(examples, part.begin, part.end, (self.field,), f"{self.split} of {self.dataset}")
        for number, (value,) in enumerate(values, part.begin):
            yield f"{self.split}:{number}", value.encode() if isinstance(value, str) else value

    def _open(self, data_dir: Path) -> tuple[Any, Any]:
        """The builder, its data set made, and the examples. Raises `ConfigError` on what the configuration names."""
        builder = self._builder(data_dir)
        feature: Any = builder.info.features
        for key in self.field.split("."):
            feature = feature[key] if hasattr(feature, "keys") and key in feature else None
        require(
            getattr(feature, "shape", None) == () and getattr(feature, "np_dtype", None) in (object, str, bytes),
            f"DataConfig.field is {self.field!r} and {self.dataset} has no such feature of strings; it has "
            f"{', '.join(builder.info.features)}.",
        )
        try:
            return builder, builder.as_data_source(split=self.split)
        except (NotImplementedError, ImportError) as error:
            raise ConfigError(
                f"DataConfig.dataset is {self.dataset!r}, which was prepared as {builder.info.file_format.value}; "
                "it needs a format with random access. Prepare it with file_format='array_record'."
            ) from error
        except (ValueError, KeyError) as error:
            why, *_ = str(error).split("\n")
            raise ConfigError(
                f"DataConfig.split is {self.split!r} and {self.dataset} has {', '.join(builder.info.splits)}, of which "
                f"one may take a part such as train[:10%] ({why})."
            ) from error

    def _builder(self, data_dir: Path) -> Any:
        # Here, because TFDS takes 1.5 s to import and a store that is already made does not need it.
        import tensorflow_datasets as tfds

        from mtp_jax.data.sources.builder import prepare

        def make() -> Any:
            return tfds.builder(self.dataset, data_dir=data_dir, file_format="array_record")

        try:
            if self.is_directory:
                return tfds.builder_from_directory(self.directory)
            make()
        except Exception as error:  # TFDS refuses a version by an AssertionError, and others by others
            name = self.dataset.partition(":")[0].partition("/")[0]
            near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
            why = f"did you mean {near[0]!r}?" if near and near[0] != name else str(error).partition("\n")[0]
            raise ConfigError(
                f"DataConfig.dataset is {self.dataset!r}, which is neither the directory of a prepared data set (with "
                f"a dataset_info.json) nor one that TFDS knows: {why}"
            ) from error
        try:
            return prepare(make)
        except Exception as error:  # no network, a checksum that does not fit, no space, a need of TensorFlow...
            raise DataError(
                f"TFDS cannot prepare {self.dataset} in {data_dir}: {type(error).__name__}: {error}. Prepare it "
                "elsewhere, with file_format='array_record', and give its directory as --data.dataset."
            ) from error
