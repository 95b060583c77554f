"""Files cut at separators, in parts of any size: the same pieces as of the whole."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtp_jax.data.config import DataConfig
from mtp_jax.data.sources import Part, base, split
from mtp_jax.data.sources.files import Files
from mtp_jax.data.sources.text import Text


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@settings(max_examples=400)
@given(
    content=st.lists(st.sampled_from([b"a", b"b", b"\n", b"ab", b"aa", b"\n\n", b"aab"]), max_size=40).map(b"".join),
    separator=st.sampled_from([b"a", b"aa", b"ab", b"aab", b"aba", b"\n\n", b"\n", b"bbbb"]),
    chunk=st.integers(1, 9),
    part_bytes=st.integers(1, 12),
)
@example(content=b"aaaaabaaa", separator=b"aa", chunk=1, part_bytes=1)
def test_pieces_are_those_of_bytes_split(tmp_path_factory, content, separator, chunk, part_bytes):
    file = write(tmp_path_factory.getbasetemp() / "pieces" / "file", content or b"x")
    expected, offset = [], 0
    for piece in file.read_bytes().split(separator):
        expected.append(("file", offset, piece))
        offset += len(piece) + len(separator)
    files = Files(file.parent, ("file",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PART_BYTES", part_bytes)
        patch.setattr(split, "CHUNK", chunk)
        parts = files.parts(Path(), separator)
        found = [piece for part in parts for piece in files.pieces(part, separator)]
    # A part ends with a separator, behind which nothing is left: one empty piece more for each part.
    assert [piece for piece in found if piece[2]] == [piece for piece in expected if piece[2]]
    if parts[0].name:
        assert [part.begin for part in parts[1:]] == [part.end for part in parts[:-1]]
        assert (parts[0].begin, parts[-1].end) == (0, file.stat().st_size)


@settings(max_examples=300)
@given(
    content=st.lists(st.sampled_from([b"a", b"--", b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n"]), max_size=40).map(
        b"".join
    ),
    separator=st.sampled_from([b"\n\n", b"\n", b"--\n", b"\n--\n", b"a\na", b"\n\n\n"]),
    chunk=st.integers(1, 9),
    part_bytes=st.integers(1, 12),
)
def test_a_newline_of_a_separator_is_crlf_or_lf_each_for_itself(
    tmp_path_factory, content, separator, chunk, part_bytes
):
    file = write(tmp_path_factory.getbasetemp() / "ends" / "file.txt", content or b"x")
    plain = file.read_bytes().replace(b"\r\n", b"\n").split(separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PART_BYTES", part_bytes)
        patch.setattr(split, "CHUNK", chunk)
        source = Text(DataConfig("text", str(file), separator=separator.decode()))
        found = [(name, text) for part in source.parts(Path()) for name, text in source.read(part, Path())]
    assert [text.replace(b"\r\n", b"\n") for _, text in found] == [t for p in plain if (t := p.strip(b"\r\n"))]
    for name, text in found:
        begin = int(name.rpartition("@")[2])
        assert file.read_bytes()[begin:].lstrip(b"\r\n").startswith(text)


def test_large_files_are_cut_where_separators_end(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", b"0123|" * 20)
    write(tmp_path / "b.txt", b"12")
    write(tmp_path / "c.txt", b"34")
    monkeypatch.setattr(base, "PART_BYTES", 40)
    files = Files.matching(f"{tmp_path}/*.txt")
    assert files.parts(Path(), b"|") == [
        Part("a.txt", 0, 45),
        Part("a.txt", 45, 90),
        Part("a.txt", 90, 100),
        Part("", 1, 3),
    ]
    assert files.parts(Path()) == [Part("", 0, 1), Part("", 1, 3)]
