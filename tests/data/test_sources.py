"""Sources: every document once, with its name, however the source is cut into parts."""

import dataclasses
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.data.config import DataConfig
from mtp_jax.data.sources import DataError, Part, base, documents, load_source
from mtp_jax.data.sources.base import Unreadable
from mtp_jax.validate import ConfigError
from support import REPOSITORY


def read(config, data_dir=Path("nowhere"), part_bytes=None):
    """All documents, by the parts of a copy of the source that was sent to another process, and back from JSON."""
    with pytest.MonkeyPatch.context() as patch:
        if part_bytes:
            patch.setattr(base, "PART_BYTES", part_bytes)
        source = load_source(config)
        parts = [Part(*part) for part in json.loads(json.dumps(source.parts(data_dir)))]
        copy = pickle.loads(pickle.dumps(source))
        assert json.loads(json.dumps(copy.fingerprint())) == source.fingerprint() == source.fingerprint()
        found = [document for part in parts for document in copy.read(part, data_dir)]
        assert found == list(documents(source, data_dir))
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    return found, len(parts)


def read_all_ways(config, data_dir=Path("nowhere")):
    """The documents, which are the same whether parts have 1 byte, 100 bytes, or everything."""
    found, count = read(config, data_dir)
    assert count == 1 or config.source == "parquet"
    for part_bytes in (1, 100):
        others, more = read(config, data_dir, part_bytes)
        assert others == found and more >= count
    return found


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# Text


def test_a_file_is_a_document(tmp_path):
    for i in range(30):
        write(tmp_path / f"{i % 3}" / f"{i}.txt", b"\xff" * (i * 7))
    write(tmp_path / "z.txt.gz", gzip.compress(b"inside"))
    found = read_all_ways(DataConfig("text", f"{tmp_path}/**/*.txt*"))
    names = sorted([*(f"{i % 3}/{i}.txt" for i in range(30)), "z.txt.gz"])
    assert [name for name, _ in found] == names
    assert dict(found)["1/4.txt"] == b"\xff" * 28 and dict(found)["z.txt.gz"] == b"inside"


def test_a_separator_cuts_files_into_documents(tmp_path):
    write(tmp_path / "a.txt", b"one\n<|end|>\r\n two \n\nthree<|end|>\n\n<|end|><|end|>four" + b"!" * 200 + b"<|end|>")
    write(tmp_path / "b.txt", b"no separator")
    write(tmp_path / "c.txt.gz", gzip.compress(b"x<|end|>y"))
    config = DataConfig("text", f"{tmp_path}/*", separator="<|end|>")
    assert read_all_ways(config) == [
        ("a.txt@0", b"one"),
        ("a.txt@11", b" two \n\nthree"),
        ("a.txt@48", b"four" + b"!" * 200),
        ("b.txt@0", b"no separator"),
        ("c.txt.gz@0", b"x"),
        ("c.txt.gz@8", b"y"),
    ]


def test_a_separator_may_have_escapes(tmp_path):
    file = write(tmp_path / "a.txt", b"one\ntwo\n\n\n\n\nthree\n\t\nfour\\")
    assert read_all_ways(DataConfig("text", str(file), separator=r"\n\n")) == [
        ("a.txt@0", b"one\ntwo"),
        ("a.txt@11", b"three\n\t\nfour\\"),
    ]
    assert [text for _, text in read_all_ways(DataConfig("text", str(file), separator=r"\n\t\n"))] == [
        b"one\ntwo\n\n\n\n\nthree",
        b"four\\",
    ]
    assert len(read_all_ways(DataConfig("text", str(file), separator="\\"))) == 1


def test_real_stories_are_cut_at_their_separator():
    file = REPOSITORY.parent / "shared/data/tinystories/valid.txt"
    if not file.exists():
        pytest.skip("the stories are not on this machine")
    pieces = file.read_bytes().split(b"<|endoftext|>")
    found, _ = read(DataConfig("text", str(file), separator="<|endoftext|>"))
    assert [text for _, text in found] == [piece.strip(b"\r\n") for piece in pieces if piece.strip(b"\r\n")]
    assert read(DataConfig("text", str(file), separator="<|endoftext|>"), part_bytes=2**18)[0] == found


# JSON lines


