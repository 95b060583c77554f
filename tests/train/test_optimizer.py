"""How every parameter is updated: its group by name, its matrices one by one, decay, schedules and clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax.config import OptimizerConfig
from mtp_jax.parameters import PARAMETERS
from mtp_jax.state import build_model, split
from mtp_jax.train.optimizer import SETTLED, dimension_numbers, make_optimizer, make_schedule, skipping
from support import tiny

pytestmark = pytest.mark.usefixtures("mesh")


VECTOR = None
# Every parameter that a model can have: a vector (Adam, no decay), or a matrix by its (input axes, output axes), the
# layers' axis counted. All other axes are batch axes.
TRUNK = {
    "embed_VD": VECTOR,
    "trunk.norm.scale": VECTOR,
    "trunk.blocks.attention_norm.scale": VECTOR,
    "trunk.blocks.feed_forward_norm.scale": VECTOR,
    "trunk.blocks.attention.q_norm.scale": VECTOR,
    "trunk.blocks.attention.k_norm.scale": VECTOR,
    "trunk.blocks.attention.bq_NH": VECTOR,
    "trunk.blocks.attention.bk_KH": VECTOR,
    "trunk.blocks.attention.bv_KH": VECTOR,
    "trunk.blocks.attention.wq_DNH": ((1,), (2, 3)),
    "trunk.blocks.attention.wk_DKH": ((1,), (2, 3)),
    "trunk.blocks.attention.wv_DKH": ((1,), (2, 3)),
    "trunk.blocks.attention.wo_NHD": ((1, 2), (3,)),
    "trunk.blocks.feed_forward.w_gate_DF": ((1,), (2,)),
    "trunk.blocks.feed_forward.w_up_DF": ((1,), (2,)),
    "trunk.blocks.feed_forward.w_down_FD": ((1,), (2,)),
    # The table of target `ntp` and of shared and low-rank factors.
    "unembed_VD": VECTOR,
}
GATE = {"head.circuit.gate_DR": VECTOR}
FACTORS = {
    "full": {"head.factors.u_DRWV": ((0,), (3,))},
    "shared": {"head.factors.map_DRWD": ((0,), (3,))},
    "residual": {"head.factors.residual_DRWD": ((0,), (3,))},
    "lowrank": {
        "head.factors.map_DWD": ((0,), (2,)),
        "head.factors.down_DRWE": ((0,), (3,)),
        "head.factors.up_ED": ((0,), (1,)),
    },
    "lora": {
        "head.factors.u_DWV": ((0,), (2,)),
        "head.factors.down_DRWE": ((0,), (3,)),
        "head.factors.up_EV": ((0,), (1,)),
    },
}
GROUPS = {kind: {**TRUNK, **GATE, **factors} for kind, factors in FACTORS.items()}
GROUPS["token"] = {
    **TRUNK,
    "head.mixture.circuit.gate_DR": VECTOR,
    "head.mixture.factors.map_DRWD": ((0,), (3,)),
    "head.encoder.hidden_norm.scale": VECTOR,
    "head.encoder.token_norm.scale": VECTOR,
    "head.encoder.join_gate_CF": ((0,), (1,)),
    "head.encoder.join_up_CF": ((0,), (1,)),
    "head.encoder.join_down_FD": ((0,), (1,)),
}
GROUPS["hmm"] = {**GROUPS["full"], "head.circuit.trans_DMRR": VECTOR}
GROUPS["narrow hmm"] = {
    **GROUPS["full"],
    "head.circuit.trans_down_DE": VECTOR,
    "head.circuit.trans_EMRR": VECTOR,
}
BLOCK = {path.removeprefix("trunk.blocks."): found for path, found in TRUNK.items() if path.startswith("trunk.blocks.")}
GROUPS["sequential"] = {
    **TRUNK,
    **{f"head.stages.block.{path}": found for path, found in BLOCK.items()},
    "head.stages.hidden_norm.scale": VECTOR,
    "head.stages.token_norm.scale": VECTOR,
    "head.stages.join_CD": ((1,), (2,)),
}
GROUPS["block"] = {
    **TRUNK,
    **{f"head.encoder.stages.{path}": found for path, found in BLOCK.items()},
    "head.mixture.circuit.gate_DR": VECTOR,
    "head.mixture.factors.map_DRWD": ((0,), (3,)),
    "head.encoder.hidden_norm.scale": VECTOR,
    "head.encoder.token_norm.scale": VECTOR,
    "head.encoder.tap_norm.scale": VECTOR,
    "head.encoder.join_CD": ((0,), (1,)),
}
HEADS = {
    "block": dict(factors="shared", encoder="block", encoder_layers=2, taps=(1,)),
    "token": dict(factors="shared", encoder="token"),
    "hmm": dict(factors="full", circuit="hmm"),
    "narrow hmm": dict(factors="full", circuit="hmm", circuit_width=2),
    "sequential": dict(kind="sequential", attention=True, per_offset=True),
}


def shapes_of(kind):
    """The shapes of all parameters of a model with everything."""
    model = tiny.model_config(qkv_bias=True, qk_norm=True)
    head = HEADS.get(kind, dict(factors=kind))
    config = tiny.train_config(model, tiny.head_config(**head, target="ntp"))
    return split(jax.eval_shape(lambda: build_model(config, jax.random.key(0))))[1]


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), shapes)


def paths(tree, is_leaf=None):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def groups(shapes):
    numbers = dimension_numbers(shapes)
    return paths(numbers, is_leaf=lambda node: node is None or isinstance(node, optax.contrib.MuonDimensionNumbers))


def make_config(name, **changes):
    return OptimizerConfig(**{**dict(name=name, learning_rate=0.1, schedule="constant", warmup_steps=0), **changes})


# Groups


@pytest.mark.parametrize("kind", GROUPS)
def test_every_parameter_is_in_its_group(kind):
    found = {path: numbers and tuple(numbers) for path, numbers in groups(shapes_of(kind)).items()}
    assert found == GROUPS[kind]


@pytest.mark.parametrize("kind", GROUPS)
def test_a_matrix_maps_its_inputs_to_its_outputs(kind):
    """By the letters of the name: the first half goes in; L, R and W are batch axes."""
    for path, leaf in paths(shapes_of(kind)).items():
        if GROUPS[kind][path] is VECTOR:
            continue
        inputs, outputs = GROUPS[kind][path]
        letters = (
            "L" * path.startswith(("trunk.blocks.", "head.stages.", "head.encoder.stages.")) + path.rsplit("_", 1)[1]
        )
        assert len(letters) == leaf.ndim
        batch = {letters[axis] for axis in range(leaf.ndim) if axis not in inputs + outputs}
        assert batch == set(letters) & set("LRW"), path


def test_an_unknown_parameter_is_refused_by_its_name():
    shapes = shapes_of("full")
    shapes["trunk"]["blocks"]["attention"]["w_new_DD"] = jnp.zeros((2, 16, 16))
    for name in ("adamw", "muon"):
        with pytest.raises(KeyError, match=r"w_new_DD has no row in PARAMETERS of mtp_jax\.parameters; add one"):
            make_optimizer(make_config(name), 10, shapes)


def test_no_row_is_unused():
    used = {path.split(".")[-1] for kind in GROUPS.values() for path in kind}
    assert {name for name, row in PARAMETERS.items() if row.trained} == used


# Updates


def orthogonalised(matrix):
    """Five Newton-Schulz iterations, as Jordan's Muon has them, on one matrix in float64."""
    x = np.asarray(matrix, np.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def slice_by_slice(grad, numbers):
    """The step of a stacked weight from those of its slices, each alone."""
    inputs, outputs = numbers
    batch = tuple(axis for axis in range(grad.ndim) if axis not in inputs + outputs)
    order = batch + inputs + outputs
    moved = np.transpose(grad, order)
    fan_in, fan_out = (int(np.prod([grad.shape[axis] for axis in axes])) for axes in (inputs, outputs))
    step = np.zeros(moved.shape)
    for index in np.ndindex(moved.shape[: len(batch)]):
        alone = orthogonalised(moved[index].reshape(fan_in, fan_out))
        step[index] = (0.2 * max(fan_in, fan_out) ** 0.5 * alone).reshape(moved.shape[len(batch) :])
    return np.transpose(step, np.argsort(order))


# Every group at once: no model has all kinds of factors, and the optimizer does not mind.
EVERYTHING = {path: numbers for kind in GROUPS.values() for path, numbers in kind.items()}
DECAY = 0.5


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def make_update(name, wanted=EVERYTHING):
    """The first step of an optimizer, compiled, and random parameters for it."""
    shapes = {path: leaf for kind in GROUPS for path, leaf in paths(shapes_of(kind)).items() if path in wanted}
    params = random_like(nested(shapes), 0)
    optimizer = make_optimizer(make_config(name, weight_decay=DECAY, eps=1e-12), 10, params)
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])
    return update, params


