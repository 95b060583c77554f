"""One training step: accumulated, donated, measured and compiled once; and it learns."""

import contextlib
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import OptimizerConfig
from mtp_jax.parameters import row
from mtp_jax.train import step as step_module
from mtp_jax.train.step import make_trainer
from support import tiny

# A large eps: Adam's step is then a smooth function of the gradient, and no rounding error of a small one is blown up.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=4, eps=1e-2, clip_norm=1.0)


# What is compared here is one program with another; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation", "mesh")


@contextlib.contextmanager
def compilations():
    """What JAX says of tracing and compiling the step, while it lasts."""
    messages, logger, handler = [], logging.getLogger("jax"), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield (said for said in messages if "train_step" in said)
    finally:
        logger.removeHandler(handler)


def make_config(parts=1, **changes):
    head = tiny.head_config(balance="none")
    return tiny.train_config(head=head, optimizer=OPTIMIZER, steps=40, grad_accumulation=parts, **changes)


@pytest.fixture(scope="module")
def trainer():
    return make_trainer(make_config())


@pytest.fixture(scope="module")
def initial(trainer):
    return trainer.init()


def fresh(initial):
    """A copy of the initial state: the step donates what it is given."""
    return jax.tree.map(lambda a: jax.device_put(np.array(a), a.sharding), initial)


@pytest.mark.slow
def test_the_average_is_the_mean_of_all_steps_and_then_exponential(initial):
    """The initial parameters have no weight, and the parameters do not depend on the average."""
    decay, trainer = 0.75, make_trainer(make_config(ema_decay=0.75))
    state, plain = trainer.init(), make_trainer(make_config())
    other, seen = plain.init(), []
    for _ in range(7):
        state, _ = trainer.step(state, tiny.make_batch(make_config()))
        other, _ = plain.step(other, tiny.make_batch(make_config()))
        seen.append(np.asarray(state.params["trunk"]["norm"]["scale"], np.float64))
        np.testing.assert_array_equal(other.params["trunk"]["norm"]["scale"], state.params["trunk"]["norm"]["scale"])
        expected = np.mean(seen[:4], axis=0)
        for later in seen[4:]:
            expected = decay * expected + (1 - decay) * later
        np.testing.assert_allclose(state.ema["trunk"]["norm"]["scale"], expected, rtol=1e-6)
    assert other.ema is None and np.ptp(seen, axis=0).min() > 1e-4
    for ema, params in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
        assert (ema.dtype, ema.shape, ema.sharding) == (jnp.float32, params.shape, params.sharding)


def uneven_batch(seed=0):
    """A batch whose rows, and so whose parts, have very different numbers of valid targets at every offset."""
    batch = tiny.make_batch(make_config(), seed)
    valid_BTW = np.array(batch["valid_BTW"])
    valid_BTW[::4] = False
    valid_BTW[1::4, :, 2:] = False
    valid_BTW[2::4, 3:] = False
    return {**batch, "valid_BTW": tiny.shard(valid_BTW)}


def assert_close(tree, expected, tolerance):
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        atol = tolerance * max(1e-3, float(np.abs(other).max()))
        np.testing.assert_allclose(leaf, other, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def first_step(trainer, initial):
    """The state and the metrics after one step on the uneven batch, unaccumulated, and what was compiled for it."""
    with compilations() as messages:
        result = jax.device_get(trainer.step(fresh(initial), uneven_batch()))
    return *result, list(messages)


@pytest.fixture(scope="module")
def after_one_step(first_step):
    return first_step[:2]


# Accumulation


def assert_accumulates(initial, after_one_step, parts):
    """The loss, every metric, every parameter and every moment are those of one part."""
    state, metrics = make_trainer(make_config(parts)).step(fresh(initial), uneven_batch())
    assert_close(metrics, after_one_step[1], 1e-5)
    assert_close(jax.device_get(state), after_one_step[0], 1e-5)


def test_the_parts_of_a_batch_differ_in_their_counts():
    counts = np.asarray(uneven_batch()["valid_BTW"]).reshape(-1, 4, 16, tiny.WINDOW).sum((0, 2))
    assert len(np.unique(counts, axis=0)) == 4 and counts.min() == 0


@pytest.mark.parametrize("parts", [4])
def test_accumulating_changes_nothing(parts, initial, after_one_step):
    assert_accumulates(initial, after_one_step, parts)


@pytest.mark.parametrize(
    "batch, parts, shape",
    [(1, 1, (1, 1, 1)), (8, 8, (1, 1, 1)), (8, 4, (2, 1, 1)), (8, 2, (2, 2, 2)), (8, 1, (8, 1, 1)), (16, 2, (2, 2, 2))],
)
def test_a_part_may_be_one_row_for_each_device(batch, parts, shape):
    """Traced only: what breaks is the sharding of axes of size one."""
    config = make_config(parts, batch=batch)
    config.check_mesh(shape)
    with tiny.mesh(*shape):
        trainer = make_trainer(config)
        state, metrics = jax.eval_shape(trainer.step, jax.eval_shape(trainer.init), tiny.make_batch(config))
    assert metrics["loss"].shape == ()
    assert state.params["embed_VD"].sharding.spec == row("embed_VD").spec


def test_a_mean_of_the_parts_means_is_noticed(monkeypatch, initial, after_one_step):
    """The usual mistake: every part is averaged over its own targets, and then the parts are."""
    right = step_module.batch_loss

    def wrong(graph, params, batch, counts_2W, key, **own):
        return right(graph, params, batch, 4 * step_module.target_counts([batch]), key, **own)

    monkeypatch.setattr(step_module, "batch_loss", wrong)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_accumulates(initial, after_one_step, 4)


# The state


def test_the_state_is_donated_whole(trainer, initial):
    state = fresh(initial)
    new, _ = trainer.step(state, uneven_batch())
    kept = [jax.tree_util.keystr(p) for p, a in jax.tree_util.tree_leaves_with_path(state) if not a.is_deleted()]
    assert not kept
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), initial)


