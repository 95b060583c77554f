"""Costs of a sweep's decoding: what heads on one trunk have in common is the clock."""

import itertools
import math
from types import SimpleNamespace

import pytest

from mtp_jax.sweep import costs
from mtp_jax.sweep.config import MeasureConfig
from support import tiny

FACTORS = {"slow": "lowrank", "quick": "shared", "third": "residual"}
SPEED = {"slow": 3.0, "quick": 1.0, "third": 2.0}


def configs(target):
    model = tiny.model_config(vocab_size=258)
    head = {name: tiny.head_config(window=3, rank=2, factors=f, target=target) for name, f in FACTORS.items()}
    return {name: tiny.train_config(model, found) for name, found in head.items()}


@pytest.fixture
def benches(monkeypatch):
    """The groups that are measured together. The machine has another speed with each head, which k costs as it does."""
    groups = []

    def bench_runs(runs, config, progress):
        groups.append(set(runs))

        def row(name, dtype, k):
            seconds = SPEED[name] * (1 + 0.1 * k) * {"float32": 1, "bfloat16": 0.5}[dtype]
            return {"temperature": 0.7, "k": k, "dtype": dtype, "iteration_seconds": [seconds, 2 * seconds]}

        return {n: {"rows": [row(n, *at) for at in itertools.product(("float32", "bfloat16"), (0, 2))]} for n in runs}

    monkeypatch.setattr(costs, "bench_runs", bench_runs)
    monkeypatch.setattr(costs, "untrained", lambda config, bases: SimpleNamespace(config=config))
    return groups


def test_heads_on_one_trunk_are_measured_each_beside_plain_decoding(benches):
    found = costs.decoding_costs(configs("ntp"), MeasureConfig(ks=(2,)), lambda _: None)
    assert benches == [{"slow"}, {"quick"}, {"third"}]
    for rows in found.values():  # at the speed that plain decoding has in the median
        assert [(row["dtype"], row["k"]) for row in rows] == [
            ("float32", 0), ("float32", 2), ("bfloat16", 0), ("bfloat16", 2),
        ]  # fmt: skip
        first = [row["iteration_seconds"][0] for row in rows]
        assert all(map(math.isclose, first, (2, 2.4, 1, 1.2)))


def test_heads_whose_first_offset_is_their_own_are_measured_together(benches):
    marginal = {"slow": "full", "quick": "shared"}
    given = configs("marginal")
    found = costs.decoding_costs({name: given[name] for name in marginal}, MeasureConfig(), lambda _: None)
    assert benches == [{"slow", "quick"}]
    assert [found[name][0]["iteration_seconds"][0] for name in marginal] == [3.0, 1.0]
