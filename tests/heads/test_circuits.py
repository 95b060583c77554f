"""Circuits as laws: every window that there is, by the sum over all assignments of components, for any factors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.heads.circuits import CPD, HMM, BTree, btree, transitions
from mtp_jax.heads.circuits.transitions import STAY
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.registry import check_head
from mtp_jax.losses.mixture import conditionals, prefix_weights
from mtp_jax.validate import ConfigError
from support.circuits import parents, prefixes
from support.heads import D, hidden, log_softmax, make, run, seen

V, R = 4, 3
JOINT = {"hmm": HMM, "btree": BTree}
pytestmark = pytest.mark.usefixtures("mesh")


def problem(circuit, window, seed=0):
    """log w, log T and log p as numpy arrays, for one hidden state."""
    rng, matrices = np.random.default_rng(seed), JOINT[circuit].matrices(window)
    draw = lambda *shape: log_softmax(1.5 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    return draw(1, 1, R), draw(1, 1, matrices, R, R), draw(R, window, V)


@functools.cache
def compiled(law):
    return jax.jit(lambda *unfolded: conditionals(law, unfolded[:2], unfolded[2]))


def every_window(circuit, window):
    """The conditionals of each window, ours and by enumeration: `[V^W, W]`."""
    log_w, log_T, logp_RWV = problem(circuit, window)
    windows_NW = np.array(list(itertools.product(range(V), repeat=window)))
    logp_NRW = np.moveaxis(logp_RWV[:, np.arange(window), windows_NW], 0, 1)
    many = [np.repeat(a, len(windows_NW), axis=1) for a in (log_w, log_T)]
    ours = np.asarray(compiled(JOINT[circuit])(*many, logp_NRW[None]))[0]
    theirs = np.asarray(prefixes(circuit, log_w[0, 0], log_T[0, 0], logp_NRW), np.float64)
    return ours, np.diff(theirs, axis=-1, prepend=0.0)


@pytest.mark.parametrize("circuit", JOINT)
@pytest.mark.parametrize("window", [2, 3, 4, 5, 6])
def test_prefix_conditionals_are_those_of_the_sum_over_assignments(circuit, window):
    ours, theirs = every_window(circuit, window)
    np.testing.assert_allclose(ours, theirs, atol=3e-6)
    np.testing.assert_allclose(np.exp(ours.sum(-1, dtype=np.float64)).sum(), 1, atol=3e-6)


@pytest.mark.parametrize("circuit", JOINT)
def test_components_change_along_the_window(circuit):
    """The law is not that of products, and the weights of every offset are normalised."""
    log_w, log_T, logp_RWV = problem(circuit, 4)
    logp_11RW = logp_RWV[None, None, :, np.arange(4), [0, 1, 2, 3]]
    weights = np.exp(prefix_weights(JOINT[circuit], (log_w, log_T), jnp.asarray(logp_11RW)))
    np.testing.assert_allclose(weights.sum(2), 1, rtol=1e-5)
    products = np.exp(prefix_weights(CPD, log_w, jnp.asarray(logp_11RW)))
    assert np.abs(weights - products)[..., 2:].max() > 0.05


def test_the_tree_halves_its_offsets():
    nodes, leaves = parents("btree", 8)
    assert nodes == [-1, 0, 1, 1, 0, 4, 4] and leaves == [2, 2, 3, 3, 5, 5, 6, 6]
    assert [BTree.matrices(n) for n in (2, 3, 8, 16)] == [0, 1, 6, 14] and HMM.matrices(8) == 7
    for leaves in range(2, 18):
        above, of = parents("btree", leaves)
        assert len(btree._nodes(leaves)) == len(above) == leaves - 1
        assert [len(btree._above(leaves, leaf)) for leaf in range(leaves)] == [depth(above, node) for node in of]


def depth(above, node):
    return 0 if node < 0 else 1 + depth(above, above[node])


@pytest.mark.parametrize("circuit", JOINT)
@pytest.mark.parametrize("width", [0, 2])
def test_transitions_begin_near_the_identity(circuit, width, monkeypatch):
    """At it, the law is that of the mixture of products with the same factors."""
    x_BTD = hidden(1, 2, 3, D)
    zeros = {"trans_DMRR": 0.0, "trans_EMRR": 0.0}
    values = {name: np.zeros((2 if name == "trans_EMRR" else D, JOINT[circuit].matrices(4), R, R)) for name in zeros}
    model = make(circuit=circuit, circuit_width=width, values=values)
    unfolded = run(lambda m, x: m.head._unfolded(x), model, x_BTD)
    want = (1 - STAY) * np.eye(R) + STAY / R
    np.testing.assert_allclose(np.exp(unfolded[1]), np.broadcast_to(want, unfolded[1].shape), atol=1e-6)
    plain = make(circuit="cpd")
    targets = np.random.default_rng(0).integers(0, V, (2, 3, 4)).astype(np.int32)
    likelihood = lambda m, x, t: m.head.log_likelihood(seen(m, x), t)  # noqa: E731
    product = run(likelihood, plain, x_BTD, targets)
    near = run(likelihood, model, x_BTD, targets)
    monkeypatch.setattr(transitions, "STAY", 1e-9)
    at = run(likelihood, model, x_BTD, targets)
    np.testing.assert_allclose(at, product, atol=1e-5)
    assert 1e-4 < np.abs(near - product).max() < 0.2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"circuit": "hmm", "rank": 1}, "circuit is hmm and rank is 1; its components change"),
        ({"circuit": "btree", "window": 1}, "circuit is btree and it is over 1 offset"),
        (
            {"circuit": "hmm", "window": 2, "encoder": "token", "target": "ntp"},
            "circuit is hmm and it is over 1 offset",
        ),
        ({"circuit": "cpd", "circuit_width": 4}, "circuit_width is 4 and circuit is cpd, which has no transitions"),
    ],
)
def test_what_a_circuit_cannot_have_is_refused(changes, words):
    config = HeadConfig(**{"rank": 3, **changes})
    with pytest.raises(ConfigError, match=words):
        check_head(config).check(config)


HMM_ADVANCE, BTREE_ADVANCE = HMM.advance, BTree.advance


def stepping(change):
    """A chain whose matrices are changed at each step."""

    def advance(carry, score_R, offset):
        (log_alpha_R, _), weights = HMM_ADVANCE((carry[0], change(carry[1])), score_R, offset)
        return (log_alpha_R, carry[1]), weights

    return advance


FAULTS = {
    "a matrix of another place": ("hmm", stepping(lambda log_T: log_T[..., ::-1, :, :])),
    "a matrix the other way round": ("hmm", stepping(lambda log_T: jnp.swapaxes(log_T, -1, -2))),
    "half of what ends is not told": ("btree", lambda carry, score, s: BTREE_ADVANCE(carry, score * (s != 2), s)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, monkeypatch):
    circuit, wrong = FAULTS[fault]
    monkeypatch.setattr(JOINT[circuit], "advance", staticmethod(wrong))
    compiled.cache_clear()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_prefix_conditionals_are_those_of_the_sum_over_assignments(circuit, 4)
    compiled.cache_clear()
