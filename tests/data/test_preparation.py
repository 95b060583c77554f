"""Making a token store: never short, whoever makes it and however often it was interrupted."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from mtp_jax.commands import data as data_command
from mtp_jax.commands.tokenizer import train_bpe
from mtp_jax.data import encoding, preparation
from mtp_jax.data.config import DataConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import DataError, base, documents, load_source
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.validate import ConfigError

SEPARATOR = b"<|endoftext|>"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A config of 60 documents in three files, read in many parts."""
    monkeypatch.setattr(base, "PART_BYTES", 200)
    for i in range(3):
        texts = (bytes(range(32 + j, 256, 5)).replace(b"<", b"") * (j % 4) + b"x" for j in range(20))
        (tmp_path / f"{i}.txt").write_bytes(SEPARATOR.join(texts))
    cache = str(tmp_path / "cache")
    return DataConfig("text", f"{tmp_path}/*.txt", valid_fraction=0.2, separator=SEPARATOR.decode(), cache_dir=cache)


def contents(store):
    return [
        (store.manifest["splits"], list(split.names), split.tokens.tobytes()) for split in (store.train, store.valid)
    ]


@pytest.fixture
def expected(corpus, tmp_path):
    return contents(prepare(corpus, out=tmp_path / "expected"))


def test_parts_are_laid_end_to_end(corpus, expected, tmp_path, monkeypatch):
    assert len(load_source(corpus).parts(tmp_path)) > 10
    assert sum(len(names) for _, names, _ in expected) == 60
    monkeypatch.setattr(base, "PART_BYTES", 2**25)
    assert contents(prepare(corpus)) == expected


def test_processes_make_the_store_that_one_makes(corpus, expected, tmp_path):
    seen = []
    store = prepare(corpus, out=tmp_path / "out", processes=2, progress=lambda *counts: seen.append(counts))
    assert contents(store) == expected
    total = len(load_source(corpus).parts(tmp_path))
    assert [done for done, *_ in seen] == list(range(1, total + 1)) and {n for _, n, _ in seen} == {total}
    assert seen[-1][2] == sum(len(text) for _, text in documents(load_source(corpus), tmp_path))