def test_the_step_is_counted_and_sets_the_rate(trainer, initial):
    state = fresh(initial)
    assert int(state.step) == 0
    for step in range(6):
        state, metrics = trainer.step(state, uneven_batch())
        assert int(state.step) == step + 1
        # Four steps of warm-up, the first of which learns; then a cosine.
        if step <= 4:
            np.testing.assert_allclose(metrics["learning_rate"], 1e-2 * (step + 1) / 5, rtol=1e-5)
        else:
            assert 0.9e-2 < metrics["learning_rate"] < 1e-2


def test_the_first_step_moves_every_parameter(initial, after_one_step):
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), after_one_step[0].params, initial.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


# Metrics


def test_metrics_have_these_names_and_shapes(after_one_step):
    expected = {
        "loss": (),
        "loss_offset": (tiny.WINDOW,),
        "loss_first_token": (),
        "gate_share": (tiny.RANK,),
        "gate_entropy": (),
        "grad_norm": (),
        "learning_rate": (),
    }
    metrics = after_one_step[1]
    assert {name: value.shape for name, value in metrics.items()} == expected
    assert all(value.dtype == np.float32 and np.all(np.isfinite(value)) for value in metrics.values())


def test_metrics_agree_with_each_other(after_one_step):
    metrics = after_one_step[1]
    np.testing.assert_allclose(metrics["loss"], metrics["loss_offset"].sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_first_token"], metrics["loss_offset"][0], rtol=1e-6)
    np.testing.assert_allclose(metrics["gate_share"].sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["gate_share"], 1 / tiny.RANK, rtol=1e-5)
    np.testing.assert_allclose(metrics["gate_entropy"], np.log(tiny.RANK), rtol=1e-5)
    # Parameters of noise know nothing: the loss is about log V at every offset.
    assert np.all(np.abs(metrics["loss_offset"] - np.log(tiny.VOCAB)) < 2)


def test_the_gradient_norm_is_that_before_clipping(initial, after_one_step):
    """The first moments are (1 - beta1) times the clipped gradient, whose norm is `clip_norm`."""
    state, metrics = after_one_step
    assert metrics["grad_norm"] > 2 * OPTIMIZER.clip_norm
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if ".mu" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == len(jax.tree.leaves(initial.params))
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in moments))
    np.testing.assert_allclose(norm, 0.1 * OPTIMIZER.clip_norm, rtol=1e-4)


def test_evaluation_is_the_training_loss_at_the_same_parameters(trainer, initial, after_one_step):
    batch = uneven_batch()
    loss, aux = trainer.evaluate(fresh(initial).params, batch, step_module.target_counts([batch]))
    metrics = after_one_step[1]
    assert_close({"loss": loss, **aux}, {name: metrics[name] for name in ("loss", *aux)}, 1e-6)


def test_a_batch_without_targets_has_loss_zero_and_finite_gradients(trainer, initial):
    batch = uneven_batch()
    batch["valid_BTW"] = tiny.shard(np.zeros(batch["valid_BTW"].shape, bool))
    state, metrics = trainer.step(fresh(initial), batch)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.device_get(state)))


# Learning


def test_the_loss_falls_on_a_batch_that_is_repeated(trainer, initial):
    state, batch, losses = fresh(initial), tiny.make_batch(make_config()), []
    for _ in range(30):
        state, metrics = trainer.step(state, batch)
        losses.append(np.asarray(metrics["loss_offset"]))
    first, last = losses[0], losses[-1]
    assert np.all(last < first - 0.5), "every offset learns"
    assert last.sum() < 0.75 * first.sum()


def test_the_seed_of_the_config_is_that_of_the_parameters(monkeypatch):
    """Every weight is filled with one number of its key: that takes less time to compile."""

    def fill(key, shape, dtype, out_sharding):
        return jnp.ones(shape, out_sharding=out_sharding) * jax.random.uniform(key)

    monkeypatch.setattr(jax.random, "normal", fill)
    params = [make_trainer(dataclasses.replace(make_config(), seed=seed)).init().params for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, params[0], params[1])
    differ = jax.tree.map(lambda a, b: bool(np.all(a != b)), params[0], params[2])
    for path, different in jax.tree_util.tree_leaves_with_path(differ):
        assert different or path[-1].key in ("scale", "gate_DR"), jax.tree_util.keystr(path)


# Compilation


def test_only_the_first_step_compiles(trainer, initial, first_step):
    """Not those on the state that a step returned, on another batch, or on a state that was made anew."""
    assert first_step[2], "what is looked for is said when the step is compiled"
    with compilations() as messages:
        state, _ = trainer.step(fresh(initial), uneven_batch())
        for seed in range(2):
            state, _ = trainer.step(state, tiny.make_batch(make_config(), seed))
    assert not list(messages)
