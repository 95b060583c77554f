"""Expected acceptance against decoding: the same counts at temperature 0, and above it the same in the mean."""

import dataclasses

import numpy as np
import pytest

from mtp_jax import generate
from mtp_jax.decode import expectation as expected
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.expectation import expectation
from mtp_jax.validate import ConfigError
from support import tiny
from support.decoding import PROMPTS, build
from support.heads import wake
from support.tally import register

pytestmark = pytest.mark.usefixtures("quick_compilation")

LIMITS = [16, 3, 11, 1]
HEADS = {
    "cpd": dict(rank=3, factors="full"),
    "shortlist": dict(rank=2, factors="lowrank", target="ntp", shortlist=9),
    "token": dict(rank=2, factors="shared", target="ntp", encoder="token"),
    "cached": dict(kind="tally", target="ntp"),
    "block": dict(rank=2, factors="shared", target="ntp", encoder="block", encoder_layers=2, taps=(1,)),
}


@pytest.fixture(scope="module")
def models(mesh):
    """A model whose drafts are right now and then."""
    return build(mesh)


def same_counts(stacked, ready, k, stops, prompts=PROMPTS, limits=LIMITS):
    options = dict(max_new_tokens=limits, stop_tokens=stops)
    decoded = generate(ready, prompts, k=k, **options)
    texts = generate(ready, prompts, k=0, **options).tokens
    found = expectation(stacked, prompts, texts, DecodeConfig(k=k, **options))
    for name in ("forwards", "accepted", "drafted"):
        np.testing.assert_allclose(
            getattr(found, name + ("_B" if name == "forwards" else "_Bk")), getattr(decoded, name), atol=1e-9
        )
    np.testing.assert_allclose(found.tokens_per_forward, decoded.block_efficiency)
    return decoded


@pytest.mark.parametrize("k", [1, 3])
def test_at_temperature_0_they_are_what_decoding_counts(models, k):
    out = same_counts(models.stacked, models.ready, k, ())
    assert 0 < out.accepted.sum() < out.drafted.sum()
    for stop in np.unique(np.concatenate(out.tokens)):  # at every offset of a block
        same_counts(models.stacked, models.ready, k, [int(stop)])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("shortlist", "cached") else pytest.mark.slow) for n in HEADS]
)
def test_of_every_head(name, mesh, monkeypatch):
    register(monkeypatch)
    config = tiny.train_config(tiny.model_config(vocab_size=12), tiny.head_config(**HEADS[name]))
    model = tiny.make_model(config, seed=3)
    prompts = [[5, 1, 9], [4, 3, 6, 7, 8, 2, 10, 11], [3], [7, 11] * 7]
    if config.head.encoder != "none":  # which begins without an effect
        model = wake(model)
    out = same_counts(model, for_decoding(model), 3, (), prompts, [16] * 4)
    assert out.accepted.sum() > 0


@pytest.mark.parametrize("k", [1, 2])
def test_of_fewer_drafts_it_is_that_of_the_first_ones(models, k):
    texts = generate(models.ready, PROMPTS, k=0, max_new_tokens=LIMITS).tokens
    most, few = (expectation(models.stacked, PROMPTS, texts, DecodeConfig(LIMITS, k=n)) for n in (3, k))
    found = most.with_drafts(k)
    for name in ("emitted_B", "forwards_B", "accepted_Bk", "drafted_Bk"):
        np.testing.assert_allclose(getattr(found, name), getattr(few, name), atol=1e-9)
    assert found.acceptance == pytest.approx(few.acceptance) and len(found.overlap) == k


def test_at_temperature_0_the_overlap_is_the_mean_of_the_chances(models, monkeypatch):
    """Over the positions whose offsets all lie in the text."""
    texts, seen, counts = generate(models.ready, PROMPTS, k=0, max_new_tokens=LIMITS).tokens, [], expected._counts
    monkeypatch.setattr(
        expected, "_counts", lambda chance_nk, limit: seen.append(chance_nk) or counts(chance_nk, limit)
    )
    found = expectation(models.stacked, PROMPTS, texts, DecodeConfig(LIMITS, k=2))
    inside = [chance_nk[: max(0, len(text) - 2)] for chance_nk, text in zip(seen, texts, strict=True)]
    assert found.positions_B.tolist() == [14, 1, 9, 0]
    np.testing.assert_allclose(found.overlap, np.concatenate(inside).mean(0))


