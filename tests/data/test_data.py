"""Documents to batches: every token where it belongs, once, whatever the number of hosts."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.data.batches import Sequences, held_out_batches
from mtp_jax.data.config import DataConfig
from mtp_jax.data.held_out import is_held_out
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import documents as documents_of
from mtp_jax.data.sources import load_source
from mtp_jax.data.store import Documents
from mtp_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from mtp_jax.validate import ConfigError
from support.documents import assert_same, join, make_batches, make_documents, make_held_out_batches


@pytest.fixture
def corpus(tmp_path):
    """A config of forty small files, some of them empty or not UTF-8."""
    for i in range(40):
        file = tmp_path / "corpus" / f"part{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"" if i == 7 else bytes(range(32 + i, 256, 3)) * (i + 1))
    return DataConfig(
        source="text", files=f"{tmp_path}/corpus/**/*.txt", valid_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


# Tokenizers


@given(st.binary())
def test_bytes_survive_the_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and len(ids) == len(text)
    assert tokenizer.decode_bytes(ids) == text
    assert tokenizer.decode(ids) == text.decode("utf-8", "replace")


@given(st.text())
def test_text_survives_the_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_skips_special_and_unknown_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([104, tokenizer.end_of_document, 105, tokenizer.vocab_size + 3, -1]) == "hi"
    assert tokenizer.decode([]) == ""
    assert tokenizer.end_of_document == 256 and tokenizer.vocab_size == 257
    assert json.loads(json.dumps(tokenizer.to_json())) == {"name": "bytes"}


# Mistakes are answered with the way out


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"DataConfig.tokenizer is 'byte'; did you mean 'bytes'\?"):
        load_tokenizer("byte")
    with pytest.raises(
        ConfigError, match=r"DataConfig.source is 'stdlb'; did you mean 'stdlib'\? It can be jsonl, .*, stdlib, text"
    ):
        prepare(DataConfig(source="stdlb"))
    with pytest.raises(ConfigError, match="bytes takes no argument"):
        load_tokenizer("bytes:utf-8")


def test_a_glob_without_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing/\*\.txt' and no file matches"):
        prepare(DataConfig(source="text", files=f"{tmp_path}/nothing/*.txt", cache_dir=str(tmp_path)))


def test_an_interpreter_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"no \.py file in .*--data.source text"):
        prepare(DataConfig(cache_dir=str(tmp_path)))


def test_a_cache_that_cannot_be_written_is_refused(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(ConfigError, match=r"cannot be written.*--data\.cache-dir"):
        prepare(corpus)


def test_an_empty_split_is_refused():
    empty = Documents("valid", np.empty(0, np.uint16), np.zeros(1, np.int64), [])
    for refused in (lambda: make_batches(empty, 1), lambda: make_held_out_batches(empty), empty.require_some):
        with pytest.raises(ConfigError, match=r"valid split has no documents.*valid_fraction"):
            refused()


@pytest.mark.parametrize("fraction, split", [(1e-9, "valid"), (1 - 1e-9, "train")])
def test_a_fraction_that_leaves_a_split_empty_is_refused_each_time(corpus, fraction, split):
    """Also by whoever finds the store made."""
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"The {split} split has no documents.*valid_fraction"):
            prepare(dataclasses.replace(corpus, valid_fraction=fraction))


def test_hosts_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="4 sequences and there are 3 hosts"):
        make_batches(make_documents([5]), 1, shard=(0, 3))
    with pytest.raises(ConfigError, match="index"):
        make_batches(make_documents([5]), 1, shard=(2, 2))


# The store


def test_a_store_holds_every_document_once(corpus):
    store = prepare(corpus)
    tokenizer = load_tokenizer(corpus.tokenizer)
    originals = dict(documents_of(load_source(corpus), store.path))
    assert len(originals) == 40 and "part0/0.txt" in originals
    assert set(store.train.names).isdisjoint(store.valid.names)
    assert {*store.train.names, *store.valid.names} == {name for name, text in originals.items() if text}
    for split, documents in (("train", store.train), ("valid", store.valid)):
        assert store.manifest["splits"][split]["documents"] == len(documents) == len(documents.names)
        assert store.manifest["splits"][split]["tokens"] == len(documents.tokens)
        assert documents.tokens.dtype == np.uint16 and list(documents.names) == sorted(documents.names)
        for i, name in enumerate(documents.names):
            ids = documents[i]
            assert ids.dtype == np.int32 and ids[-1] == tokenizer.end_of_document
            assert tokenizer.decode_bytes(ids) == originals[name]
            assert is_held_out(originals[name], corpus.valid_fraction) == (split == "valid")


def test_a_store_is_made_once(corpus):
    lines = []
    store = prepare(corpus, lines.append)
    assert len(lines) == 1 and "train documents" in lines[0] and str(store.path) in lines[0]
    assert prepare(corpus, lines.append).path == store.path and len(lines) == 1


def test_what_a_store_depends_on_gives_another_store(corpus, tmp_path):
    paths = {prepare(corpus).path}
    paths.add(prepare(DataConfig(**{**vars(corpus), "valid_fraction": 0.3})).path)
    file = tmp_path / "corpus" / "part0" / "0.txt"
    os.utime(file, ns=(0, 0))
    paths.add(prepare(corpus).path)
    file.write_bytes(b"longer" * 100)
    paths.add(prepare(corpus).path)
    file.rename(file.with_name("renamed.txt"))
    paths.add(prepare(corpus).path)
    assert len(paths) == 5


def test_the_hash_of_a_store_is_that_of_its_training_tokens(corpus, tmp_path):
    store = prepare(corpus)
    assert store.sha256 == hashlib.sha256((store.path / "train.tokens.bin").read_bytes()).hexdigest()
    train, valid = (tmp_path / "corpus" / documents.names[0] for documents in (store.train, store.valid))
    # Neither a touched file nor another held-out document changes the batches.
    os.utime(train, ns=(0, 0))
    valid.write_bytes(next(text for i in range(99) if is_held_out(text := b"other%d" % i, corpus.valid_fraction)))
    same = prepare(corpus)
    assert same.path != store.path and same.sha256 == store.sha256
    train.write_bytes(b"another")
    assert prepare(corpus).sha256 != store.sha256


def test_a_damaged_store_is_refused(corpus):
    path = prepare(corpus).path
    with (path / "train.tokens.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train\.tokens\.bin has \d+ bytes and should have \d+.*delete it"):
        prepare(corpus)
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"damaged.*manifest\.json.*delete it"):
        prepare(corpus)


def test_the_split_depends_on_the_content_alone(corpus, tmp_path):
    texts = [f"module{i}.py".encode() for i in range(2000)]
    held_out = {text for text in texts if is_held_out(text, 0.1)}
    assert 150 < len(held_out) < 250
    assert held_out < {text for text in texts if is_held_out(text, 0.2)}
    assert sorted(held_out)[:3] == [b"module1004.py", b"module1007.py", b"module101.py"]
    # A copy lies on the side of its original, whatever it is called.
    for documents in (store := prepare(corpus)).train, store.valid:
        for name in documents.names:
            shutil.copy(tmp_path / "corpus" / name, tmp_path / "corpus" / f"copy-of-{name.replace('/', '-')}.txt")
    both = prepare(corpus)
    for one, two in ((store.train, both.train), (store.valid, both.valid)):
        assert len(two) == 2 * len(one) > 0
        assert {two[i].tobytes() for i in range(len(two))} == {one[i].tobytes() for i in range(len(one))}


# The standard library

PREPARE = """
import json, sys
from mtp_jax.data.batches import Sequences, batches, held_out_batches
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import load_source
from mtp_jax.data.store import Documents
from mtp_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from mtp_jax.data.config import DataConfig
imported = [name for name in ("jax", "grain", "tensorflow_datasets") if name in sys.modules]
store = prepare(DataConfig(cache_dir=sys.argv[1]))
next(batches(store.train, seq_len=8, window=2, batch_size=2, seed=0))
print(json.dumps([imported, "tensorflow" in sys.modules, store.manifest, str(store.path)]))
"""


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """The cache that two processes have prepared at once, and what each of them printed."""
    cache = tmp_path_factory.mktemp("stdlib")
    command = [sys.executable, "-c", PREPARE, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return cache, [json.loads(output) for output in outputs]


def test_the_standard_library_is_prepared_by_two_processes_at_once(stdlib):
    cache, (first, second) = stdlib
    assert first == second
    imported, tensorflow, manifest, path = first
    assert not imported, "importing mtp_jax.data imports what it may not need"
    assert not tensorflow
    assert manifest["splits"]["train"]["tokens"] > 4_000_000
    assert os.listdir(cache / "tokens") == [os.path.basename(path)]


def test_the_standard_library_is_real_code(stdlib):
    cache, _ = stdlib
    store = prepare(DataConfig(cache_dir=str(cache)), log=pytest.fail)
    names = [*store.train.names, *store.valid.names]
    assert len(names) == len(set(names)) > 300 and len(store.valid) > 5
    assert "json/decoder.py" in names and "asyncio/tasks.py" in names
    assert not {"test", "tests", "site-packages"} & {part for name in names for part in name.split("/")}
    dataclasses = store.train[list(store.train.names).index("dataclasses.py")]
    original = Path(sysconfig.get_path("stdlib"), "dataclasses.py").read_bytes()
    assert ByteTokenizer().decode_bytes(dataclasses) == original


def test_the_second_to_finish_a_tfds_data_set_takes_the_first_ones(tmp_path, monkeypatch):
    from mtp_jax.data.sources import builder
    from mtp_jax.data.sources.files import Files

    (tmp_path / "a.py").write_bytes(b"\xff = 1")
    arguments = (Files(tmp_path, ("a.py",)), tmp_path / "tfds")
    generate = builder.LocalDocuments._generate_examples

    def generate_after_another(self):
        monkeypatch.setattr(builder.LocalDocuments, "_generate_examples", generate)
        builder.prepared(*arguments)
        yield from generate(self)

    monkeypatch.setattr(builder.LocalDocuments, "_generate_examples", generate_after_another)
    assert list(builder.prepared(*arguments)) == [{"name": b"a.py", "text": b"\xff = 1"}]


# Training batches


def brute_force(documents, order, start, seq_len, window):
    """One sequence, by walking the concatenation token by token. `order` lists the documents of all epochs."""
    place = [(int(token), number) for number, i in enumerate(order) for token in range(*documents.offsets[i : i + 2])]
    tokens, targets, valid, segments = [], [], [], []
    for t in range(start, start + seq_len):
        ahead = place[t + 1 : t + 1 + window]
        tokens.append(place[t][0])
        targets.append([token for token, _ in ahead])
        valid.append([number == place[t][1] for _, number in ahead])
        segments.append(place[t][1] - place[start][1])
    return {"tokens_BT": tokens, "targets_BTW": targets, "valid_BTW": valid, "segments_BT": segments}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seq_len=st.integers(1, 12),
    window=st.integers(1, 5),
    seed=st.integers(-(2**63), 2**63 - 1),
    numbers=st.lists(st.integers(0, 12), min_size=1, max_size=4),
)
def test_sequences_are_those_of_the_endless_string(lengths, seq_len, window, seed, numbers):
    documents = make_documents(lengths)
    sequences = Sequences(documents, seq_len=seq_len, window=window, seed=seed)
    epochs = 2 + (13 * seq_len + window) // len(documents.tokens)
    orders = [sequences._epoch(epoch)[0] for epoch in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(len(lengths)))
    batch = sequences.read(np.array(numbers))
    types = {"tokens_BT": np.int32, "targets_BTW": np.int32, "valid_BTW": np.bool_, "segments_BT": np.int32}
    assert {name: array.dtype for name, array in batch.items()} == types
    for row, number in enumerate(numbers):
        expected = brute_force(documents, np.concatenate(orders), number * seq_len, seq_len, window)
        for name, array in batch.items():
            np.testing.assert_array_equal(array[row], expected[name])


def test_shuffling_only_moves_sequences_within_an_epochs_worth():
    documents = make_documents([7, 1, 20, 13, 30, 2])
    sequences = Sequences(documents, seq_len=4, window=2, seed=0)
    count = len(documents.tokens) // 4
    order = sequences.shuffle(np.arange(3 * count)).reshape(3, count)
    np.testing.assert_array_equal(np.sort(order), np.arange(3 * count).reshape(3, count))
    assert len({tuple(row % count) for row in order}) == 3
    # A batch is what the shuffled places read, so every token of the endless string is used once.
    batch = make_batches(documents, 2, seq_len=4, window=2, batch_size=4)[1]
    np.testing.assert_array_equal(batch["tokens_BT"], sequences.read(order.ravel()[4:8])["tokens_BT"])


def test_every_token_is_an_input_once_in_every_epoch():
    documents = make_documents([7, 1, 20, 13, 30, 2])
    sequences = Sequences(documents, seq_len=8, window=2, seed=0)
    inputs = sequences.read(np.arange(40))["tokens_BT"].ravel()
    total = len(documents.tokens)
    for epoch in range(4):
        assert sorted(inputs[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert not np.array_equal(inputs[:total], inputs[total : 2 * total])


def test_the_end_of_document_is_a_target_and_has_none():
    documents = make_documents([4, 9, 6])
    ends = documents.offsets[1:] - 1
    for batch in make_batches(documents, 5):
        is_end_BT = np.isin(batch["tokens_BT"], ends)
        assert not batch["valid_BTW"][is_end_BT].any()
        assert batch["valid_BTW"][~is_end_BT][:, 0].all()
        assert np.isin(batch["targets_BTW"][batch["valid_BTW"]], ends).any()
        # From the first offset that crosses a document's end, none is valid again.
        assert (np.diff(batch["valid_BTW"].astype(int)) <= 0).all()


def test_batches_are_a_function_of_seed_and_number():
    documents = make_documents(range(1, 40))
    batches = make_batches(documents, 30)
    assert_same(batches, make_batches(documents, 30, threads=0))
    assert_same(batches[11:], make_batches(documents, 19, start=11))
    others = make_batches(documents, 30, seed=1)
    assert not np.array_equal(batches[0]["tokens_BT"], others[0]["tokens_BT"])


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_any_number_of_hosts_reads_the_same_batches(hosts):
    documents = make_documents(range(1, 40))
    shards = [make_batches(documents, 6, start=3, batch_size=8, shard=(index, hosts)) for index in range(hosts)]
    assert_same(join(shards), make_batches(documents, 6, start=3, batch_size=8))


def test_the_order_of_documents_never_changes():
    """A run that is resumed years later, with another numpy, goes on with the same batches."""
    sequences = Sequences(make_documents([1] * 8), seq_len=16, window=1, seed=1)
    assert sequences.read(np.array([0]))["tokens_BT"].tolist() == [[3, 5, 2, 7, 0, 6, 1, 4, 4, 2, 0, 6, 1, 5, 7, 3]]


# Held-out batches


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seq_len=st.integers(1, 12), window=st.integers(1, 5)
)
def test_held_out_batches_hold_each_token_once_and_then_padding(lengths, seq_len, window):
    documents = make_documents(lengths)
    total = len(documents.tokens)
    batches = held_out_batches(documents, seq_len=seq_len, window=window, batch_size=2)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert total <= joined["tokens_BT"].size < total + 2 * seq_len
    np.testing.assert_array_equal(joined["tokens_BT"].ravel()[:total], np.arange(total))
    assert not joined["valid_BTW"].reshape(-1, window)[total:].any()
    # Padding behaves as more documents of one token each.
    padded = make_documents(lengths + [1] * (3 * seq_len + window))
    for number in range(-(-total // seq_len)):
        expected = brute_force(padded, range(len(padded)), number * seq_len, seq_len, window)
        valid_TW = np.array(expected["valid_BTW"])
        np.testing.assert_array_equal(joined["valid_BTW"][number], valid_TW)
        np.testing.assert_array_equal(
            joined["targets_BTW"][number][valid_TW], np.array(expected["targets_BTW"])[valid_TW]
        )
        inside = np.array(expected["tokens_BT"]) < total
        np.testing.assert_array_equal(joined["segments_BT"][number][inside], np.array(expected["segments_BT"])[inside])


def test_held_out_batches_can_be_limited_and_sharded():
    documents = make_documents([50, 60])
    batches = make_held_out_batches(documents)
    assert len(batches) == 4
    few = make_held_out_batches(documents, limit=2)
    assert len(few) == 2 and few[0]["tokens_BT"].shape == batches[0]["tokens_BT"].shape
    whole, some = (np.concatenate([batch["tokens_BT"] for batch in found]) for found in (batches, few))
    places = [next(i for i, row in enumerate(whole) if (row == one).all()) for one in some]
    sequences = -(-len(documents.tokens) // whole.shape[1])
    steps = np.diff([*places, sequences])
    assert places[0] == 0 and steps.min() >= 1 and steps.max() - steps.min() <= 1, "they lie evenly over all documents"
    assert_same(batches, make_held_out_batches(documents, limit=99))
    shards = [make_held_out_batches(documents, shard=(index, 2)) for index in range(2)]
    assert_same(join(shards), batches)
