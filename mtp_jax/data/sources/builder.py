"""TFDS builder over the documents of any source, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mtp_jax.data.sources.base import DataError, Source, documents

BATCH = 256  # examples in memory at a time


class LocalDocuments(tfds.core.GeneratorBasedBuilder):
    """One example per document: `{"name": its name, "text": its bytes as they are}`, in one split, `documents`."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. TFDS looks for them with importlib_resources, which it does not
    # declare among its dependencies (tensorflow/datasets#11212).
    url_infos = None

    def __init__(self, *, source: Source, **kwargs: Any):
        """The documents of `source`; `kwargs` are those of every TFDS builder."""
        self._source = source
        # The default file format needs TensorFlow; ArrayRecord does not.
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"documents": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (name, text) in enumerate(documents(self._source, Path(self.data_dir))):
            yield key, {"name": name.encode("utf-8", "surrogateescape"), "text": text}


def prepared(source: Source, data_dir: Path) -> Sequence[dict[str, Any]]:
    """The examples of `LocalDocuments(source)`, in order, by random access. `data_dir` keeps them, made if need be."""
    return prepare(lambda: LocalDocuments(source=source, data_dir=data_dir)).as_data_source(split="documents")


def prepare(make: Callable[[], Any]) -> Any:
    """A builder that `make` gives, with its data set made if it was not there.

    Any number of processes may call this at once.
    """
    tfds.disable_progress_bar()
    builder = make()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        # TFDS writes aside and renames, so a process that comes second finds the data complete and its rename refused.
        if not builder.is_prepared():
            raise
        return prepare(make)
    return builder


def read_fields(examples: Any, begin: int, end: int, fields: Sequence[str], where: str) -> Iterator[list[Any]]:
    """The values of `fields` (dots descend) of examples `begin` to `end`.

    Raises `DataError`, which names `where` they are, on what cannot be read.
    """
    for first in range(begin, end, BATCH):
        numbers = list(range(first, min(first + BATCH, end)))
        try:
            found = examples.__getitems__(numbers)
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise DataError(f"Cannot read examples {first} to {numbers[-1]} of {where}: {error}") from error
        for number, example in zip(numbers, found, strict=True):
            values = []
            for field in fields:
                value = example
                for key in field.split("."):
                    value = None if value is None else value[key]
                # From a file that was cut short TFDS may read an example of None alone.
                if value is None:
                    raise DataError(f"Cannot read example {number} of {where}: it has no {field!r}. Is a file damaged?")
                values.append(value)
            yield values