def test_one_makes_a_store_and_others_wait(corpus):
    lines, stores = [], []
    threads = [threading.Thread(target=lambda: stores.append(prepare(corpus, lines.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines) == 1 and len({store.path for store in stores}) == 1 and len(stores) == 4
    assert list(stores[0].path.parent.iterdir()) == [stores[0].path]


KILLED = """
import os, signal, sys
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import documents, load_source
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.data.config import DataConfig
from mtp_jax.data.sources import base

if __name__ == "__main__":
    base.PART_BYTES = 200
    config = DataConfig("text", sys.argv[1], valid_fraction=0.2, separator=sys.argv[2], cache_dir=sys.argv[3])
    def progress(done, total, size):
        if done == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    prepare(config, progress=progress)
"""


def test_what_a_killed_process_leaves_is_continued(corpus, expected, tmp_path, monkeypatch):
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [sys.executable, tmp_path / "killed.py", corpus.files, corpus.separator, corpus.cache_dir]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    tokens = tmp_path / "cache" / "tokens"
    (partial,) = tokens.iterdir()
    assert partial.name.startswith(".") and len(list((partial / "parts").iterdir())) >= 4
    read, source = [], type(load_source(corpus))
    original = source.read
    monkeypatch.setattr(source, "read", lambda self, part, path: read.append(part) or original(self, part, path))
    store = prepare(corpus)
    assert contents(store) == expected
    assert len(read) == len(load_source(corpus).parts(tmp_path)) - 4, "finished parts are not read again"
    assert list(tokens.iterdir()) == [store.path]


def failing(monkeypatch, error, after):
    """Writing a document fails from the one on that comes after so many."""
    divided, count = encoding.divided, [0]

    def fail(*args):
        count[0] += 1
        if count[0] > after:
            raise error
        return divided(*args)

    monkeypatch.setattr(encoding, "divided", fail)
    return lambda: monkeypatch.setattr(encoding, "divided", divided)


def test_a_full_disk_keeps_what_is_finished(corpus, expected, monkeypatch):
    mend = failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), after=25)
    with pytest.raises(DataError, match=r"disk is full.*is kept in .*\.partial: make room, and run it again"):
        prepare(corpus)
    mend()
    assert contents(prepare(corpus)) == expected


def test_documents_that_change_while_they_are_read_are_noticed(corpus, tmp_path, monkeypatch):
    tokenise = preparation._Task.tokenise

    def change(self, *args):
        os.utime(tmp_path / "0.txt", ns=(0, 0))
        return tokenise(self, *args)

    monkeypatch.setattr(preparation._Task, "tokenise", change)
    with pytest.raises(DataError, match="changed while being read"):
        prepare(corpus)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_parts_of_what_the_source_was_before_are_not_used(corpus, tmp_path, monkeypatch):
    mend = failing(monkeypatch, RuntimeError("stop"), after=25)
    with pytest.raises(RuntimeError, match="stop"):
        prepare(corpus, out=tmp_path / "out")
    mend()
    (tmp_path / "0.txt").write_bytes(b"other")
    store = prepare(corpus, out=tmp_path / "out")
    assert len(store.train) + len(store.valid) == 41


def test_a_damaged_part_is_noticed_and_made_again(corpus, expected, tmp_path, monkeypatch):
    join = preparation._Task._join

    def damage(self, *args):
        with (self._part(3) / "train.tokens.bin").open("ab") as file:
            file.write(b"xx")
        return join(self, *args)

    monkeypatch.setattr(preparation._Task, "_join", damage)
    with pytest.raises(DataError, match=r"000003 has \d+ bytes of train tokens and should have \d+.*Run it again"):
        prepare(corpus)
    monkeypatch.setattr(preparation._Task, "_join", join)
    assert contents(prepare(corpus)) == expected


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt"])
def test_bytes_that_are_not_utf8_are_kept_by_bytes_and_counted_by_others(tmp_path, ending):
    texts = [b"good", b"b\xffd", b"\xc3\xa9\xc3", b"other"]
    if ending == "jsonl":
        (tmp_path / "d.jsonl").write_bytes(b"".join(b'{"text": "' + text + b'"}\n' for text in texts))
    elif ending == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        column = pa.Array.from_buffers(pa.string(), 4, pa.array(texts, pa.binary()).buffers())
        pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    else:
        (tmp_path / "d.txt").write_bytes(b"|".join(texts))
    separator = "|" if ending == "txt" else ""
    config = DataConfig(f"{tmp_path}/d.{ending}", separator=separator, valid_fraction=0.5, cache_dir=f"{tmp_path}/c")
    (tmp_path / "bpe.json").write_bytes(train_bpe(iter(["good other"]), 257))
    for tokenizer, expected, replaced in (
        ("bytes", texts, 0),
        (f"hf:{tmp_path}/bpe.json", [text.decode("utf-8", "replace").encode() for text in texts], 2),
    ):
        store = prepare(dataclasses.replace(config, tokenizer=tokenizer))
        decode = store.tokenizer().decode_bytes
        assert sorted(decode(part[i]) for part in (store.train, store.valid) for i in range(len(part))) == sorted(
            expected
        )
        assert store.manifest["replaced_characters"] == replaced


def test_empty_documents_and_bad_characters_are_counted(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("", "a", "b", "", "c", "d", "e", "f", "g", "h")]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    said = []
    config = DataConfig("jsonl", f"{tmp_path}/d.jsonl", valid_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    store = prepare(config, said.append)
    assert store.manifest["empty_documents"] == 2 and "2 empty documents left out" in said[0]
    assert len(store.train) + len(store.valid) == 8


# A store of the user's own


def test_what_data_prepare_prints_trains_twice(corpus, tmp_path, monkeypatch):
    """By the directory's plain name, and again with the run's own config, which has it split up."""
    monkeypatch.chdir(tmp_path)
    store = prepare(corpus, out="mine")
    config = DataConfig("mine", valid_fraction=0.2)
    assert (config.source, config.files) == ("store", "mine") and prepare(config).sha256 == store.sha256
    assert dataclasses.replace(config, source="mine") == config
    glob = DataConfig("*.txt")
    assert dataclasses.replace(glob, source="*.txt") == glob


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"splits": {"train": 1}}', '{"format": 1, "splits": {}}'])
def test_another_programs_manifest_is_no_store(corpus, tmp_path, manifest):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match="other is damaged, or is none"):
        prepare(DataConfig(f"{tmp_path}/other"))


def test_a_store_of_another_format_is_refused(corpus, tmp_path):
    file = prepare(corpus, out=tmp_path / "old").path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(ConfigError, match=r"made with format 1, and asked for is \d\. Prepare it again"):
        prepare(DataConfig(f"{tmp_path}/old", valid_fraction=0.2))


