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
from mtp_jax.data.sources import DataError, Part, documents, load_source, split
from mtp_jax.data.sources.base import Unreadable
from mtp_jax.data.sources.files import Files
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


STORIES = b"one\n\ntwo\r\n\r\nthree\r\n\nfour\n\r\nfive\r\n\r\n\r\nsix\rseven\r\n \r\neight\n\n\n\nnine"


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 2**20])
def test_a_file_with_both_ends_of_lines_is_split_at_each(tmp_path, monkeypatch, chunk):
    """However it is cut: at every byte in turn a part ends behind the next separator, and the pieces stay the same."""
    file = write(tmp_path / "a.txt", STORIES)
    monkeypatch.setattr(split, "CHUNK", chunk)
    expected = [piece for piece in re.split(rb"\n\r?\n", STORIES) if piece]
    files, starts = Files(tmp_path, ("a.txt",)), {match.end() for match in re.finditer(rb"\n\r?\n", STORIES)}
    for cut in range(1, len(STORIES)):
        with file.open("rb") as opened:
            found = split.boundary(opened, b"\n\n", cut) or len(STORIES)
        assert found in {*starts, len(STORIES)}
        parts = [Part("a.txt", 0, found), Part("a.txt", found, len(STORIES))]
        assert [piece for part in parts for _, _, piece in files.pieces(part, b"\n\n") if piece] == expected
    names = ["one", "two", "three", "four", "five", "six\rseven\r\n \r\neight", "nine"]
    assert [text.decode() for _, text in read(DataConfig(source=str(file), separator=r"\n\n"))] == names


@pytest.mark.parametrize("separator", ["\n\n", "\n---\n"])
def test_ends_of_lines_that_change_far_into_a_file(tmp_path, separator):
    """A long beginning says nothing of the rest, in either direction."""
    unix = "".join(f"story {i:05}{separator}" for i in range(9000))
    dos = unix.replace("\n", "\r\n")
    for text in (unix + dos, dos + unix):
        file = write(tmp_path / "a.txt", text.encode())
        found = [text for _, text in read(DataConfig(source=str(file), separator=separator))]
        assert found == [b"story %05d" % i for i in range(9000)] * 2


def test_a_return_in_a_separator_is_looked_for(tmp_path):
    file = write(tmp_path / "a.txt", b"one\n\nstill one\r\n\r\ntwo")
    found = read(DataConfig(source=str(file), separator=r"\r\n\r\n"))
    assert [text for _, text in found] == [b"one\n\nstill one", b"two"]


# JSON lines

TEXTS = [f"document {i}, naïve" for i in range(1200)]
LINES = "".join(json.dumps({"text": text, "n": i}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS)).encode()


def zst(data):
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("packed", [*PACKED, *(ending.upper() for ending in PACKED if ending)])
@pytest.mark.parametrize(
    "ending", [".jsonl", ".ndjson", ".json", ".JSONL", ".NdJson", ".Json", ".v2.jsonl", ".txt.json"]
)
def test_json_lines_under_every_name_that_they_have(tmp_path, ending, packed):
    pack, values = PACKED[packed.lower()], [{"text": text, "n": None} for text in TEXTS[:20]]
    forms = {
        "lines": "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values),
        "dos": "\r\n\r\n".join(map(json.dumps, values)),
        "array": json.dumps(values),
        "indented": " \n" + json.dumps(values, indent=2),
    }
    for form, data in forms.items():
        for encoding in ("utf-8", "utf-8-sig"):
            file = write(tmp_path / f"{form}{ending}{packed}", pack(data.encode(encoding)))
            for source in (str(file), str(tmp_path / f"{form}*{ending}{packed}"), str(tmp_path / f"{form}*")):
                assert [text.decode() for _, text in read(DataConfig(source=source))] == TEXTS[:20]


