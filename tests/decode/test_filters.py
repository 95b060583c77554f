"""Top-k and top-p: the ids that stay against their definition in float64, for laws of any shape."""

import re

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtp_jax.arrays import NEVER
from mtp_jax.decode.law import Sampling, process_logits
from support import tiny

VOCAB, KNOWN, ROWS = 24, 21, 8
EDGE = 1e-6  # a sum of float32 may fall on either side of p within this

process = jax.jit(process_logits, static_argnames="filtered")


def sampling(rows) -> Sampling:
    """Settings (temperature, top-k, top-p) of each row, on the mesh in scope."""
    keys = jax.vmap(jax.random.key)(np.arange(len(rows), dtype=np.uint32))
    temperature, top_k, top_p = zip(*rows, strict=True)
    columns = np.array(temperature, np.float32), np.array(top_k, np.int32), np.array(top_p, np.float32)
    return Sampling(*map(tiny.shard, columns), keys)


def kept(logp_BTV, rows) -> np.ndarray:
    """Which ids the production law keeps; it leaves their logits as they are."""
    settings, logp_BTV = sampling(rows), tiny.shard(np.asarray(logp_BTV, np.float32))
    whole_BTV, left_BTV = (np.asarray(process(logp_BTV, settings, filtered=filtered)) for filtered in (False, True))
    kept_BTV = left_BTV > NEVER
    np.testing.assert_array_equal(left_BTV, np.where(kept_BTV, whole_BTV, np.float32(NEVER)))
    return kept_BTV


def defined(logits_V, top_k: int, top_p: float) -> tuple[np.ndarray, float]:
    """Which ids the definition keeps of float32 logits, and how near p a sum at the edge lies."""
    known_V = logits_V > 1e-6 * NEVER
    values = np.sort(logits_V[known_V].astype(np.float64))[::-1]
    kth = values[min(top_k, len(values)) - 1] if top_k else values[-1]
    values = values[values >= kth]
    if top_p >= 1:
        return known_V & (logits_V >= kth), 1.0
    mass = np.cumsum(np.exp(values - values[0]))
    mass /= mass[-1]
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # of ties the last
    top_p = float(np.float32(top_p))
    return logits_V >= values[ends[np.argmax(mass[ends] >= top_p)]], np.abs(mass[ends] - top_p).min()


def check(logp_BTV, rows) -> int:
    """Compare, and return at how many positions a sum was too near p to say."""
    found_BTV, near = kept(logp_BTV, rows), 0
    whole_BTV = np.asarray(process(tiny.shard(logp_BTV), sampling(rows), filtered=False))
    for b, (_, top_k, top_p) in enumerate(rows):
        for t in range(logp_BTV.shape[1]):
            expected_V, distance = defined(whole_BTV[b, t], top_k, top_p)
            if not np.array_equal(found_BTV[b, t], expected_V):
                assert distance < EDGE, (b, t, rows[b], found_BTV[b, t].sum(), expected_V.sum())
                near += 1
    return near


def law(kind: int, rng) -> np.ndarray:
    """Log-probabilities of one position: ties, flat, one-hot, steep, without structure."""
    logits_V = [
        lambda: rng.integers(-2, 3, VOCAB).astype(float),
        lambda: np.zeros(VOCAB),
        lambda: 80.0 * np.eye(VOCAB)[rng.integers(KNOWN)],
        lambda: -5.0 * rng.permutation(VOCAB),
        lambda: rng.normal(size=VOCAB) * rng.choice([1e-3, 1.0, 4.0]),
        lambda: np.repeat(rng.normal(size=VOCAB // 4), 4),
    ][kind]()
    logits_V[KNOWN:] = -np.inf
    logp_V = logits_V - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()
    return np.where(np.isneginf(logp_V), NEVER, logp_V).astype(np.float32)


one_row = st.tuples(
    st.sampled_from([0.05, 0.7, 1.0, 3.0, 100.0]),
    st.sampled_from([0, 0, 1, 2, 5, KNOWN, VOCAB, 1000]),
    st.sampled_from([1e-30, 1e-6, 0.3, 0.5, 0.9, 0.99999, 1.0, 1.0]),
)


@settings(max_examples=150)
@given(st.lists(one_row, min_size=ROWS, max_size=ROWS), st.lists(st.integers(0, 5), min_size=ROWS, max_size=ROWS))
@example([(1.0, 0, 1.0)] * ROWS, [*range(6), 0, 1])
@example([(100.0, 1000, 0.99999)] * ROWS, [*range(6), 0, 1])
def test_rows_of_any_law_and_setting_keep_what_the_definition_does(mesh, rows, kinds):
    """Ids that are ruled out are never kept: `defined` has none of them."""
    rng = np.random.default_rng(0)
    check(np.stack([[law(kind, rng), law((kind + 1) % 6, rng)] for kind in kinds]), rows)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_a_large_vocabulary_keeps_what_the_definition_does(mesh, scale):
    rows = [(t, k, p) for t in (0.7, 1.0) for k in (0, 50, 1000) for p in (0.5, 0.9, 0.99, 1.0)]
    logits_BTV = np.random.default_rng(0).normal(scale=scale, size=(len(rows), 2, 20_000))
    logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV.astype(np.float32)))
    # Neighbours of the edge weigh 2e-5 or more in the middle of a law, so few lie so near to p.
    assert check(logp_BTV, rows) <= 3


def test_a_split_vocabulary_stays_split(mesh):
    """The same ids, from sums on each device: no exchange of anything as large as the vocabulary, and no sort."""
    rng = np.random.default_rng(1)
    filters = [(3, 0.9), (0, 0.5), (5, 1.0), (0, 1.0), (0, 0.3), (1, 0.5), (7, 0.7), (7, 0.7)]
    rows = [(0.7, k, p) for k, p in filters]
    logp_BTV = np.stack([[law(kind % 6, rng)] for kind in range(ROWS)])
    expected_BTV = kept(logp_BTV, rows)
    with tiny.mesh(data=2, tensor=4) as split:
        spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
        args = jax.device_put(logp_BTV, jax.NamedSharding(split, spec)), sampling(rows)
        lowered = process.lower(*args, filtered=True)
        found_BTV = process(*args, filtered=True)
        assert jax.typeof(found_BTV).sharding.spec == spec
        np.testing.assert_array_equal(np.asarray(found_BTV) > NEVER, expected_BTV)
        assert "stablehlo.sort" not in lowered.as_text()
        text = str(lowered.compile().as_text())
    assert not re.search(rf"{VOCAB}\]\S* all-gather", text)