@pytest.fixture(scope="module")
def updates():
    return {name: make_update(name) for name in ("adamw", "muon")}


def assert_muon_takes_slices_alone(update, params):
    grads = random_like(params, 1)
    moved, flat_params = paths(update(grads)), paths(params)
    for path, grad in paths(grads).items():
        if EVERYTHING[path] is not VECTOR:
            step = -0.1 * slice_by_slice(np.asarray(grad), EVERYTHING[path])
            np.testing.assert_allclose(moved[path], step - 0.1 * DECAY * flat_params[path], atol=1e-4, err_msg=path)
            # A step is as large as one of Adam, whatever the shape: the factor 0.2 of arXiv 2502.16982.
            assert 0.1 < np.sqrt(np.mean(np.square(step))) / 0.1 < 0.4, path
        else:
            # Adam's first step has one size. With Nesterov's momentum, which optax's Muon gives it, that is 1.47.
            step = moved[path] / -np.sign(grad)
            assert step.min() > 0.0999 and step.max() < 0.148 and np.ptp(step) < 1e-4, path


def test_muon_orthogonalises_every_layers_components_and_offsets_matrix_by_itself(updates):
    assert_muon_takes_slices_alone(*updates["muon"])


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("head.factors.u_DRWV", ((0,), (1, 3))),
        ("head.factors.u_DRWV", ((0, 2), (3,))),
        ("trunk.blocks.attention.wo_NHD", ((0,), (1, 2))),
    ],
)
def test_a_batch_axis_that_is_taken_into_the_matrix_is_noticed(name, numbers, monkeypatch):
    assert_muon_takes_slices_alone(*make_update("muon", {name}))
    last = name.split(".")[-1]
    monkeypatch.setitem(PARAMETERS, last, dataclasses.replace(PARAMETERS[last], inputs=numbers[0], outputs=numbers[1]))
    with pytest.raises(AssertionError, match=name):
        assert_muon_takes_slices_alone(*make_update("muon", {name}))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name, updates):
    update, params = updates[name]
    moved = paths(update(jax.tree.map(jnp.zeros_like, params)))
    for path, before in paths(params).items():
        factor = 0.0 if EVERYTHING[path] is VECTOR else -0.1 * DECAY
        np.testing.assert_allclose(moved[path], factor * before, rtol=1e-6, err_msg=path)