BAD = {
    "null": ('{"text": null}', "field 'text' is no string but NoneType"),
    "a number": ('{"text": 5}', "no string but int|no string but float"),
    "NaN": ('{"text": NaN}', "no string but float"),
    "a list": ('{"text": ["a"]}', "no string but list"),
    "without the field": ('{"txt": "a"}', r"no field 'text'; it has 'txt' \(DataConfig.field names the one to read\)"),
    "an empty object": ("{}", "no field 'text'; it has none"),
    "no object": ('"text"', "it is no JSON object but str"),
    "an array in a line": ('["text"]', "it is no JSON object but list"),
    "cut short": ('{"text": "a', "Unterminated string"),
    "two in a line": ('{"text": "a"}{"text": "b"}', "Extra data"),
    "single quotes": ("{'text': 'a'}", "Expecting property name"),
    "markup": ("<html>", "Expecting value"),
    "too deep": ("[" * 100_000, "recursion|depth"),
}
GOOD = {
    "a number of 5,000 digits": f'{{"n": {"9" * 5000}, "text": "read"}}',
    "a negative one": f'{{"n": [-{"7" * 6000}], "text": "read"}}',
    "NaN elsewhere": '{"n": NaN, "m": -Infinity, "text": "read"}',
    "twice": '{"text": "not", "text": "read"}',
    "space around": ' \t{"text": "read"} \r',
    "a mark in the middle": '\ufeff{"text": "read"}',
    "half a surrogate": '{"x": "\\ud800", "text": "read"}',
}


@pytest.mark.parametrize("packed", ["", ".xz"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_counted_and_left_out_and_the_first_is_named(tmp_path, name, packed):
    line, why = BAD[name]
    data = LINES + f"{line}\n".encode() + LINES.replace(b"document", b"other")
    file = write(tmp_path / f"a.jsonl{packed}", PACKED[packed](data))
    said = []
    config = DataConfig(source=str(file), valid_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    store = prepare(config, said.append)
    where = rf"a\.jsonl{packed}, line at byte {len(LINES)}: .*(?:{why})"
    assert re.search(rf"; 1 unreadable ones too \(.*{where}", said[0], re.DOTALL)
    assert store.manifest["unreadable_documents"] == 1 and len(store.train) + len(store.valid) == 2 * len(TEXTS)

    # The share that may be is 0.1%: 2 of 2,402 are, 3 are not.
    write(file, PACKED[packed](data + f"{line}\n".encode()))
    assert prepare(config).manifest["unreadable_documents"] == 2
    write(file, PACKED[packed](data + f"{line}\n{line}\n".encode()))
    with pytest.raises(DataError, match=rf"(?s)^3 of 2,403 documents are unreadable \(.*{where}.*--max-bad"):
        prepare(config)
    assert prepare(dataclasses.replace(config, max_bad=0.00125)).manifest["unreadable_documents"] == 3


@pytest.mark.parametrize("name", GOOD)
def test_a_line_that_has_its_text_is_read(tmp_path, name):
    file = write(tmp_path / "a.jsonl", LINES + f"{GOOD[name]}\n".encode())
    assert [text.decode() for _, text in read(DataConfig(source=str(file)))] == [*TEXTS, "read"]
    assert not any(isinstance(text, Unreadable) for _, text in read(DataConfig(source=str(file))))


def test_elements_of_an_array_are_left_out_as_lines_are(tmp_path):
    values = [{"text": text} for text in TEXTS]
    file = write(tmp_path / "a.json", json.dumps([*values, None, {"text": None}, "text"]).encode())
    found = read(DataConfig(source=str(file)))
    assert [text.decode() for _, text in found[:-3]] == TEXTS
    assert [text.why.rpartition(", ")[2] for _, text in found[-3:]] == [
        "element 1200: it is no JSON object but NoneType",
        "element 1201: field 'text' is no string but NoneType",
        "element 1202: it is no JSON object but str",
    ]


@pytest.mark.parametrize("packed", [ending for ending in PACKED if ending])
def test_a_download_that_was_cut_short_is_named(tmp_path, packed):
    whole = PACKED[packed](LINES)
    write(tmp_path / f"a.jsonl{packed}", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"Cannot read .*a\.jsonl{packed}: "):
        prepare(DataConfig(source=str(tmp_path / "*.jsonl*"), cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("packed", [ending for ending in PACKED if ending])
def test_shards_that_were_laid_end_to_end_are_all_read(tmp_path, packed):
    pack = PACKED[packed]
    file = write(tmp_path / f"a.jsonl{packed}", pack(LINES) + pack(b'{"text": "last"}\n'))
    assert [text.decode() for _, text in read(DataConfig(source=str(file)))] == [*TEXTS, "last"]
