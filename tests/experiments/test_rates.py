"""Rates of decoding, by which the claims compare speeds: tokens per iteration over the time of one."""

import json

import numpy as np
import pytest

from experiments.claims.rates import _drawn_ratios, iteration_seconds, speed, speed_ratio, speeds, speedup
from mtp_jax.sweep.results import load_results
from support.results import results


@pytest.fixture
def load(tmp_path):
    """Results files as they are read."""

    def write(value):
        (tmp_path / "results.json").write_text(json.dumps(value))
        return load_results([tmp_path / "results.json"])

    return write


def test_a_speed_is_tokens_per_iteration_over_what_the_iteration_takes(load):
    (found,) = load(results(kept=0.0, noise=0.0, verify=0.1, second=0.5))
    seconds = iteration_seconds(found, (2,), 0.7)
    assert {k: np.median(of) for k, of in seconds.items()} == pytest.approx(
        {0: 0.0019 * 1.03} | {k: 0.002 * (1.1 + k / 8) * 1.03 for k in (1, 2, 3)}
    )
    tokens = np.mean(found.of((2,))[1].at("seconds")["decoding"][0]["documents"]["emitted"]) / 250
    fast = speed(found, (2,), "seconds", 0.7)
    assert fast and fast.k == 3 and fast.rate == pytest.approx(tokens / (0.00295 * 1.03))
    assert speedup(found, (2,), "seconds", 0.7) == pytest.approx(tokens / 1.475 * 0.95)
    e = speed_ratio(found, (2,), "seconds", 0.7)
    # Rounds that are slower for all alike say nothing against the ratio; the best k is another one in few of the draws.
    assert e and e.seeds == 3 and e.mean == pytest.approx(1.375 / 1.475) and e.error < 2e-3
    assert speed(found, (1,), "seconds", 0.7).rate > fast.rate


def test_each_point_decodes_with_the_k_that_is_best_for_it(load):
    """Two drafts are best for rank 1, and three for rank 4, of which each is worth more."""
    (found,) = load(results(kept=1.0, noise=0.0, verify=0.0, second=0.85))
    best = {rank: speed(found, (rank,), "seconds", 0.7) for rank in (1, 4)}
    rate = {1: 1.8 * 0.93, 4: (1.8 + 0.8 * 2) * 0.93}
    ease = best[4].tokens / rate[4]  # of the documents, the same for all
    assert [at.k for at in best.values()] == [2, 3]
    assert best[1].tokens == pytest.approx(1 + 0.85 * (ease * rate[1] - 1))
    e = speed_ratio(found, (4,), "seconds", 0.7)
    assert e and e.mean == pytest.approx(best[4].tokens / 1.375 / (best[1].tokens / 1.25))


def test_older_files_know_the_most_drafts_and_none(load):
    (found,) = load(results(older=True, second=0.99))
    assert list(iteration_seconds(found, (1,), 0.7)) == [0, 3] and speed(found, (1,), "seconds", 0.7).k == 3


def test_the_best_k_is_drawn_anew_with_the_rounds(load):
    """Where drafts are as fast as none but for the clock, some draws are better with drafts, and none is worse."""
    value = results(ranks=(1, 4), kept=0.0, noise=0.0, verify=0.1078, second=0.5)
    wobble = np.array([0.9, 1.1, 0.95, 1.0, 1.05, 0.9, 1.1])
    for run in value["runs"]:
        for row in run["cost"]["decoding"]:
            steady = row["iteration_seconds"][0]
            drafts = run["changes"]["head.rank"] == 4 and row["k"] == 3
            row["iteration_seconds"] = (steady * (wobble if drafts else np.ones(7))).tolist()
    (found,) = load(value)
    own, other = (speeds(found, (rank,), "seconds", 0.7) for rank in (4, 1))
    plain, drafts = ([at for at in own if at.k == k] for k in (0, 3))
    reference = [at for at in other if at.k == 3]
    best, *alone = (_drawn_ratios(of, reference) for of in (own, plain, drafts))
    np.testing.assert_allclose(best, np.maximum(*alone))
    assert all(np.mean(best > of + 1e-6) > 0.1 for of in alone)


def test_noise_of_the_clock_is_in_the_interval_of_a_speed(load):
    value = results(kept=0.0, noise=0.0)
    rng = np.random.default_rng(0)
    for run in value["runs"]:
        for row in run["cost"]["decoding"]:
            row["iteration_seconds"] = (np.array(row["iteration_seconds"]) * rng.uniform(0.9, 1.1, 7)).tolist()
    e = speed_ratio(load(value)[0], (2,), "seconds", 0.7)
    assert e and e.seed_error < 1e-9 and 0.01 < e.error < 0.1


def test_where_drafts_do_not_pay_a_speed_is_that_of_plain_decoding(load):
    (found,) = load(results(verify=3.0))
    fast = speed(found, (4,), "seconds", 0.7)
    assert fast and (fast.k, fast.tokens) == (0, 1.0) and speedup(found, (4,), "seconds", 0.7) == pytest.approx(1)


def test_plain_decoding_that_is_the_same_work_has_one_time(load):
    """Of one trunk and its own head; from scratch each rank has a law of its own, which another head computes."""
    fast, slow = 0.0019 * 1.03, 3 * 0.0019 * 1.03
    for freeze, expected in (("trunk", [fast] * 3), ("none", [fast, slow, fast])):
        value = results(freeze=freeze)
        for run in value["runs"]:
            for row in run["cost"]["decoding"] if run["changes"]["head.rank"] == 2 else []:
                row["iteration_seconds"] = [3 * seconds for seconds in row["iteration_seconds"]]
        (found,) = load(value)
        times = [iteration_seconds(found, (rank,), 0.7)[0] for rank in (1, 2, 4)]
        assert [float(np.median(of)) for of in times] == pytest.approx(expected)
