"""Load balancing by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.losses.balance import balance_loss
from support import tiny
from support.mixture_losses import R, log_softmax

pytestmark = pytest.mark.usefixtures("mesh", "float64")


def run_balance(balance, form, z_BTR, weight_BT):
    """The penalty and its gradient with respect to the gate's logits."""
    compiled = jax.jit(jax.value_and_grad(lambda z, weight: balance(form, jax.nn.log_softmax(z, axis=-1), weight)))
    value, gradient = compiled(tiny.shard(z_BTR.astype(np.float32)), tiny.shard(weight_BT.astype(np.float32)))
    return float(value), np.asarray(gradient)


def make_gate(seed=0):
    """Logits of the gate of two rows of six positions, and weights that sum to 1, some of them 0."""
    rng = np.random.default_rng(seed)
    weight_BT = rng.random((2, 6)) * (rng.random((2, 6)) < 0.8)
    return 2 * rng.standard_normal((2, 6, R)) + np.arange(R), weight_BT / weight_BT.sum()


def gate_shares(z_BTR, weight_BT):
    """The mean weight of each component, and the fraction of positions at which it is the largest."""
    w_BTR = np.exp(log_softmax(z_BTR))
    mean_R = np.einsum("bt,btr->r", weight_BT, w_BTR)
    return mean_R, np.einsum("bt,btr->r", weight_BT, np.eye(R)[w_BTR.argmax(-1)])


def check_values(balance):
    """By hand, with positions of unequal weight: squared distance from equal shares, and the Switch form."""
    z_BTR, weight_BT = make_gate()
    mean_R, first_R = gate_shares(z_BTR, weight_BT)
    squared, switch = (run_balance(balance, form, z_BTR, weight_BT)[0] for form in ("squared", "switch"))
    np.testing.assert_allclose(squared, ((mean_R - 1 / R) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(switch, R * first_R @ mean_R, rtol=1e-5)


def check_extremes(balance):
    """Decided positions with equal shares have the least penalty; one component that takes all has the most."""
    weight_BT = np.full((2, 6), 1 / 12)
    decided_BTR = 50 * np.eye(R)[np.arange(12) % R].reshape(2, 6, R)
    collapsed_BTR = 50 * np.broadcast_to(np.eye(R)[0], (2, 6, R))
    for form, least, most in ("squared", 0, 1 - 1 / R), ("switch", 1, R):
        equal = run_balance(balance, form, decided_BTR, weight_BT)[0]
        np.testing.assert_allclose(equal, least, rtol=1e-5, atol=1e-10)
        np.testing.assert_allclose(run_balance(balance, form, collapsed_BTR, weight_BT)[0], most, rtol=1e-5)


def check_direction(balance):
    """A step against the gradient evens the shares."""
    z_BTR, weight_BT = make_gate()
    before_R = gate_shares(z_BTR, weight_BT)[0]
    for form in "squared", "switch":
        step = run_balance(balance, form, z_BTR, weight_BT)[1]
        after_R = gate_shares(z_BTR - step / np.abs(step).max(), weight_BT)[0]
        assert np.ptp(after_R) < 0.95 * np.ptp(before_R), f"{form} does not even the shares"


def check_parts(balance):
    """Micro-batches: weights add up to 1 over all parts, so equal parts give the whole and others no less."""
    z_BTR, weight_BT = make_gate()
    for form in "squared", "switch":
        whole, gradient = run_balance(balance, form, z_BTR, weight_BT)
        part, part_gradient = run_balance(balance, form, z_BTR, weight_BT / 4)
        np.testing.assert_allclose(4 * part, whole, rtol=1e-5)
        np.testing.assert_allclose(4 * part_gradient, gradient, rtol=1e-4, atol=1e-7)
    split = [run_balance(balance, "squared", z_BTR, weight_BT * rows)[0] for rows in ([[1], [0]], [[0], [1]])]
    assert sum(split) >= run_balance(balance, "squared", z_BTR, weight_BT)[0] > 1e-3


@pytest.mark.parametrize("check", [check_values, check_extremes, check_direction, check_parts])
def test_balance(check):
    check(balance_loss)


def per_position(form, log_w_BTR, weight_BT):
    distance_BT = jnp.square(jnp.exp(log_w_BTR) - 1 / R).sum(-1)
    return jnp.sum(weight_BT * distance_BT) if form == "squared" else balance_loss(form, log_w_BTR, weight_BT)


def unweighted(form, log_w_BTR, weight_BT):
    return balance_loss(form, log_w_BTR, jnp.full_like(weight_BT, 1 / 12))


BALANCE_FAULTS = {
    "every position on its own": (per_position, check_extremes),
    "masked positions counted": (unweighted, check_values),
    "wrong sign": (lambda *args: -balance_loss(*args), check_direction),
    "share of the part forgotten": (lambda *args: balance_loss(*args) / jnp.sum(args[2]), check_parts),
}


@pytest.mark.parametrize("fault", BALANCE_FAULTS)
def test_fault_of_balance_is_caught(fault):
    balance, check = BALANCE_FAULTS[fault]
    with pytest.raises(AssertionError, match=r"Not equal to tolerance|does not even"):
        check(balance)


def test_switch_gradient_takes_the_fractions_as_constants():
    z_BTR, weight_BT = make_gate()
    w_BTR, (_, first_R) = np.exp(log_softmax(z_BTR)), gate_shares(z_BTR, weight_BT)
    # The derivative of w_r with respect to z_q is w_r (1[q = r] - w_q).
    want = R * weight_BT[..., None] * w_BTR * (first_R - (w_BTR @ first_R)[..., None])
    np.testing.assert_allclose(run_balance(balance_loss, "switch", z_BTR, weight_BT)[1], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["squared", "switch"])
def test_part_without_targets_has_no_penalty(form):
    value, gradient = run_balance(balance_loss, form, make_gate()[0], np.zeros((2, 6)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
