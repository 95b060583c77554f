"""The target law against its definition, and the Gumbel noise that samples it."""

import bisect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.arrays import NEVER
from mtp_jax.decode.law import Sampling, argmax, gumbel, gumbel_of, of_drafts, process_logits
from mtp_jax.heads.config import HeadConfig
from support import tiny
from support.laws import FALSE_ALARM, POWER, goodness_of_fit, reference_law

VOCAB = 12
SETTINGS = list(itertools.product([0.0, 0.3, 1.0, 2.5], [0, 1, 3, VOCAB, 40], [1e-6, 0.5, 0.9, 1.0]))


def sampling(temperature, top_k, top_p) -> Sampling:
    """Per-row settings on the mesh in scope."""
    keys = jax.vmap(jax.random.key)(np.arange(len(temperature), dtype=np.uint32))
    rows = np.array(temperature, np.float32), np.array(top_k, np.int32), np.array(top_p, np.float32)
    return Sampling(*map(tiny.shard, rows), keys)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float32), axis=-1))


def law(logp_BTV: np.ndarray, temperature, top_k, top_p, *, filtered: bool = True) -> np.ndarray:
    """The production law as probabilities `[B, T, V]`."""
    settings = sampling(temperature, top_k, top_p)
    process = jax.jit(process_logits, static_argnames="filtered")
    logits_BTV = process(tiny.shard(logp_BTV.astype(np.float32)), settings, filtered=filtered)
    assert logits_BTV.dtype == jnp.float32 and np.isfinite(logits_BTV).all()
    return np.asarray(jax.nn.softmax(logits_BTV, axis=-1))


