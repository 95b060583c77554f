"""Paths as people have them: brackets, wildcards, spaces, colons, commas; globs that match files of several kinds."""

import dataclasses
import gzip
import json
import os
import pickle
import re
import shlex
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from mtp_jax import cli
from mtp_jax.data.config import DataConfig, SourceConfig
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.preparation import prepare
from mtp_jax.data.prompts import file_prompts
from mtp_jax.data.sources import DataError, documents, load_source
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.validate import ConfigError

NAMES = [
    "lr[0.1]",
    "what?",
    "all*",
    "two words",
    "3:weights",
    "2:a,1:b",
    "a,b",
    "text:c",
    "данные",
    "~me",
    "-x",
    "a.b#c",
]
STORIES = [f"story {i} of a few words" for i in range(30)]


def read(source, **options):
    return [text.decode() for _, text in documents(load_source(DataConfig(source=source, **options)), Path("nowhere"))]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("where", ["./", "{}/", ""])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_there_is_read_whatever_its_name_could_mean(home, name, where):
    if not where and not re.search(r"[^\w-]", name):
        pytest.skip("a name with neither a slash nor a dot is that of a source")
    where = where.format(home)
    decoys = ["lr0", "lr1", "whats", "all", "allx"]
    for decoy in decoys:
        (home / decoy).write_text("decoy")
        (home / f"{decoy}.jsonl").write_text('{"text": "decoy"}\n')
    (home / name).write_text("whole file")
    (home / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(f"{where}{name}") == ["whole file"]
    assert read(f"{where}{name}.jsonl") == ["one", "two"]
    assert read(f"jsonl:{where}{name}.jsonl") == ["one", "two"]
    assert read("jsonl", files=f"{where}{name}.jsonl") == ["one", "two"]
    ((found, tokens),) = file_prompts(f"{where}{name}", load_tokenizer("bytes"), 1, 5)
    assert found == name and bytes(tokens.tolist()) == b"whole"


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_that_is_there_wins(home, name):
    """As one with files, as the one to make, as what trains, and as a part of a mixture."""
    for decoy in ("lr0", "whats", "all"):
        (home / decoy).mkdir()
        (home / decoy / "x.txt").write_text("decoy")
    (home / name / "inner[1]").mkdir(parents=True)
    for i, story in enumerate(STORIES):
        (home / name / f"{i:02}.txt").write_text(story)
        (home / name / "inner[1]" / f"{i:02}.txt").write_text(story + "!")
    assert read(f"{name}/*.txt") == read(f"{home}/{name}/*") == STORIES
    assert read(f"{name}/inner[1]/*.txt") == [f"{story}!" for story in STORIES]
    assert read(f"{name}/inner[1]/07.txt") == ["story 7 of a few words!"]
    with pytest.raises(ConfigError, match=r"a directory that `mtp-jax data prepare` did not make.*\*'"):
        DataConfig(source=f"./{name}")

    stores = [home / "made" / name, home / f"{name} too"]
    for store in stores:
        prepare(DataConfig(source=f"{name}/*", valid_fraction=0.3), out=store)
    os.chdir(home / "made")
    config = DataConfig(source=name, valid_fraction=0.3)
    assert (config.source, config.files) == ("store", name) and prepare(config).path == Path(name)
    if ",1:" in name:
        return  # within a mixture these are two parts
    mixture = DataConfig(source=f"3:{name}, 1:{stores[1]},0.5:./{name}", valid_fraction=0.3)
    found = prepare(mixture)
    assert isinstance(found, Mixture) and [store.path for store in found.stores] == [Path(name), stores[1], Path(name)]
    assert dataclasses.replace(mixture, seed=1).files == mixture.files
    assert DataConfig(**vars(config)) == config, "a run's own config is read again"


@pytest.mark.parametrize("name", NAMES)
def test_what_data_prepare_prints_is_taken_as_it_is_printed(home, name, capsys):
    for i, story in enumerate(STORIES):
        (home / f"{i}.txt").write_text(story)
    out = name if not name.startswith("-") else f"./{name}"
    cli.main(["data", "prepare", "--source", "*.txt", "--valid-fraction", "0.3", "--processes", "1", "--out", out])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Train on it: "))
    given = {
        flag.removeprefix("--data.").replace("-", "_"): value for flag, value in zip(*[iter(words)] * 2, strict=True)
    }
    config = DataConfig(given.pop("source"), valid_fraction=float(given.pop("valid_fraction")))
    assert not given and config.source == "store" and len(prepare(config).train) > 10


def test_a_mixture_of_what_is_not_there_names_the_part(home):
    with pytest.raises(ConfigError, match=r"'3:one,two' is not WEIGHT:DIRECTORY"):
        prepare(DataConfig("3:one,two,1:three"))


def test_a_name_of_a_source_is_one_unless_its_store_is_there(home):
    for name in ("text", "stdlib", "mine"):
        (home / name).mkdir()
    (home / "notes").write_text("a note")
    assert DataConfig().source == DataConfig("stdlib").source == "stdlib"
    assert DataConfig("text", "*.md").files == "*.md"
    with pytest.raises(ConfigError, match=r"is 'mine', which is no source's name but is there; give 'mine/\*'"):
        load_source(SourceConfig("mine"))
    with pytest.raises(ConfigError, match=r"is 'notes', .* give '\./notes'"):
        load_source(SourceConfig("notes"))
    assert read("./notes") == ["a note"]
    (home / "text" / "manifest.json").write_text("{}")
    assert DataConfig("text").source == "store" and DataConfig("text", "*.md").source == "text"


# Globs that end in a wildcard


@pytest.mark.parametrize("glob", ["*", "part-*", "part-0*", "*.j*", "part-?.jsonl*", "*.gz", "[a-z]*", "**/*"])
def test_a_glob_that_says_no_ending_takes_that_of_its_files(home, glob):
    line = b'{"text": "one"}\n'
    (home / "data").mkdir()
    (home / "data" / "part-0.jsonl.gz").write_bytes(gzip.compress(line))
    if glob != "*.gz":
        (home / "data" / "part-1.JSON").write_bytes(line)
    assert set(read(f"data/{glob}")) == {"one"}
    assert DataConfig(f"data/{glob}").source == "jsonl"


@pytest.mark.parametrize("others", [{"b.jsonl": "{}"}, {"b.parquet": "PAR1"}, {"b.json": "{}", "c.md": "x"}])
def test_files_of_several_kinds_are_refused_by_name_with_a_way_out(home, others):
    for name, text in {"a.txt": "a note", **others}.items():
        (home / name).write_text(text)
    with pytest.raises(
        ConfigError, match=rf"several kinds: text \('a\.txt'\), .*\('{next(iter(others))}'\).*'text:\*'"
    ):
        DataConfig("*")
    assert DataConfig("*.txt").source == "text" and "a note" in read("text:*")


def test_text_of_endings_that_nobody_knows_is_text(home):
    for name in ("README", "a.py", "b.md", "c.rst", "d.2024"):
        (home / name).write_text("text")
    assert read("./*") == ["text"] * 5


# What is no text

FLOATS = np.random.default_rng(0).standard_normal(4000).astype(np.float32).tobytes()
BINARY = {
    "array.dat": FLOATS,
    "tokens.u16": np.arange(4000, dtype=np.uint16).tobytes(),
    "small.u32": np.arange(65, 80, dtype=np.uint32).tobytes(),
    "objects.p": pickle.dumps({"text": ["a long text " * 100] * 50}),
    "deflated.z": zlib.compress(os.urandom(3000)),
    "squeezed": zlib.compress(b"some text that is quite long " * 3 + bytes(range(60))),
    "picture.jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01" + FLOATS[:900],
    "picture.webp": b"RIFF" + struct.pack("<I", 900) + b"WEBPVP8 " + FLOATS[:900],
    "archive.cpio": b"a name".ljust(100, b"\0") + b"and then text, line after line\n" * 400,
    "weights.gguf": b"GGUF\x03\x00\x00\x00" + b"general.architecture" * 100,
    "wide": "wide characters, no mark in front".encode("utf-16-le"),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("source", ["text:", "jsonl:", "", "*"])
@pytest.mark.parametrize("name", BINARY)
def test_what_is_no_text_is_refused_by_name_before_anything_is_tokenised(home, name, source, packed, monkeypatch):
    monkeypatch.setattr("mtp_jax.data.preparation._Task.tokenise", lambda *args: pytest.fail("tokenised"))
    (home / "a").write_text("text")
    (home / (name + packed)).write_bytes(gzip.compress(BINARY[name]) if packed else BINARY[name])
    given = "*" if source == "*" else f"{source}{home}/{name}{packed}"
    with pytest.raises(DataError, match=rf"/?{name}{packed} is no text: its first [\d,]+ bytes have NUL"):
        prepare(DataConfig(given, cache_dir=str(home / "cache")))


@pytest.mark.parametrize("ending", ["bin", "npz", "pt", "pkl", "h5", "png", "zip", "csv", "PARQUET.gz", "txt.gz.xz"])
@pytest.mark.parametrize("glob", ["x.{}", "*.{}", "*"])
def test_what_cannot_be_read_by_its_ending_is_refused_before_it_is_opened(home, ending, glob):
    (home / f"x.{ending}").write_text("whatever it holds")
    with pytest.raises(ConfigError, match=rf"'[x*]\.{ending}', by its ending .*is nothing that is read.*say 'text:"):
        DataConfig(glob.format(ending))
    assert DataConfig(f"text:{glob.format(ending)}").source == "text"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "koi8-r", "shift-jis", "gb18030", "euc-kr"]
)
def test_text_of_any_other_encoding_is_text(home, encoding):
    words = {"koi8-r": "Слово за словом\n", "shift-jis": "日本語の文\n", "gb18030": "中文句子\n", "euc-kr": "한국어\n"}
    text = words.get(encoding, "naïve façade\n") * 2000 + "\f\b\x1b[1m\x1a"
    (home / "a.txt").write_bytes(data := text.encode(encoding))
    ((_, found),) = documents(load_source(DataConfig("a.txt")), home)
    assert found == data.removeprefix(b"\xef\xbb\xbf")


def test_utf16_is_named_with_what_makes_it_utf8(home):
    for name, line in (("a.txt", "text"), ("a.jsonl", json.dumps({"text": "text"}))):
        (home / name).write_bytes(line.encode("utf-16"))
        with pytest.raises(DataError, match=rf"{name} is UTF-16; make it UTF-8 \(iconv -f UTF-16 -t UTF-8\)"):
            prepare(DataConfig(name))