@pytest.mark.slow
def test_on_many_devices_they_are_those_of_one(models):
    texts = generate(models.ready, PROMPTS, k=0, max_new_tokens=16, temperature=0.8, top_p=0.9).tokens
    config = DecodeConfig(16, 0.8, top_p=0.9, k=3)
    here = expectation(models.stacked, PROMPTS, texts, config)
    with tiny.mesh(2, 2, 2) as mesh:
        there = expectation(build(mesh).stacked, PROMPTS, texts, config)
    for name, value in vars(here).items():
        np.testing.assert_allclose(getattr(there, name), value, atol=1e-4)


@pytest.mark.parametrize(
    "options, texts, words",
    [
        ({"k": 0}, [[1]], "k is 0"),
        ({"k": "auto"}, [[1]], "k is 'auto'"),
        ({"k": [1]}, [[1]], r"k is \(1,\)"),
        ({"k": 4}, [[1]], "k is 4"),
        ({"k": 1}, [[1, 2, 3]], "Text 0 has 3 tokens and max_new_tokens is 2"),
    ],
)
def test_what_is_not_expected_is_refused(models, options, texts, words):
    with pytest.raises(ConfigError, match=words):
        expectation(models.stacked, [[5]], texts, DecodeConfig(2, **options))


@pytest.mark.parametrize(
    ("law", "share"),
    [
        pytest.param((1.0, 0, 1.0), 1.0, marks=pytest.mark.slow),
        ((0.8, 6, 0.95), 1.0),
        pytest.param((0.8, 6, 0.95), 0.6, marks=pytest.mark.slow),
    ],
)
def test_above_they_are_what_decoding_counts_in_the_mean(models, law, share, monkeypatch):
    """1,024 texts of plain decoding against 1,024 rows of other seeds that draft, within 4.5 standard errors; chances
    of the position before are further away."""
    rows, k = 1024, 3
    for model in (models.stacked, models.ready):
        monkeypatch.setattr(model.head, "config", dataclasses.replace(model.head.config, draft_temperature=share))
    temperature, top_k, top_p = law
    options = dict(max_new_tokens=12, temperature=temperature, top_k=top_k, top_p=top_p)
    prompts = [PROMPTS[0]] * rows
    decoded = generate(models.ready, prompts, k=k, verifier="token", seed=1, **options)
    texts = generate(models.ready, prompts, k=0, seed=2, **options).tokens

    def errors():
        """How many standard errors forwards and accepted drafts are off."""
        found = expectation(models.stacked, prompts, texts, DecodeConfig(k=k, **options))
        pairs = [(found.forwards_B[:, None], decoded.forwards[:, None]), (found.accepted_Bk, decoded.accepted)]
        ours, theirs = (np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
        return np.abs(ours.mean(0) - theirs.mean(0)) / np.sqrt((ours.var(0) + theirs.var(0)) / rows)

    assert errors().max() < 4.5
    counts = expected._counts
    monkeypatch.setattr(expected, "_counts", lambda chance_nk, limit: counts(np.roll(chance_nk, 1, axis=0), limit))
    assert errors().max() > 6


def test_what_is_drawn_has_the_expected_mean():
    """100,000 draws of what decoding would count, within 5 standard errors; at chances of 0 and 1 exactly."""
    rng = np.random.default_rng(0)
    k, lengths, limits = 3, [9, 1, 0, 6], np.array([12, 4, 5, 6])
    for sure, count in ((False, 100_000), (True, 3)):
        chances = [rng.random((n, k)) for n in lengths]
        chances = [np.round(chance_nk) for chance_nk in chances] if sure else chances
        columns = zip(*(expected._counts(c, int(n)) for c, n in zip(chances, limits, strict=True)), strict=True)
        zeros = np.zeros((len(lengths), k)), np.zeros(len(lengths))
        found = expected.Expectation(*map(np.array, columns), *zeros, limits, chances)
        drawn = expected.draw(found, count)
        means = found.forwards_B.sum(), found.accepted_Bk.sum(0), found.drafted_Bk.sum(0)
        for values, mean in zip(drawn, means, strict=True):
            error = 5 * values.std(0) / np.sqrt(count) + 1e-9
            assert np.all(np.abs(values.mean(0) - mean) <= error) and (sure or np.all(mean > 0))
