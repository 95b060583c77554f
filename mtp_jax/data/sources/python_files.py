"""A TFDS builder over files of source code, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


class PythonFiles(tfds.core.GeneratorBasedBuilder):
    """One example per file: `{"name": path below root, "text": its bytes as they are}`, in one split, `files`."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. TFDS looks for them with importlib_resources, which it does not
    # declare among its dependencies (tensorflow/datasets#11212).
    url_infos = None

    def __init__(self, *, root: Path, names: Sequence[str], **kwargs: Any):
        """The files `names` below `root`; `kwargs` are those of every TFDS builder."""
        self._root, self._names = root, names
        # The default file format needs TensorFlow; ArrayRecord does not.
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self, description="Files of Python source code.", features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"files": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, name in enumerate(self._names):
            yield key, {"name": name, "text": (self._root / name).read_bytes()}


def prepared(root: Path, names: Sequence[str], data_dir: Path) -> Sequence[dict[str, Any]]:
    """The examples of the files `names` below `root`, in that order, by random access.

    The data set is made in `data_dir` if it is not there. Any number of processes may call this at once.
    """
    tfds.disable_progress_bar()
    builder: Any = PythonFiles(root=root, names=names, data_dir=data_dir)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        # TFDS writes aside and renames, so a process that comes second finds the data complete and its rename refused.
        if not builder.is_prepared():
            raise
        return prepared(root, names, data_dir)
    return builder.as_data_source(split="files")
