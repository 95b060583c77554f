"""Data as people have it: endings, compression, broken lines, ends of lines."""

import bz2
import dataclasses
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from mtp_jax.data.config import DataConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import DataError, documents, load_source
from mtp_jax.validate import ConfigError


def write(file, data):
    file.write_bytes(data)
    return file


def read(config):
    return list(documents(load_source(config), Path("nowhere")))


def test_one_unreadable_line_is_left_out_and_a_share_of_them_is_refused(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    said = []
    for name, bad in (("one", 1), ("many", 30)):
        file = write(tmp_path / f"{name}.jsonl", "\n".join([*lines, *['{"text": null}'] * bad]).encode())
        config = DataConfig(source=str(file), valid_fraction=0.3, cache_dir=str(tmp_path / "cache"))
        if bad == 1:
            prepare(config, said.append)
        else:
            with pytest.raises(DataError, match=r"30 of 130 documents are unreadable \(.*many\.jsonl, line at byte"):
                prepare(config)
    assert "1 unreadable ones too (" in said[0] and "one.jsonl, line at byte" in said[0]
    prepare(dataclasses.replace(config, max_bad=0.5))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_compressed_bytes_never_become_text(tmp_path, ending):
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    write(tmp_path / "a.txt", packed(b"text"))
    with pytest.raises(DataError, match=rf"holds what {re.escape(ending)} has compressed"):
        read(DataConfig(source=str(tmp_path / "*.txt")))
    write(tmp_path / f"b.JSON{ending}", packed(b'[{"text": "one"}, {"text": "two"}]'))
    assert read(DataConfig(source=str(tmp_path / f"*.JSON{ending}"))) == [
        ("b.JSON" + ending + ":0", b"one"),
        ("b.JSON" + ending + ":1", b"two"),
    ]
    for name in (f"*.txt{ending}{ending}", "*.csv", f"*.parquet{ending}"):
        with pytest.raises(ConfigError, match="is nothing that is read"):
            DataConfig(source=name)


def test_separators_find_the_ends_of_lines_that_a_file_has(tmp_path):
    text = "\n\n".join(f"story {i}" for i in range(5))
    for name, data in (("lf", text), ("crlf", text.replace("\n", "\r\n"))):
        file = write(tmp_path / f"{name}.txt", data.encode())
        assert len(read(DataConfig(source=str(file), separator=r"\n\n"))) == 5