def test_adamw_is_the_definition():
    """Two steps on one number, by hand."""
    config = make_config("adamw", beta1=0.8, beta2=0.9, eps=0.3, weight_decay=0.5, clip_norm=0.0)
    params = {"w_gate_DF": jnp.full((1, 1), 2.0)}
    optimizer = make_optimizer(config, 10, params)
    state = optimizer.init(params)
    value, m, v = 2.0, 0.0, 0.0
    for step, grad in enumerate([3.0, -1.0], start=1):
        updates, state = optimizer.update({"w_gate_DF": jnp.full((1, 1), grad)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        value -= 0.1 * ((m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 0.3) + 0.5 * value)
        np.testing.assert_allclose(params["w_gate_DF"], value, rtol=1e-5)


@pytest.mark.parametrize(
    "size, clip, expected", [(100.0, 1.0, 1.0), (100.0, 2.5, 2.5), (0.5, 1.0, 0.5), (100.0, 0.0, 100.0)]
)
def test_the_norm_over_all_parameters_is_clipped(size, clip, expected):
    """The first moment after one step shows the gradient that the optimizer saw. A limit of 0 is no limit."""
    params = {"scale": jnp.ones(3), "wq_DNH": jnp.ones((2, 2, 2))}
    grads = random_like(params, 0)
    grads = jax.tree.map(lambda g: g * size / optax.tree.norm(grads), grads)
    optimizer = make_optimizer(make_config("adamw", beta1=0.5, clip_norm=clip), 10, params)
    moment = optax.tree_utils.tree_get(optimizer.update(grads, optimizer.init(params), params)[1], "mu")
    np.testing.assert_allclose(optax.tree.norm(moment) / 0.5, expected, rtol=1e-5)
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.5 * expected / size * g, rtol=1e-5), moment, grads)