def jsonl(rows):
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def test_a_line_is_a_document(tmp_path):
    rows = [{"text": "h\u00e9"}, b"\r\n", {"text": "", "x": 1}, b'{"text": "\\ud800 \\n"}\r\n', b'{"text": "last"}']
    # Bytes that are not UTF-8 stay what they are, and so does half a surrogate pair.
    rows.append(b'\n{"text": "\xff\xc3"}')
    write(tmp_path / "a.jsonl", jsonl(rows))
    write(tmp_path / "b.jsonl.gz", gzip.compress(jsonl(rows)))
    texts = ["h\u00e9".encode(), b"", b"\xed\xa0\x80 \n", b"last", b"\xff\xc3"]
    found = read_all_ways(DataConfig("jsonl", f"{tmp_path}/*"))
    offsets = [jsonl(rows).index(line) for line in jsonl(rows).splitlines() if line]
    names = [f"{name}:{offset}" for name in ("a.jsonl", "b.jsonl.gz") for offset in offsets]
    assert found == list(zip(names, texts * 2, strict=True))


@settings(max_examples=60)
@given(rows=st.lists(st.text(max_size=30) | st.none(), max_size=20), part_bytes=st.integers(1, 200), last=st.booleans())
def test_line_ranges_hold_every_line_once(tmp_path_factory, rows, part_bytes, last):
    lines = [b"" if row is None else json.dumps({"text": row}, ensure_ascii=False).encode() for row in rows]
    content = b"\n".join(lines) + b"\n" * last
    file = write(tmp_path_factory.getbasetemp() / "lines" / "file.jsonl", content or b"\n")
    expected, offset = [], 0
    for row, line in zip(rows, lines, strict=True):
        if row is not None:
            expected.append((f"file.jsonl:{offset}", row.encode()))
        offset += len(line) + 1
    assert read(DataConfig("jsonl", str(file)), part_bytes=part_bytes)[0] == expected


