"""Training with less work: what is drawn at random gives the exact gradient on average.

Means over S draws are compared with the exact value in units of their own standard error. Over n independent entries
the mean square of such z is 1 with standard deviation sqrt(2/n); entries here hang together, so the bound is 2, which
fixed seeds pass and which a bias of 1.5 standard errors in every entry fails. Each deliberate fault below does.
"""

import functools

import jax
import numpy as np
import pytest

from mtp_jax.heads.circuits import CPD
from mtp_jax.heads.factors import FACTORS
from mtp_jax.losses.mixture import Terms, mixture_loss
from mtp_jax.losses.subsample import subsample
from mtp_jax.parameters import row
from mtp_jax.state import build_model, split
from mtp_jax.train.step import batch_loss, make_trainer, target_counts
from support import tiny

B, T, W, R, D, V, S = 2, 6, 3, 4, 6, 11, 2000


@pytest.fixture(autouse=True)
def mesh():
    with tiny.mesh() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def problem():
    """Parameters of shared factors, and arrays whose offsets have unequal counts, so that some coefficients are < 0."""
    rng = np.random.default_rng(0)
    params = {"map_DRWD": rng.standard_normal((D, R, W, D)), "unembed_VD": rng.standard_normal((V, D))}
    valid = np.arange(W) < rng.integers(1, W + 1, (B, T, 1))
    log_w = np.array(jax.nn.log_softmax(rng.standard_normal((B, T, R))))
    arrays = rng.standard_normal((B, T, D)), log_w, rng.integers(0, V, (B, T, W)), valid / valid.sum((0, 1))
    return jax.tree.map(lambda a: a.astype(np.int32 if a.dtype == np.int64 else np.float32), (params, arrays))


def mean_square_z(samples, exact):
    """Mean over the entries of the square of (mean over S - exact) in standard errors; S is the first axis.

    Entries that hardly vary are left out: what they do in rare draws, S of them do not show.
    """
    error = samples.std(axis=0) / np.sqrt(len(samples))
    seen = error > error.max() / 20
    return np.mean(((samples.mean(axis=0) - exact)[seen] / error[seen]) ** 2)


def gradients(problem, sampled):
    """S gradients of the parameters, hidden states and gate by `sampled(key, params, *arrays)`, and the exact ones."""
    params, arrays = problem
    mesh = jax.sharding.get_mesh()
    placed = {n: jax.device_put(a, jax.NamedSharding(mesh, row(n).spec)) for n, a in params.items()}
    on_mesh = [tiny.shard(a) for a in arrays]

    def flat(loss):
        found = jax.grad(loss, argnums=(0, 1, 2))(placed, on_mesh[0], on_mesh[1])
        return [found[0]["map_DRWD"], found[0]["unembed_VD"], found[1], found[2]]

    one = jax.jit(lambda key: flat(lambda p, x, w: sampled(key, p, x, w, *on_mesh[2:])))
    keys = jax.random.split(jax.random.key(1), S)
    samples = [np.stack(s) for s in zip(*([np.asarray(a) for a in one(key)] for key in keys), strict=True)]
    exact = jax.jit(
        lambda: flat(lambda p, x, w: mixture_loss(FACTORS["shared"], Terms(CPD, 0.8), p, x, w, *on_mesh[2:])[0])
    )()
    return samples, [np.asarray(a) for a in exact]


def by_positions(key, params, *arrays):
    return mixture_loss(FACTORS["shared"], Terms(CPD, 0.8), params, *subsample(key, 0.5, *arrays))[0]


def test_drawn_positions_have_the_exact_gradient_on_average(problem):
    samples, exact = gradients(problem, by_positions)
    for sample, truth in zip(samples, exact, strict=True):
        assert mean_square_z(sample, truth) < 2


def test_positions_that_are_not_scaled_up_are_noticed(problem):
    def unscaled(key, params, *arrays):
        x, log_w, targets, weights = subsample(key, 0.5, *arrays)
        return mixture_loss(FACTORS["shared"], Terms(CPD, 0.8), params, x, log_w, targets, weights / 2)[0]

    samples, exact = gradients(problem, unscaled)
    assert mean_square_z(samples[0], exact[0]) > 2


def chosen_places(*shape):
    """Which of 12 positions each of 8 rows keeps; checked to be 4 in order, of its own row, scaled by 3."""
    with tiny.mesh(*shape):
        numbers = np.arange(8 * 12).reshape(8, 12, 1)
        arrays = [tiny.shard(a) for a in (numbers, numbers, numbers, np.ones((8, 12, 1), np.float32))]
        found = jax.jit(lambda key: subsample(key, 1 / 3, *arrays))(jax.random.key(0))
        assert [a.sharding.spec[0] for a in found] == [("data", "fsdp")] * 4
        x, _, targets, weights = jax.device_get(found)
    assert x.shape == (8, 4, 1) and (weights == 3).all()
    np.testing.assert_array_equal(x, targets)
    places = x[..., 0] % 12
    assert (x[..., 0] // 12 == np.arange(8)[:, None]).all() and (np.diff(places, axis=1) > 0).all()
    assert len({tuple(row) for row in places}) > 4
    return places


def test_positions_do_not_depend_on_the_mesh():
    np.testing.assert_array_equal(chosen_places(1, 1, 1), chosen_places(2, 2, 2))


def test_a_step_draws_anew_and_an_evaluation_does_not():
    head = tiny.head_config(factors="shared", loss_fraction=0.5)
    config = tiny.train_config(head=head)
    trainer = make_trainer(config)
    state, batch = trainer.init(), tiny.make_batch(config)
    counts_2W = target_counts([batch])
    graph, _ = split(build_model(config, jax.random.key(0)))
    loss = jax.jit(functools.partial(batch_loss, graph))
    first, second = (float(loss(state.params, batch, counts_2W, jax.random.key(seed))[0]) for seed in (0, 1))
    exact = float(loss(state.params, batch, counts_2W)[0])
    assert len({first, second, exact}) == 3
    assert exact == float(trainer.evaluate(state.params, batch, counts_2W)[0])


@pytest.mark.slow
def test_drawn_positions_have_one_gradient_on_any_mesh():
    """Devices that share a batch draw alike, with the vocabulary in parts too."""
    found = []
    for mesh in (1, 1, 1), (2, 2, 2), (1, 1, 4):
        model, head = tiny.model_config(num_kv_heads=4), tiny.head_config(loss_fraction=0.5)
        config = tiny.train_config(model, head, grad_accumulation=2)
        with tiny.mesh(*mesh):
            trainer = make_trainer(config)
            state, metrics = trainer.step(trainer.init(), tiny.make_batch(config))
            found.append(jax.device_get((metrics, state.opt_state)))
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1e-2, np.abs(a).max())), found[0], other
        )