# Schedules


def rates(steps=100, **changes):
    config = OptimizerConfig(**{**dict(learning_rate=2.0, warmup_steps=9, final_lr_fraction=0.1), **changes})
    schedule = make_schedule(config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_warmup_is_linear_and_its_first_step_learns(schedule):
    np.testing.assert_allclose(rates(schedule=schedule)[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates(schedule=schedule, warmup_steps=0)[0], 2.0)


@pytest.mark.parametrize(
    "schedule, changes, expected",
    [
        # Cosine from step 10 to 110: 0.1 + 0.9 (1 + cos(pi t)) / 2 of the peak, at t = 0, 1/4, 1/2, 1.
        ("cosine", {}, {10: 2.0, 35: 0.2 + 1.8 * (1 + 0.5**0.5) / 2, 60: 1.1, 110: 0.2}),
        ("cosine", {"final_lr_fraction": 0.0}, {60: 1.0, 110: 0.0}),
        # The last 22 of 110 steps decay.
        ("wsd", {}, {10: 2.0, 60: 2.0, 88: 2.0, 99: 1.1, 110: 0.2}),
        ("wsd", {"decay_fraction": 0.5}, {10: 2.0, 55: 2.0, 82: 0.2 + 1.8 * 28 / 55, 110: 0.2}),
        # The decay begins behind the warm-up at the earliest.
        ("wsd", {"decay_fraction": 1.0}, {10: 2.0, 60: 1.1, 110: 0.2}),
        ("constant", {}, {10: 2.0, 60: 2.0, 110: 2.0}),
    ],
)
def test_schedules_by_value(schedule, changes, expected):
    values = rates(110, schedule=schedule, warmup_steps=10, **changes)
    for step, rate in expected.items():
        np.testing.assert_allclose(values[step], rate, rtol=1e-5, atol=1e-7, err_msg=f"step {step}")
    assert np.all(np.diff(values[10:]) <= 1e-6), "the rate never rises again"
    assert np.all(values[:-1] > 0)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_short_runs_have_finite_positive_rates(schedule, warmup):
    values = rates(3, schedule=schedule, warmup_steps=warmup)
    assert np.all(np.isfinite(values)) and np.all(values[:3] > 0) and values.max() <= 2.0 + 1e-6


# Steps that are skipped


def skip(norms, above=0.0):
    """The parameter after each of the gradients of such norms, and how many in a row were skipped."""
    tx = skipping(optax.sgd(1.0, momentum=0.9), above)
    params = {"w": jnp.zeros(4)}
    state, seen = tx.init(params), []
    for norm in norms:
        updates, state = tx.update({"w": jnp.full(4, norm / 2)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((np.asarray(params["w"]), int(state.skipped)))
    return seen


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """The steps after it are those of a run that never saw it, momentum included."""
    seen, clean = skip([1, 2, bad, bad, 3, 1]), skip([1, 2, 3, 1])
    assert [count for _, count in seen] == [0, 0, 1, 2, 0, 0]
    for i, j in ((2, 1), (3, 1), (4, 2), (5, 3)):
        np.testing.assert_array_equal(seen[i][0], clean[j][0])


def test_a_spike_is_skipped_once_the_usual_norm_is_known():
    usual = [1.0] * SETTLED
    counts = [count for _, count in skip([50.0, *usual, 1.9, 2.5, 2.5, 1.0], above=2.0)]
    # The first is no spike: nothing is known yet. The mean is 1 + 49 / 20 after it, and falls from there.
    assert counts == [0] * len(counts)
    counts = [count for _, count in skip([*usual, 1.9, 2.5, 2.5, 1.0], above=2.0)]
    assert counts == [0] * len(usual) + [0, 1, 2, 0]
    assert [count for _, count in skip([*usual, 1e6])][-1] == 0, "without a limit nothing finite is skipped"
