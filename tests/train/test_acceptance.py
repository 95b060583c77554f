"""Expected acceptance in the training of a head on a base: on the base's own texts, at the temperature it learnt."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.expectation import expectation
from mtp_jax.decode.generate import generate
from mtp_jax.distill.hidden import cache_hidden
from mtp_jax.runs.base import open_base
from mtp_jax.runs.checkpoints import Checkpoints, loss_of
from mtp_jax.train.acceptance import write_texts
from mtp_jax.train.loggers import read_metrics
from mtp_jax.train.loop import train
from mtp_jax.validate import ConfigError
from support.compilation import quick
from support.tiny import head_on


@pytest.fixture(autouse=True)
def quick_compilation():
    with quick():
        yield


def test_every_evaluation_says_how_many_tokens_a_forward_gives(base, head_run):
    steps = [row for row in read_metrics(head_run) if row["kind"] == "train"]
    assert all(
        "loss_offset_1" not in row and {"loss_offset_2", "loss_offset_4", "listed_4"} <= row.keys() for row in steps
    )
    rows = [row for row in read_metrics(head_run) if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        found = [row[f"expected_tokens_at_{t}"] for t in ("0", "0.7")]
        assert row["expected_tokens"] == pytest.approx(np.mean(found)) and all(1 <= value <= 4 for value in found)
        assert {f"expected_acceptance_at_0.7_{s}" for s in (1, 2, 3)} <= row.keys()


def test_it_is_what_is_expected_of_the_same_texts_with_the_trunk(base, head_run):
    """And at T = 0 what decoding counts on them."""
    loaded = mtp_jax.load(head_run)
    with jax.set_mesh(loaded.mesh):
        texts = write_texts(loaded.model, prepare(base[1]), loaded.tokenizer, (0.0, 0.7), 8)
        for one in texts:
            at = f"expected_tokens_at_{one.config.temperature:g}"
            again = expectation(loaded.model, one.prompts[: one.count], one.texts[: one.count], one.config)
            said = next(row[at] for row in read_metrics(head_run) if row["kind"] == "eval" and row["step"] == 4)
            assert again.tokens_per_forward == pytest.approx(one.expected(loaded.model).tokens_per_forward, rel=1e-6)
            assert said == pytest.approx(again.tokens_per_forward, rel=1e-4)
        greedy = texts[0]
        made = generate(for_decoding(loaded.model), greedy.prompts[: greedy.count], **{**vars(greedy.config), "k": 3})
        expected = greedy.expected(loaded.model)
    for ours, theirs in zip(greedy.texts[: greedy.count], made.tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert expected.tokens_per_forward == pytest.approx(made.block_efficiency)


def test_the_best_checkpoint_is_that_of_the_most_tokens(head_run):
    with Checkpoints(head_run) as checkpoints:
        metas = {step: checkpoints.meta(step) for step in checkpoints.steps()}
        worth = {step: meta["metrics"]["expected_tokens"] for step, meta in metas.items()}
        assert checkpoints.best_step() == max(worth, key=lambda step: (worth[step], step))
    assert loss_of({"metrics": {"loss": 3.0, "expected_tokens": 1.5}}) == -1.5
    assert loss_of({"metrics": {"loss": 3.0}}) == 3.0 and math.isinf(loss_of({"metrics": {}}))


def test_training_from_a_cache_expects_the_same(base, head_run, tmp_path):
    loaded = mtp_jax.load(base[0])
    cache_hidden(loaded, open_base(base[0]), prepare(base[1]), tmp_path / "cache", seq_len=base[1].seq_len)
    data = dataclasses.replace(base[1], source="store", files=str(tmp_path / "cache"))
    train(head_on(base, data), tmp_path / "run")
    ours, theirs = (
        [row["expected_tokens"] for row in read_metrics(path) if row["kind"] == "eval"]
        for path in (tmp_path / "run", head_run)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_run_that_is_not_asked_expects_nothing(base, tmp_path):
    train(head_on(base, eval_temperatures=(), steps=2), tmp_path / "run")
    assert not any("expected_tokens" in row for row in read_metrics(tmp_path / "run"))


def test_a_head_learns_at_the_temperature_of_its_texts(base, tmp_path):
    """It is the store's, and drafting at it leaves the head's law as it is."""
    store = prepare(base[1])
    sampled = {"temperature": 0.5, "top_k": 0, "top_p": 1.0}
    manifest = json.loads((store.path / "manifest.json").read_text())
    (tmp_path / "own").mkdir()
    for file in store.path.iterdir():
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "own" / "manifest.json").write_text(json.dumps({**manifest, "sampled": sampled}))
    assert Store.open(tmp_path / "own").sampled == sampled
    data = dataclasses.replace(base[1], source="store", files=str(tmp_path / "own"))
    train(head_on(base, data, steps=2), tmp_path / "run")
    loaded = mtp_jax.load(tmp_path / "run")
    assert loaded.config.head.temperature == 0.5
    other = head_on(base, data, head=dataclasses.replace(head_on(base).head, temperature=0.9))
    with pytest.raises(
        ConfigError, match=r"HeadConfig.temperature is 0\.9 and the texts in .*own were sampled at 0\.5"
    ):
        train(other, tmp_path / "other")
    with jax.set_mesh(loaded.mesh):
        config = DecodeConfig(12, 0.5, verifier="token", seed=0)
        texts = generate(for_decoding(loaded.model), [[5, 6, 7]] * 4, **{**vars(config), "k": 0}).tokens
        at_its_own = expectation(loaded.model, [[5, 6, 7]] * 4, texts, config)
        # The same head, said to have learnt at 1: its law is tempered, and it accepts other shares.
        loaded.model.head.config = dataclasses.replace(loaded.model.head.config, temperature=1.0)
        tempered = expectation(loaded.model, [[5, 6, 7]] * 4, texts, config)
    assert not np.allclose(at_its_own.overlap, tempered.overlap)


def test_conversations_are_answered_behind_their_prompts(base):
    """Prompts of a store with a loss mask end where the first answer begins."""
    from mtp_jax.data.prompts import some_prompts

    store = prepare(base[1])
    mask = np.zeros(len(store.valid.tokens), np.uint8)
    for begin in store.valid.offsets[:-1]:
        mask[begin + 5 : begin + 9] = 1
    masked = dataclasses.replace(
        store, manifest={**store.manifest, "mask": True}, valid=dataclasses.replace(store.valid, mask=mask)
    )
    prompts = some_prompts(masked, 3, 16)
    assert [len(prompt) for prompt in prompts] == [5] * 3 and some_prompts(masked, 3, 4) == []