def test_a_store_is_trained_on_by_its_directory(corpus, expected, tmp_path):
    config = DataConfig("store", str(tmp_path / "expected"), valid_fraction=0.2)
    assert contents(prepare(config)) == expected


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(valid_fraction=0.3),
            r"made with valid_fraction 0\.2, and asked for is 0\.3\. Change DataConfig\.valid",
        ),
        (dict(files="nowhere"), r"The token store .*nowhere is damaged, or is none .*manifest\.json"),
    ],
)
def test_a_store_that_does_not_fit_its_config_is_refused(corpus, expected, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        prepare(DataConfig(**{"source": "store", "files": f"{tmp_path}/expected", "valid_fraction": 0.2, **changes}))


def test_a_directory_is_made_once_and_never_replaced(corpus, expected, tmp_path):
    lines = []
    assert contents(prepare(corpus, lines.append, out=tmp_path / "expected")) == expected and not lines
    other = DataConfig(**{**vars(corpus), "valid_fraction": 0.5})
    with pytest.raises(ConfigError, match=r"made with valid_fraction 0\.2, and asked for is 0\.5"):
        prepare(other, out=tmp_path / "expected")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"mine is damaged, or is none .* if it is none, name another directory"):
        prepare(corpus, out=tmp_path / "mine")


# The commands


def test_files_become_a_store_that_can_be_looked_into(corpus, tmp_path, capsys):
    out = tmp_path / "store"
    arguments = ["prepare", "--source", corpus.files, "--separator", corpus.separator, "--out", str(out)]
    arguments += ["--valid-fraction", "0.2", "--processes", "1"]
    data_command.main(arguments)
    said = capsys.readouterr().out
    assert f"in {out}" in said and f"Train on it: --data.source {out} --data.valid-fraction 0.2\n" in said
    data_command.main(arguments)
    assert "was prepared before" in capsys.readouterr().out
    data_command.main(["show", str(out), "--batch-size", "2", "--seq-len", "60"])
    shown = capsys.readouterr().out
    store = Store.open(out)
    assert f"train: {len(store.train):,} documents, {len(store.train.tokens):,} tokens" in shown
    assert f"Document 0: {store.train.names[0]}" in shown and "Batch 0" in shown and "¶" in shown
    assert all(f"[{row}] " in shown for row in range(2))


@pytest.mark.parametrize(
    "source, named",
    [
        ("stories/*.txt", ("text", "stories/*.txt")),
        ("a/b.jsonl", ("jsonl", "a/b.jsonl")),
        ("a/*.jsonl.gz", ("jsonl", "a/*.jsonl.gz")),
        ("x.parquet", ("parquet", "x.parquet")),
        ("stdlib", ("stdlib", "")),
    ],
)
def test_the_ending_of_a_glob_tells_its_source(source, named):
    config = data_command.Prepare(source=source, out="out").config()
    assert (config.source, config.files) == named


def test_the_histogram_counts_every_document_once():
    text = data_command.histogram(np.array([1, 2, 3, 4, 5, 100]))
    assert sum(int(line.split()[-2 if "█" in line else -1]) for line in text.splitlines()) == 6


def test_marks_say_where_windows_end():
    store = ByteTokenizer()
    batch = {
        "tokens_BT": [[104, 105, 256, 111, 107]],
        "valid_BTW": np.array([[[1, 1], [1, 0], [0, 0], [1, 1], [1, 1]]]),
    }
    assert data_command._marked(batch, 0, store, 2) == "hi₁¶\n    ok"


# Memory

WORDS = "cat sat on a mat and saw one red bird that sang of far green hills by night".split()  # noqa: SIM905


def write_stories(path, size):
    """About `size` bytes of stories that are all different, as text with separators."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        while file.tell() < size:
            lengths = rng.integers(50, 400, 2000)
            words = iter(rng.integers(0, len(WORDS), lengths.sum()))
            file.write("".join(" ".join(WORDS[next(words)] for _ in range(n)) + "<|endoftext|>" for n in lengths))


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer, size", [("bytes", 10**9), ("bpe", 10**8)])
def test_a_large_source_is_prepared_in_little_memory(tmp_path, tokenizer, size):
    """At most 500 MB for a source of 1 GB: a part at a time. The BPE, a tenth as fast, reads as many parts at once."""
    stories = tmp_path / "stories.txt"
    write_stories(stories, size)
    command = [sys.executable, "-m", "mtp_jax", "data", "prepare", "--source", str(stories), "--separator"]
    command += ["<|endoftext|>", "--out", str(tmp_path / "store"), "--processes", "1"]
    if tokenizer == "bpe":
        with stories.open() as file:
            sample = file.read(10**6).split("<|endoftext|>")
        (tmp_path / "bpe.json").write_bytes(train_bpe(iter(sample), 1024))
        command += ["--tokenizer", f"hf:{tmp_path}/bpe.json"]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and usage.ru_maxrss * 1024 < 500e6
    assert Store.open(tmp_path / "store").manifest["splits"]["train"]["tokens"] > size / 8
