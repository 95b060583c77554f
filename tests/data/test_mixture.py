"""Mixtures of stores: each store's tokens where they belong, in proportion, on any number of hosts."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_jax.config import OptimizerConfig
from mtp_jax.data.batches import Sequences
from mtp_jax.data.config import DataConfig
from mtp_jax.data.mixture import BLOCK, MixedDocuments, Mixture, Turns, shares
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.train import loop
from mtp_jax.validate import ConfigError
from support import tiny
from support.documents import SIZES, assert_same, join, make_batches, make_documents, make_held_out_batches


def mixed(*lengths, weights):
    """Stores whose tokens are all different: those of store i begin at 10,000 i."""
    parts = [make_documents(some) for some in lengths]
    parts = [dataclasses.replace(part, tokens=part.tokens + 10_000 * i) for i, part in enumerate(parts)]
    return MixedDocuments(tuple(parts), weights)


@pytest.fixture
def documents():
    return mixed([7, 30, 2, 11], range(1, 30), [5], weights=(0.5, 0.3, 0.2))


# Whose turn it is


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(1, BLOCK))
def test_shares_add_up_and_are_next_to_what_is_due(weights, total):
    parts = shares(weights, total)
    due = np.array(weights) / sum(weights) * total
    assert sum(parts) == total and (np.abs(parts - due) < 1).all()


def test_every_block_has_the_same_counts_and_an_order_of_its_own():
    weights = (0.7, 0.2999, 0.0001)
    stores, before = (a.reshape(3, BLOCK) for a in Turns(weights, seed=3).of(np.arange(3 * BLOCK)))
    counts = np.array([np.bincount(block, minlength=3) for block in stores])
    np.testing.assert_array_equal(counts, [shares(weights)] * 3)
    assert (stores[0] != stores[1]).any()
    # A store's own sequences come one after another, none left out.
    for store in range(3):
        np.testing.assert_array_equal(before[stores == store], np.arange(3 * shares(weights)[store]))
    others, _ = Turns(weights, seed=4).of(np.arange(BLOCK))
    assert (others != stores[0]).any()


def test_turns_are_spread_over_a_block():
    """No run of one store: among 100 neighbours its count is the binomial's, within five standard deviations."""
    stores, _ = Turns((0.5, 0.5), seed=0).of(np.arange(BLOCK))
    counts = stores[: BLOCK // 100 * 100].reshape(-1, 100).sum(1)
    assert np.abs(counts - 50).max() < 25


# Batches


def test_a_sequence_comes_from_one_store_and_is_one_of_its_own(documents):
    taken = [[] for _ in documents.parts]
    for batch in make_batches(documents, 40):
        for row in range(SIZES["batch_size"]):
            (store,) = {int(token) // 10_000 for token in batch["tokens_BT"][row]}
            taken[store].append({name: array[row] for name, array in batch.items()})
    assert sum(map(len, taken)) == 160 and min(map(len, taken)) > 10
    for store, rows in enumerate(taken):
        alone = Sequences(documents.parts[store], seq_len=8, window=3, seed=0, store=store)
        expected = alone.at(np.arange(len(rows)))
        for name in expected:
            np.testing.assert_array_equal(np.stack([row[name] for row in rows]), expected[name])


def test_every_token_of_a_store_is_used_once_in_each_of_its_epochs(documents):
    batches = make_batches(documents, 60)
    inputs = np.concatenate([batch["tokens_BT"] for batch in batches])
    for store, part in enumerate(documents.parts):
        mine = inputs[inputs[:, 0] // 10_000 == store]
        # After whole epochs' worth of sequences, the first of the endless string are all that was read, each once.
        per_epoch = max(1, len(part.tokens) // 8)
        whole = len(mine) // per_epoch * per_epoch
        alone = Sequences(part, seq_len=8, window=3, seed=0, store=store)
        expected = alone.read(np.arange(whole))["tokens_BT"]
        assert whole and sorted(map(tuple, mine[:whole].tolist())) == sorted(map(tuple, expected.tolist()))


def test_a_batch_is_a_function_of_seed_and_number_on_any_number_of_hosts(documents):
    batches = make_batches(documents, 12)
    assert_same(batches[5:], make_batches(documents, 7, start=5, threads=0))
    for hosts in (2, 4):
        shards = [make_batches(documents, 12, shard=(index, hosts)) for index in range(hosts)]
        assert_same(join(shards), batches)
    assert not np.array_equal(make_batches(documents, 1, seed=1)[0]["tokens_BT"], batches[0]["tokens_BT"])


def test_stores_of_one_size_have_orders_of_their_own():
    twice = mixed([9] * 20, [9] * 20, weights=(0.5, 0.5))
    firsts = [Sequences(part, seq_len=8, window=3, seed=0, store=i) for i, part in enumerate(twice.parts)]
    first, second = (sequences.at(np.arange(22))["tokens_BT"] % 10_000 for sequences in firsts)
    assert not np.array_equal(first, second)


def test_held_out_batches_are_those_of_each_store(documents):
    alone = [batch for part in documents.parts for batch in make_held_out_batches(part)]
    assert_same(make_held_out_batches(documents), alone)
    # 10 in proportion to the weights: 5, 3, 2; but the first store has only two, and the last one.
    limited = make_held_out_batches(documents, limit=10)
    firsts = [batch["tokens_BT"][0, 0] // 10_000 for batch in limited]
    assert firsts == [0] * 2 + [1] * 3 + [2]
    assert [batch["tokens_BT"][0, 0] // 10_000 for batch in make_held_out_batches(documents, limit=1)] == [0, 1, 2]


def test_a_split_of_a_mixture_is_its_stores_one_after_another(documents):
    parts = [part[i] for part in documents.parts for i in range(len(part))]
    assert len(documents) == len(documents.names) == len(documents.lengths) == len(parts)
    assert documents.lengths.tolist() == [len(part) for part in parts]
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(documents[i], part)
    np.testing.assert_array_equal(documents[-1], parts[-1])
    with pytest.raises(IndexError):
        documents[len(documents)]
    shares_V = documents.frequencies(30_000)
    assert shares_V.sum() == pytest.approx(1) and shares_V[20_000:].sum() == pytest.approx(0.2)


# Stores on disk


@pytest.fixture
def stores(tmp_path):
    """Two prepared stores, `one` and `two`, and their mixture as a config."""
    for i, name in enumerate(("one", "two")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        for j in range(20):
            (tmp_path / "texts" / f"{name}{j}.txt").write_bytes(bytes([65 + 32 * i + (j * k) % 26 for k in range(60)]))
        source = DataConfig(f"{tmp_path}/texts/{name}*.txt", valid_fraction=0.3, cache_dir=f"{tmp_path}/cache")
        prepare(source, out=tmp_path / name)
    return DataConfig(f"3:{tmp_path}/one,1:{tmp_path}/two", valid_fraction=0.3, seq_len=16, batch_size=8)


def test_a_mixture_is_named_by_weights_and_directories(stores, tmp_path):
    assert (stores.source, stores.files) == ("mixture", f"3:{tmp_path}/one,1:{tmp_path}/two")
    mixture = prepare(stores)
    assert isinstance(mixture, Mixture) and mixture.weights == (0.75, 0.25)
    one, two = (Store.open(tmp_path / name) for name in ("one", "two"))
    assert len(mixture.train) == len(one.train) + len(two.train)
    others = (f"1:{tmp_path}/one,1:{tmp_path}/two", f"3:{tmp_path}/two,1:{tmp_path}/one")
    hashes = {Mixture.open(files).sha256 for files in (stores.files, *others)}
    assert len(hashes) == 3 and Mixture.open(stores.files.replace("3:", "6:").replace("1:", "2:")).sha256 in hashes


@pytest.mark.parametrize(
    "files, message",
    [
        ("3:{0}/one,{0}/two", "/two' is not WEIGHT:DIRECTORY"),
        ("0:{0}/one,1:{0}/two", "is not WEIGHT:DIRECTORY with a weight above 0"),
        ("nan:{0}/one", "is not WEIGHT:DIRECTORY"),
        ("3:{0}/one,1:", "'1:' is not WEIGHT:DIRECTORY"),
        ("1:{0}/one,1e-5:{0}/two", "less than a 4096th"),
        ("1:{0}/one,1:{0}/three", "three is damaged"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(stores, tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        prepare(dataclasses.replace(stores, source="mixture", files=files.format(tmp_path)))


def test_stores_that_do_not_fit_the_config_are_refused_by_name(stores):
    with pytest.raises(ConfigError, match=r"one was made with valid_fraction 0\.3, and asked for is 0\.2"):
        prepare(dataclasses.replace(stores, valid_fraction=0.2))


def test_a_run_trains_on_a_mixture_and_resumes_on_the_same_one(stores, tmp_path):
    config = tiny.train_config(tiny.model_config(vocab_size=264, num_layers=1), tiny.head_config(window=2, rank=2))
    optimizer = OptimizerConfig(warmup_steps=0, schedule="constant")
    config = dataclasses.replace(config, data=stores, optimizer=optimizer, steps=4, eval_every=2, checkpoint_every=2)
    straight = loop.train(config, tmp_path / "straight")
    loop.train(dataclasses.replace(config, steps=2), tmp_path / "run")
    assert loop.train(config, tmp_path / "run", resume=True)["loss"] == straight["loss"]
    other = dataclasses.replace(stores, files=stores.files.replace("3:", "2:"))
    with pytest.raises(ConfigError, match=r"--resume: data.files is '2:"):
        loop.train(dataclasses.replace(config, data=other, steps=6), tmp_path / "run", resume=True)
