"""Held-out split: by the hash of documents, or inside of them where they are too few."""

import dataclasses
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtp_jax import cli
from mtp_jax.data.batches import batches, held_out_batches
from mtp_jax.data.config import DataConfig
from mtp_jax.data.held_out import divided, is_held_out, is_one_sided
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import base
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.validate import ConfigError

LINES = "".join(f"line {i} of one long story\n" for i in range(1000)).encode()


def config(tmp_path, source, **options):
    return DataConfig(source=str(tmp_path / source), cache_dir=str(tmp_path / "cache"), **options)


def texts(split):
    """The bytes of a split's documents, without the end that each has."""
    return {split.names[i]: bytes(split[i][:-1].astype(np.uint8)) for i in range(len(split))}


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("name", ["book.txt", "book.md.gz", "book.jsonl", "book.json"])
def test_one_document_has_its_end_held_out(tmp_path, name, fraction):
    line = json.dumps({"text": LINES.decode()})
    data = {".txt": LINES, ".gz": gzip.compress(LINES), ".jsonl": line.encode(), ".json": f"[{line}]".encode()}
    (tmp_path / name).write_bytes(data[Path(name).suffix])
    said = []
    store = prepare(config(tmp_path, name, valid_fraction=fraction), said.append)
    (train, valid), (held_out,) = (*texts(store.train).items(), *texts(store.valid).items()), texts(store.valid)
    assert train[1] + valid[1] == LINES and train[1].endswith(b"\n")
    assert held_out == f"{train[0]}@{len(train[1])}"
    assert abs(len(valid[1]) - fraction * len(LINES)) < 30
    assert f"held out is the end of each document (the last {fraction:g} of its bytes)" in said[0]
    assert prepare(config(tmp_path, name, valid_fraction=fraction), said.append).path == store.path and len(said) == 1
    sizes = {"seq_len": 16, "window": 4, "batch_size": 2}
    assert next(batches(store.train, seed=0, **sizes))["tokens_BT"].shape == (2, 16)
    assert next(iter(held_out_batches(store.valid, **sizes)))["tokens_BT"].shape == (2, 16)


def test_a_separator_that_a_file_does_not_have_leaves_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES)
    store = prepare(config(tmp_path, "a.txt", separator="<|endoftext|>"))
    assert list(store.valid.names) == ["a.txt@0@" + str(len(texts(store.train)["a.txt@0"]))]


def test_few_documents_have_their_ends_held_out_and_many_are_whole(tmp_path):
    few = [text for i in range(99) if not is_held_out(text := LINES + b"%d" % i, 0.05)][:3]
    for i, text in enumerate(few):
        (tmp_path / f"few{i}.txt").write_bytes(text)
    store = prepare(config(tmp_path, "few*.txt"))
    train, valid = texts(store.train), texts(store.valid)
    assert list(train) == ["few0.txt", "few1.txt", "few2.txt"]
    assert [train[name.split("@")[0]] + end for name, end in valid.items()] == few

    # One on the other side, and they are what they were, each whole.
    (tmp_path / "few3.txt").write_bytes(next(t for i in range(999) if is_held_out(t := b"other %d" % i, 0.05)))
    said = []
    store = prepare(config(tmp_path, "few*.txt"), said.append)
    assert list(store.valid.names) == ["few3.txt"] and list(texts(store.train).values()) == few
    assert "held out is" not in said[0]


def test_processes_divide_documents_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 1000)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(LINES[i:])
    data = config(tmp_path, "*.txt", valid_fraction=0.001)
    one, two = (prepare(data, out=tmp_path / f"out{n}", processes=n) for n in (1, 2))
    assert one.manifest == two.manifest and list(one.valid.names) == list(two.valid.names) and len(one.valid) == 3


def test_a_source_of_a_mixture_may_be_one_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_bytes(name.encode() + LINES)
        prepare(config(tmp_path, f"{name}.txt"), out=tmp_path / name)
    mixed = prepare(DataConfig(f"2:{tmp_path}/one,1:{tmp_path}/two"))
    assert [name.split("@")[0] for name in mixed.valid.names] == ["one.txt", "two.txt"]


def test_a_document_too_short_for_its_share_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"split has no documents.*change DataConfig\.valid_fraction, or give"):
        prepare(config(tmp_path, "a.txt", valid_fraction=0.01))


def test_documents_are_read_only_until_both_sides_have_some():
    read = []
    stream = (read.append(i) or b"%d" % i for i in range(10**9))
    assert not is_one_sided(stream, 0.5) and len(read) < 30
    assert is_one_sided([b"", b"a", b"", b"a"], 0.5) and is_one_sided([], 0.5)


@given(
    st.lists(st.sampled_from([b"\n", b"a" * 40, b"\r\n", "é".encode(), "漢字".encode(), b"word "]), min_size=1),
    st.floats(0.01, 0.99),
)
@example([b"title\n", b"a" * 400], 0.05)
@example(["漢".encode()], 0.5)
def test_a_cut_leaves_two_sides_near_their_shares(parts, fraction):
    text = b"".join(parts)
    found = list(divided("name", text, fraction, inside=True))
    assert b"".join(part for *_, part in found) == text
    if len(found) == 1:
        assert round(fraction * len(text)) in (0, len(text)) or round((1 - fraction) * len(text)) < 3
        return
    (_, name, train), (_, held_out, valid) = found
    share = round(fraction * len(text))
    assert name == "name" and held_out == f"name@{len(train)}" and [split for split, *_ in found] == ["train", "valid"]
    if train.endswith(b"\n"):
        assert len(train) * 2 >= len(text) - share and len(valid) * 2 >= share
    else:
        assert share <= len(valid) <= share + 3
        assert not re.search(rb"\n", text[(len(text) - share) // 2 : len(text) - share // 2 - 1])
    assert train.decode() + valid.decode() == text.decode()


def test_a_tokenizer_does_not_learn_from_the_end_that_is_held_out(tmp_path, capsys):
    seen, unseen = b"trainingword of the story\n" * 900, b"heldoutword of the story\n" * 100
    (tmp_path / "book.txt").write_bytes(seen + unseen)
    out, source = tmp_path / "t.json", ["--source", str(tmp_path / "book.txt"), "--valid-fraction", "0.1"]
    cli.main(["tokenizer", "train", *source, "--vocab-size", "330", "--out", str(out)])
    line = capsys.readouterr().out
    size = int(re.search(r"Trained on 1 documents of ([\d,]+) bytes", line)[1].replace(",", ""))
    assert abs(size - 0.9 * len(seen + unseen)) < 30 and "on 1 held-out documents" in line
    store = prepare(dataclasses.replace(config(tmp_path, "book.txt", valid_fraction=0.1), tokenizer=f"hf:{out}"))
    tokenizer = load_tokenizer(f"hf:{out}")
    assert len(tokenizer.decode_bytes(store.train[0])) == size, "training reads what the tokenizer was made of"
    assert not any(b"heldout" in tokenizer.decode_bytes([i]) for i in range(330))