def one(p: list[float], temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The law of one position with probabilities `p`, padded to the shared shapes with tokens of probability ~0."""
    padded = np.pad(np.log(p), (0, VOCAB - len(p)), constant_values=-60.0)
    rows = len(SETTINGS)
    logp_BTV = np.broadcast_to(padded, (rows, 3, VOCAB))
    return law(logp_BTV, [temperature] * rows, [top_k] * rows, [top_p] * rows)[0, 0, : len(p)]


@pytest.fixture(scope="module")
def grid():
    """All settings in one batch, a row each: log-probabilities (the last position with ties) and the law."""
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(scale=2, size=(len(SETTINGS), 3, VOCAB))
    logits_BTV[:, 2] = np.round(logits_BTV[:, 2])
    logp_BTV = log_softmax(logits_BTV)
    with tiny.mesh():
        return logp_BTV, law(logp_BTV, *zip(*SETTINGS, strict=True))


@pytest.mark.parametrize("row", range(len(SETTINGS)), ids=["T{}-k{}-p{}".format(*s) for s in SETTINGS])
def test_the_law_is_its_definition_in_a_batch_of_mixed_rows(grid, row):
    logp_BTV, p_BTV = grid
    for position in range(3):
        expected = reference_law(logp_BTV[row, position], *SETTINGS[row])
        np.testing.assert_array_equal(p_BTV[row, position] > 0, expected > 0)
        np.testing.assert_allclose(p_BTV[row, position], expected, rtol=1e-4, atol=1e-7)


def test_ties_at_the_kth_place_are_all_kept(mesh):
    np.testing.assert_allclose(one([0.4, 0.2, 0.2, 0.2], 1.0, 2, 1.0), [0.4, 0.2, 0.2, 0.2], rtol=1e-5)
    np.testing.assert_allclose(one([0.4, 0.3, 0.15, 0.15], 1.0, 2, 1.0), [4 / 7, 3 / 7, 0, 0], rtol=1e-5)


def test_top_p_keeps_the_token_that_reaches_the_mass_and_no_more(mesh):
    p = [0.5, 0.25, 0.125, 0.125]  # sums that are exact in binary
    assert (one(p, 1.0, 0, 0.75) > 0).tolist() == [True, True, False, False]
    assert (one(p, 1.0, 0, 0.7501) > 0).tolist() == [True, True, True, True]
    assert (one(p, 1.0, 0, 1e-9) > 0).tolist() == [True, False, False, False]


def test_the_order_is_temperature_then_top_k_then_top_p(mesh):
    # At T = 1/2 the first token alone has 0.66; a temperature applied last would keep two tokens.
    np.testing.assert_allclose(one([0.5, 0.3, 0.2], 0.5, 0, 0.6), [1, 0, 0], atol=1e-6)
    # Of the two that top-k leaves the first has 0.57; top-p applied first would keep it with 0.4 and need another.
    np.testing.assert_allclose(one([0.4, 0.3, 0.2, 0.1], 1.0, 2, 0.5), [1, 0, 0, 0], atol=1e-6)


def test_without_filters_the_sort_changes_nothing(mesh):
    rng = np.random.default_rng(1)
    # Peaked and flat rows: a cumulative sum in float32 may pass 1 before the tail is reached.
    scale = np.repeat(np.linspace(0.1, 8, 50), 20)[:, None, None]
    logp_BTV = log_softmax(scale * rng.normal(size=(1000, 1, 64)))
    rows = [rng.choice([0.0, 0.5, 1.0, 2.0], 1000), [0] * 1000, [1.0] * 1000]
    np.testing.assert_array_equal(law(logp_BTV, *rows, filtered=True), law(logp_BTV, *rows, filtered=False))


def test_temperature_0_is_the_argmax_whatever_the_noise(mesh):
    rng, rows = np.random.default_rng(2), len(SETTINGS)
    logp_BTV = log_softmax(rng.normal(scale=1e-3, size=(rows, 3, VOCAB)))
    process = jax.jit(process_logits, static_argnames="filtered")
    logits_BTV = process(tiny.shard(logp_BTV), sampling([0.0] * rows, [3] * rows, [0.5] * rows), filtered=True)
    logits_BTV = np.asarray(logits_BTV)
    for _ in range(100):
        noise_BTV = rng.gumbel(size=logp_BTV.shape)
        np.testing.assert_array_equal(np.argmax(logits_BTV + noise_BTV, -1), np.argmax(logp_BTV, -1))
    assert np.unique(logits_BTV).tolist() == [np.float32(NEVER), 0.0]


def test_the_law_does_not_depend_on_how_the_vocabulary_is_sharded(grid):
    logp_BTV, p_BTV = grid
    with tiny.mesh(data=2, tensor=4) as mesh:
        spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
        logp_BTV = jax.device_put(logp_BTV, jax.NamedSharding(mesh, spec))
        process = jax.jit(process_logits, static_argnames="filtered")
        logits_BTV = process(logp_BTV, sampling(*zip(*SETTINGS, strict=True)), filtered=True)
        np.testing.assert_array_equal(jax.nn.softmax(np.asarray(logits_BTV), axis=-1), p_BTV)


def test_noise_is_a_function_of_key_and_position_alone():
    keys = jax.vmap(jax.random.key)(np.arange(5, dtype=np.uint32))
    positions_BT = np.arange(5)[:, None] * 3 + np.arange(4)[None] + 100
    noise_BTV = np.asarray(gumbel(keys, positions_BT, VOCAB))
    order = np.array([4, 2, 2, 0, 1])
    np.testing.assert_array_equal(gumbel(keys[order], positions_BT[order, ::-1], VOCAB), noise_BTV[order, ::-1])
    np.testing.assert_array_equal(gumbel(keys[2:3], positions_BT[2:3, 1:2], VOCAB), noise_BTV[2:3, 1:2])
    assert len(np.unique(noise_BTV.reshape(-1, VOCAB)[:, 0])) == 20, "two (key, position) pairs share their noise"


@pytest.fixture(scope="module")
def samples():
    """argmax(logits + noise) at three neighbouring positions of 20,000 neighbouring seeds, and the law."""
    p = np.array([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    keys = jax.vmap(jax.random.key)(np.arange(20_000, dtype=np.uint32))
    noise_BTV = gumbel(keys, np.broadcast_to(np.arange(3) + 7, (20_000, 3)), len(p))
    return np.argmax(np.asarray(noise_BTV) + np.log(p), axis=-1), p


def test_noise_is_gumbels_law_into_its_tail():
    """How many of the 2^31 kinds of bits give more than g: as many as the law says, to half of one."""

    def noise(n):
        return float(gumbel_of(jnp.uint32(n << 1)))

    for g in (-2.5, 0.0, 3.0, 12.0, 15.0, 16.5, 18.0, 20.0, 21.5):
        more = bisect.bisect_left(range(2**31), True, key=lambda n: noise(n) <= g)
        expected = 2**31 * -math.expm1(-math.exp(-g))
        assert abs(more - expected) <= 0.51 + 1e-6 * expected, g
    assert math.isfinite(noise(2**31 - 1)) and gumbel_of(jnp.uint32(2**32 - 1)).dtype == jnp.float32


def test_gumbel_max_follows_the_softmax_at_neighbouring_positions(samples):
    """The joint law of two positions, 36 cells. Power: against a law whose temperature is off by 10%."""
    tokens_BT, p = samples
    counts = np.histogram2d(tokens_BT[:, 0], tokens_BT[:, 1], bins=range(7))[0]
    warmer = reference_law(np.log(p), 1.1, 0, 1.0)
    value, power = goodness_of_fit(counts, np.outer(p, p), np.outer(warmer, warmer))
    assert power > POWER
    assert value > FALSE_ALARM
    same = np.histogram2d(tokens_BT[:, 0], tokens_BT[:, 0], bins=range(7))[0]
    assert goodness_of_fit(same, np.outer(p, p), np.diag(p))[0] < FALSE_ALARM  # one noise for two positions is found


def test_noise_of_neighbouring_seeds_is_independent(samples):
    """Rows of a batch have neighbouring seeds. Power: one row in 20 copies its neighbour's token."""
    tokens_BT, p = samples
    counts = np.histogram2d(tokens_BT[::2, 2], tokens_BT[1::2, 2], bins=range(7))[0]
    value, power = goodness_of_fit(counts, np.outer(p, p), 0.95 * np.outer(p, p) + 0.05 * np.diag(p))
    assert power > POWER
    assert value > FALSE_ALARM


def test_the_temperature_of_drafts_is_a_share_of_each_rows():
    """Over that which the head learnt; 0 stays so, and nothing leaves the temperatures that decoding takes."""
    rows = [0.0, 1e-6, 0.7, 1.0, 1e6]
    with tiny.mesh():
        settings = sampling(rows, [0] * 5, [1.0] * 5)
        for learnt, share, expected in (
            (0.7, 1.0, [0, 1e-6 / 0.7, 1, 1 / 0.7, 1e6]),
            (0.7, 0.5, [0, 1e-6, 0.5, 0.5 / 0.7, 5e5 / 0.7]),
            (1.0, 0.0, [0] * 5),
        ):
            drafts = of_drafts(settings, HeadConfig(temperature=learnt, draft_temperature=share))
            np.testing.assert_allclose(drafts.temperature_B, expected, rtol=1e-6)
            assert drafts.key_B is settings.key_B


def test_the_first_of_the_largest():
    """With ties, infinities, and rows of nothing else."""
    x = np.random.default_rng(0).integers(-3, 3, (4, 5, 7)).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2, 3:5] = -np.inf, NEVER, np.inf
    found = jax.jit(argmax)(x)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.argmax(-1))


def test_what_is_not_a_number_has_an_index_in_range():
    x = np.array([[np.nan, 1.0, 2.0], [0.0, 1.0, np.nan]], np.float32)
    assert set(np.asarray(argmax(x))) <= {0, 1, 2}