def test_dots_descend_into_objects(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl([{"meta": {"text": "in", "x": 0}, "text": "out"}]))
    assert read_all_ways(DataConfig("jsonl", str(file), field="meta.text")) == [("a.jsonl:0", b"in")]
    fingerprints = [load_source(DataConfig("jsonl", str(file), field=f)).fingerprint() for f in ("text", "meta.x")]
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize(
    "line, field, message",
    [
        (b"{", "text", "line at byte 14: .*Expecting"),
        (b"\xff", "text", "line at byte 14: Expecting value"),
        (b"[1]", "text", "line at byte 14: it is no JSON object but list"),
        (b'{"a": 1, "b": 2}', "text", "line at byte 14: there is no field 'text'; it has 'a', 'b'"),
        (b'{"text": 3}', "text", "field 'text' is no string but float"),
        (b'{"text": "", "m": {"a": 1}}', "m.b", "there is no field 'm.b'; field 'm' has 'a'"),
        (b'{"text": "", "m": null}', "m.b", "field 'm' is no JSON object but NoneType"),
        (b"[" * 100_000, "text", "line at byte 14"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, field, message):
    good = b'{"text": "ok"}' if field == "text" else b'{"m":{"b":""}}'
    file = write(tmp_path / "a.jsonl", good + b"\n" + line + b"\n")
    found = [text for _, text in documents(load_source(DataConfig("jsonl", str(file), field=field)), tmp_path)]
    why = found[1].why
    assert isinstance(found[1], Unreadable) and re.search(message.replace("byte 14", f"byte {len(good) + 1}"), why)
    assert str(file) in why and len(why) < 1000


# Parquet


def parquet(file, columns, **options):
    pq.write_table(pa.table(columns), file, **options)
    return file


def test_a_row_is_a_document(tmp_path):
    texts = [f"row {i} \u00e9" * (i % 5) if i % 7 else None for i in range(50)]
    binary = [None if text is None else b"\xff" + text.encode() for text in texts]
    struct = [None if i % 4 == 0 else {"text": text} for i, text in enumerate(texts)]
    columns = {
        "text": texts,
        "raw": pa.array(binary, pa.large_binary()),
        "meta": struct,
        "kind": pa.array(["a", "b"] * 25).dictionary_encode(),
        "big": pa.array(texts, pa.large_string()),
        "number": list(range(50)),
        "list": [["x"]] * 50,
    }
    parquet(tmp_path / "a.parquet", columns, row_group_size=8)
    parquet(tmp_path / "b.parquet", {"text": pa.array([], pa.string()), **{k: columns[k][:0] for k in ("raw",)}})
    names = [f"a.parquet:{i}" for i in range(50)]
    encoded = [(text or "").encode() for text in texts]
    assert read_all_ways(DataConfig("parquet", f"{tmp_path}/*")) == list(zip(names, encoded, strict=True))
    assert read(DataConfig("parquet", f"{tmp_path}/*"), part_bytes=1)[1] == 7
    one = f"{tmp_path}/a.parquet"
    for field, values in {
        "raw": [value or b"" for value in binary],
        "big": encoded,
        "meta.text": [b"" if i % 4 == 0 else text for i, text in enumerate(encoded)],
        "kind": [b"a", b"b"] * 25,
    }.items():
        assert [text for _, text in read_all_ways(DataConfig("parquet", one, field=field))] == values, field
    for field in ("tex", "number", "list", "meta", "list.list.element"):
        with pytest.raises(ConfigError, match=rf"field is '{field}', and .*a\.parquet.*are 'text', 'raw'.*'number'"):
            read(DataConfig("parquet", one, field=field))


def test_a_damaged_parquet_file_is_named(tmp_path):
    file = write(tmp_path / "a.parquet", b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"Cannot read .*a\.parquet"):
        read(DataConfig("parquet", str(file)))


def test_parquet_without_pyarrow_is_refused(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", b"x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"source is parquet.*mtp_jax\[parquet\]"):
        load_source(DataConfig("parquet", str(file)))


# TFDS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The directory of a prepared data set."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict(
                {"text": text, "n": tfds.features.Scalar(np.int64), "meta": {"text": text}}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "test": self._generate_examples(9)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"text {i}", "n": i, "meta": {"text": f"inner {i}"}}

    tfds.disable_progress_bar()
    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_an_example_is_a_document(tiny):
    config = DataConfig("tfds", dataset=tiny)
    found = read_all_ways(config)
    assert [name for name, _ in found] == [f"train:{i}" for i in range(40)]
    assert sorted(text for _, text in found) == sorted(b"text %d" % i for i in range(40))
    some = read_all_ways(dataclasses.replace(config, split="train[:25%]"))
    assert [text for _, text in some] == [text for _, text in found[:10]]
    inner = read_all_ways(dataclasses.replace(config, split="test", field="meta.text"))
    assert sorted(text for _, text in inner) == [b"inner %d" % i for i in range(9)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"field": "txt"}, r"field is 'txt' .*it has .*text"),
        ({"field": "n"}, r"field is 'n'"),
        ({"field": "meta"}, r"field is 'meta'"),
        ({"split": "valid"}, r"split is 'valid' and .* has t\w+, t\w+, of which"),
        ({"dataset": "ag_new_subset"}, r"dataset is 'ag_new_subset'.*did you mean 'ag_news_subset'\?"),
        ({"dataset": "ag_news_subset:9.9.9"}, r"only: 1\.0\.0"),
        ({"dataset": "/nowhere/at/all"}, r"dataset is '/nowhere/at/all', which is neither"),
    ],
)
def test_what_a_data_set_does_not_have_is_refused(tiny, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(DataConfig("tfds", **{"dataset": tiny, **changes}), tmp_path)


def test_a_data_set_that_cannot_be_prepared_is_named(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(self, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(DataError, match=r"cannot prepare ag_news_subset:1\.0\.0.*no network.*--data.dataset"):
        read(DataConfig("tfds", dataset="ag_news_subset:1.0.0", field="description"), tmp_path)


def test_a_data_set_without_random_access_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    info = tmp_path / "copy" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ConfigError, match=r"was prepared as tfrecord; it needs .* file_format='array_record'"):
        read(DataConfig("tfds", dataset=str(tmp_path / "copy")))


@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
def test_a_damaged_data_set_is_named(tiny, tmp_path, damage):
    shutil.copytree(tiny, tmp_path / "copy")
    source = load_source(DataConfig("tfds", dataset=str(tmp_path / "copy")))
    before, parts = source.fingerprint(), source.parts(tmp_path)
    (file,) = (tmp_path / "copy").glob("*train*array_record*")
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(
        content[: len(content) // 2] if damage == "shorter" else bytes(byte ^ 255 for byte in content)
    )
    assert source.fingerprint() != before
    with pytest.raises(DataError, match=f"Cannot read example.*{tmp_path}/copy"):
        list(source.read(parts[0], tmp_path))


def test_a_data_set_is_read_without_tensorflow(tiny):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mtp_jax.data.config import DataConfig\n"
        "from mtp_jax.data.sources import documents, load_source\n"
        "source = load_source(DataConfig('tfds', dataset=sys.argv[1]))\nsource.fingerprint()\n"
        "assert 'tensorflow_datasets' not in sys.modules and 'pyarrow' not in sys.modules\n"
        "assert len(list(documents(source, Path()))) == 40 and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tiny], check=True)


def test_a_builder_is_made_of_any_source(tmp_path):
    from mtp_jax.data.sources.builder import prepared

    file = write(tmp_path / "a.jsonl", jsonl([{"text": "one"}, {"text": "two"}]))
    examples = prepared(load_source(DataConfig("jsonl", str(file))), tmp_path / "tfds")
    assert list(examples) == [{"name": b"a.jsonl:0", "text": b"one"}, {"name": b"a.jsonl:16", "text": b"two"}]


# Packages


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Directories of installed packages."""
    for name in ("alpha/__init__.py", "alpha/core.py", "alpha/tests/test_core.py", "alpha/data.txt", "beta.py"):
        write(tmp_path / "site" / name, name.encode())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    return tmp_path / "site"


def test_packages_are_the_installed_code(site, tmp_path):
    found = read_all_ways(DataConfig("packages"), tmp_path / "tfds")
    assert found == [(name, name.encode()) for name in ("alpha/__init__.py", "alpha/core.py", "beta.py")]
    only, _ = read(DataConfig("packages", "beta,"), tmp_path / "tfds")
    assert only == [("beta.py", b"beta.py")]
    before = load_source(DataConfig("packages")).fingerprint()
    write(site / "beta.py", b"longer than it was")
    assert load_source(DataConfig("packages")).fingerprint() != before


def test_a_damaged_copy_is_named_with_the_way_out(site, tmp_path):
    read(DataConfig("packages"), tmp_path / "tfds")
    (file,) = (tmp_path / "tfds").glob("**/*array_record*")
    for size in (2**16, 100):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(DataError, match=rf"Cannot read example.*{tmp_path}/tfds/\S+ \(delete it\)"):
            read(DataConfig("packages"), tmp_path / "tfds")


def test_packages_in_two_homes_keep_their_names_apart(tmp_path, monkeypatch):
    for name in ("lib/site/a/x.py", "lib64/site/b/x.py"):
        write(tmp_path / name, b"x")
    monkeypatch.setattr(
        sysconfig, "get_path", lambda n: str(tmp_path / ("lib" if n == "purelib" else "lib64") / "site")
    )
    assert load_source(DataConfig("packages")).files.names == ("lib/site/a/x.py", "lib64/site/b/x.py")


def test_a_package_that_is_not_installed_is_refused(site):
    with pytest.raises(ConfigError, match=r"no package 'alhpa' is installed.*did you mean 'alpha'\?"):
        load_source(DataConfig("packages", "beta, alhpa"))
    (site / "beta.py").unlink()
    (site / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.py file of empty in"):
        load_source(DataConfig("packages", "empty"))


# Bad input


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_files_that_vanish_are_named(tmp_path, source):
    for name in "ab":
        if source == "parquet":
            parquet(tmp_path / name, {"text": ["x"]})
        else:
            write(tmp_path / name, b'{"text": "x"}')
    loaded = load_source(DataConfig(source, f"{tmp_path}/[ab]"))
    reading = documents(loaded, Path())
    next(reading)
    (tmp_path / "b").unlink()
    with pytest.raises(DataError, match=rf"Cannot read {tmp_path}/b: .*No such file"):
        list(reading)
    for use in (loaded.fingerprint, lambda: loaded.parts(Path())):
        with pytest.raises(DataError, match=rf"Cannot read {tmp_path}/b: .*No such file"):
            use()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    file = write(tmp_path / "a.txt", b"secret")
    file.chmod(0)
    with pytest.raises(DataError, match=r"Cannot read .*a\.txt: Permission denied"):
        read(DataConfig("text", str(file)))


def test_a_file_that_gets_shorter_is_named(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt", b"0123|" * 20)
    monkeypatch.setattr(base, "PART_BYTES", 40)
    source = load_source(DataConfig("text", str(file), separator="|"))
    parts = source.parts(Path())
    file.write_bytes(b"0123|" * 10)
    with pytest.raises(DataError, match=r"a\.txt: it ends 40 bytes early"):
        list(source.read(parts[1], Path()))


def test_a_damaged_gz_file_is_named(tmp_path):
    content = gzip.compress(b'{"text": "x"}\n' * 100)
    for damaged in (content[:-9], b"no gzip", content[:20] + b"\xff\xff\xff" + content[23:]):
        file = write(tmp_path / "a.jsonl.gz", damaged)
        with pytest.raises(DataError, match=r"Cannot read .*a\.jsonl\.gz"):
            read(DataConfig("jsonl", str(file)))


def test_a_source_without_documents_is_refused(tmp_path):
    write(tmp_path / "a.txt", b"")
    parquet(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    for source, name in (("text", "a.txt"), ("jsonl", "a.txt"), ("parquet", "a.parquet")):
        with pytest.raises(ConfigError, match=r"The source has no documents: .*a\."):
            read(DataConfig(source, f"{tmp_path}/{name}"))
