"""One device or eight, whatever the mesh: the same numbers, and every array where the rules put it."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax import language_model
from mtp_jax.config import OptimizerConfig
from mtp_jax.decode.generate import for_decoding, generate
from mtp_jax.model import attention, layers
from mtp_jax.parameters import PARAMETERS, init_weight
from mtp_jax.sharding import BATCH, RULES, Rules, gather
from mtp_jax.state import TrainState
from mtp_jax.train.optimizer import make_optimizer
from mtp_jax.train.step import batch_loss, make_trainer, target_counts
from support import tiny
from support.noise import random_params, shapes_of

# What differs between the models; together they have every kind of parameter.
MODELS = {
    "full": (dict(num_kv_heads=2, qkv_bias=True), dict(factors="full")),
    "shared": (dict(num_kv_heads=4, qk_norm=True, tie_embeddings=True), dict(factors="shared", balance="switch")),
    "lowrank": (dict(num_kv_heads=2, qkv_bias=True, qk_norm=True, remat="dots"), dict(factors="lowrank", target="ntp")),
    "lora": ({}, dict(factors="lora")),
    "token": ({}, dict(factors="shared", encoder="token", target="ntp")),
}
# And one parameter that is never trained.
PLACED = {
    **MODELS,
    "shortlist": ({}, dict(factors="lowrank", shortlist=8)),
    "residual": ({}, dict(factors="residual")),
    "hmm": ({}, dict(factors="full", circuit="hmm")),
    "narrow hmm": ({}, dict(factors="full", circuit="hmm", circuit_width=2)),
    "sequential": ({}, dict(kind="sequential", target="ntp", attention=True, per_offset=True)),
    "block": ({}, dict(factors="shared", target="ntp", encoder="block", encoder_layers=2, taps=(1,))),
}


# What is compared here is what the partitioner does; faster code would take twice as long to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_config(kind, *, num_layers=2, **changes):
    model, head = PLACED[kind]
    return tiny.train_config(tiny.model_config(num_layers=num_layers, **model), tiny.head_config(**head), **changes)


def paths(tree):
    return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_initial_weights_do_not_depend_on_the_mesh():
    weights = []
    for shape in [(1, 1, 1), (2, 2, 2)]:
        with tiny.mesh(*shape):
            init = jax.jit(lambda: init_weight(nnx.Rngs(0), "wq_DNH", (16, 4, 4))[...])
            weights.append(jax.device_get(init()))
    np.testing.assert_array_equal(*weights)
    np.testing.assert_allclose(np.std(weights[0]), 0.25, rtol=0.15)


# Every array where the rules put it

# The rule of every parameter, by its name; taken here, before a fault changes one of them.
SPECS = {name: row.spec for name, row in PARAMETERS.items()}


def expected_spec(path):
    spec = SPECS[path.split(".")[-1]]
    return P(None, *spec) if path.startswith(("trunk.blocks.", "head.stages.", "head.encoder.stages.")) else spec


def assert_placed(params):
    for path, leaf in paths(params).items():
        spec = leaf.sharding.spec
        assert len(spec) == leaf.ndim, f"{path}: {spec} has not one entry for each axis of {leaf.shape}"
        assert spec == expected_spec(path), path


def assert_held(array):
    """Each device holds as little as the spec says."""
    mesh = array.sharding.mesh.shape
    axes = [axis if isinstance(axis, tuple) else (axis,) for axis in array.sharding.spec]
    parts = [math.prod(mesh[name] for name in names if name) for names in axes]
    expected = tuple(size // n for size, n in zip(array.shape, parts, strict=True))
    assert {shard.data.shape for shard in array.addressable_shards} == {expected}


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1)])
def test_parameters_carry_the_specs_of_the_rules(kind, shape):
    with tiny.mesh(*shape):
        assert_placed(shapes_of(make_config(kind))[1])


def test_every_kind_of_parameter_is_tried():
    with tiny.mesh():
        seen = {path.split(".")[-1] for kind in PLACED for path in paths(shapes_of(make_config(kind))[1])}
    assert seen == set(SPECS)


def test_layers_ranks_windows_and_time_are_never_split():
    """Read off the names: R, W, T, H and E stay whole, B goes over data and fsdp, N, K, F and V over tensor.
    C, which joins two D, goes where they do."""
    tensor = {letter: {"tensor"} for letter in "NKFV"}
    allowed = {"B": {BATCH}, "D": {"fsdp", None}, "C": {"fsdp"}, **tensor}
    for name, spec in {
        **{field.name: getattr(RULES, field.name) for field in dataclasses.fields(Rules)},
        **SPECS,
    }.items():
        letters = re.sub(r"^.*_", "", name)
        if name == "scale":
            assert spec == P(None)
            continue
        assert len(letters) == len(spec), name
        for letter, axis in zip(letters, spec, strict=True):
            assert axis in allowed.get(letter, {None}), f"{name}: {letter} over {axis}"


def test_a_weight_is_gathered_along_fsdp_alone():
    with tiny.mesh(2, 2, 2):
        w_DNH = jax.device_put(np.ones((4, 4, 2), np.float32), NamedSharding(jax.sharding.get_mesh(), SPECS["wq_DNH"]))
        whole, back = jax.jit(lambda w: (gather(w), jax.grad(lambda w: jnp.sum(gather(w)))(w)))(w_DNH)
        assert whole.sharding.spec == P(None, "tensor", None)
        assert back.sharding.spec == SPECS["wq_DNH"]
        np.testing.assert_array_equal(back, 1)


@pytest.mark.parametrize("kind", PLACED)
def test_activations_keep_their_batch_and_logits_their_vocabulary_sharding(kind):
    config = make_config(kind)
    with tiny.mesh(2, 2, 2):
        graph, shapes = shapes_of(config)
        tokens = tiny.make_batch(config)["tokens_BT"]

        def activations(params, tokens):
            model = nnx.merge(graph, params)
            seen = model.see(tokens)
            return model.embed(tokens), seen.x_BTD, model.target(seen)[0]

        embedded, x_BTD, logp_BTV = jax.eval_shape(activations, shapes, tokens)
    assert embedded.sharding.spec == x_BTD.sharding.spec == P(("data", "fsdp"), None, None)
    assert logp_BTV.sharding.spec == P(("data", "fsdp"), None, "tensor")


# Training and decoding


def param_of(path):
    """The parameter that an array of the train state belongs to, by its path; None for counts and coefficients."""
    keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    start = next((i for i, key in enumerate(keys) if key in ("embed_VD", "unembed_VD", "trunk", "head")), None)
    return None if start is None else ".".join(keys[start:])


def assert_state_placed(state):
    """Parameters and all their moments are placed by the rules. Returns how many arrays each parameter has."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = param_of(path)
        if name is not None:
            found[name] = found.get(name, 0) + 1
            assert len(leaf.sharding.spec) == leaf.ndim, jax.tree_util.keystr(path)
            assert leaf.sharding.spec == expected_spec(name), jax.tree_util.keystr(path)
        else:
            assert leaf.ndim == 0 or leaf.size == 3, jax.tree_util.keystr(path)
    return found


# Matrices have a momentum, everything else two moments; AdamW has two for all. The parameter itself comes on top.
ARRAYS = {"adamw": {"wq_DNH": 3, "down_DRWE": 3, "embed_VD": 3}, "muon": {"wq_DNH": 2, "down_DRWE": 2, "embed_VD": 3}}


def optimizer_config(name):
    # Nothing is clipped, so the first moments after one step are the gradients times 1 - beta. With a smaller `eps` a
    # gradient of nothing but rounding moves as far as any other.
    return OptimizerConfig(name, learning_rate=1e-2, warmup_steps=0, eps=1e-3, clip_norm=0)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kind", PLACED)
def test_a_fresh_state_is_placed_by_the_rules(name, kind):
    config = make_config(kind, optimizer=optimizer_config(name))
    with tiny.mesh(2, 2, 2):
        found = assert_state_placed(jax.eval_shape(make_trainer(config).init))
        assert set(found) == set(paths(shapes_of(config)[1]))
    for param, count in ARRAYS[name].items():
        assert {n for path, n in found.items() if path.endswith(param)} <= {count}, param


@pytest.mark.parametrize("name", ARRAYS)
def test_moments_that_are_replicated_are_noticed(name):
    config = make_config("full", optimizer=optimizer_config(name))
    with tiny.mesh(2, 2, 2) as mesh:
        params = random_params(config)[1]
        init = make_optimizer(config.optimizer, config.steps, params).init
        assert_state_placed((params, jax.jit(init)(params)))
        with pytest.raises(AssertionError, match="mu"):
            assert_state_placed((params, jax.jit(init, out_shardings=NamedSharding(mesh, P()))(params)))


# What each kind of model is trained with.
OPTIMIZERS = {"full": "muon", "shared": "adamw", "lowrank": "adamw", "lora": "adamw", "token": "adamw"}


def train(kind, shape):
    """Three steps: the first moments after one step, what moved after three, and the metrics of each."""
    config = make_config(kind, optimizer=optimizer_config(OPTIMIZERS[kind]))
    with tiny.mesh(*shape):
        params = random_params(config)[1]
        before = jax.device_get(params)
        optimizer = make_optimizer(config.optimizer, config.steps, params)
        state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
        step, metrics, moments = make_trainer(config).step, [], []
        for seed in range(3):
            assert_state_placed(state)
            state, values = step(state, tiny.make_batch(config, seed))
            metrics.append(jax.device_get(values))
            moments = moments or [
                jax.device_get(moment) for _, moment in optax.tree_utils.tree_get_all_with_path(state, "mu")
            ]
        assert_state_placed(state)
        for leaf in jax.tree.leaves(state):
            assert_held(leaf)
        return moments, jax.tree.map(np.subtract, jax.device_get(state.params), before), metrics


@pytest.fixture(scope="module")
def on_one_device():
    return {kind: train(kind, (1, 1, 1)) for kind in MODELS}


def assert_close(tree, expected, tolerance):
    """Equal, leaf by leaf, relative to the leaf's largest entry."""
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        assert np.abs(other).max() > 1e-4, jax.tree_util.keystr(path)
        atol = tolerance * np.abs(other).max()
        np.testing.assert_allclose(leaf, other, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("full", (2, 2, 2)),
        ("shared", (1, 2, 4)),
        ("lowrank", (2, 2, 2)),
        ("lowrank", (1, 8, 1)),
        ("lora", (1, 4, 2)),
        ("token", (2, 2, 2)),
    ],
)
def test_loss_gradients_and_three_steps_are_those_of_one_device(kind, shape, on_one_device):
    (moments, moved, metrics), expected = train(kind, shape), on_one_device[kind]
    assert len(jax.tree.leaves(moments)) == len(jax.tree.leaves(moved))
    assert_close(metrics[0], expected[2][0], 1e-6)
    assert_close(moments, expected[0], 2e-5)
    # Both optimizers enlarge what rounding does to the smallest gradients and singular values.
    assert_close(moved, expected[1], 1e-3)
    assert_close(metrics, expected[2], 2e-5)


def loss_and_gradients(shape):
    """Of one model whose heads, width and vocabulary every mesh divides, on one batch with masked targets."""
    config = tiny.train_config(tiny.model_config(num_kv_heads=4, qkv_bias=True, qk_norm=True))
    with tiny.mesh(*shape):
        graph, params = random_params(config)
        batch = tiny.make_batch(config)
        gradient = jax.jit(jax.value_and_grad(functools.partial(batch_loss, graph), has_aux=True))
        (loss, aux), grads = gradient(params, batch, target_counts([batch]))
        assert_placed(grads)
        for grad in jax.tree.leaves(grads):
            assert_held(grad)
        return jax.device_get(({"loss": loss, **aux}, grads))


@pytest.fixture(scope="module")
def loss_and_gradients_on_one_device():
    return loss_and_gradients((1, 1, 1))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_one_model_has_the_loss_and_gradients_of_one_device_on_every_mesh(shape, loss_and_gradients_on_one_device):
    (metrics, grads), expected = loss_and_gradients(shape), loss_and_gradients_on_one_device
    assert_close(metrics, expected[0], 1e-6)
    assert_close(grads, expected[1], 2e-5)


@functools.cache
def decode(verifier, shape):
    """Continuations of eight prompts of different lengths, how many drafts were accepted, and the forwards it took."""
    config = make_config("shared", num_layers=1)
    with tiny.mesh(*shape):
        model = for_decoding(nnx.merge(*random_params(config)))
        prompts = [np.arange(1 + 2 * i) % tiny.VOCAB for i in range(8)]
        laws = dict(temperature=[0.7, 1.0, 0.0, 1.3] * 2, top_k=[0, 8, 0, 6] * 2, top_p=[1.0, 0.9, 1.0, 0.8] * 2)
        done = generate(model, prompts, max_new_tokens=12, verifier=verifier, **({} if verifier == "greedy" else laws))
        return np.stack(done.tokens), done.accepted, done.forwards


VERIFIERS, MESHES = ("greedy", "coupled", "token", "block"), ((8, 1, 1), (2, 2, 2), (1, 2, 4))
# Every verifier and every mesh; the slow ones are the other pairs.
QUICK = {("greedy", MESHES[0]), ("coupled", MESHES[2])}
PAIRS = [
    pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
    for pair in itertools.product(VERIFIERS, MESHES)
]


@pytest.mark.parametrize(("verifier", "shape"), PAIRS)
def test_decoding_is_that_of_one_device_token_for_token(verifier, shape):
    tokens, accepted, forwards = decode(verifier, shape)
    for array, expected in zip((tokens, accepted, forwards), decode(verifier, (1, 1, 1)), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert accepted.sum() > 0 and len(np.unique(forwards)) > 1, "the rows are ragged and some drafts are accepted"
    assert len(np.unique(tokens)) > 8
    if verifier != "greedy":
        drawn_B = (tokens != decode("greedy", (1, 1, 1))[0]).any(1)
        assert drawn_B.sum() > 4 and not drawn_B[2::4].any(), "rows of a temperature are drawn, the others are not"


# Deliberate faults

# A rule, and what is said of it: the parameter whose spec is not the rules', or JAX's own words.
WRONG_RULES = {
    "input_width_replicated": ({"wk_DKH": P(None, "tensor", None)}, "wk_DKH"),
    "heads_over_fsdp": ({"wk_DKH": P("tensor", "fsdp", None)}, "wk_DKH"),
    "one_entry_short": ({"w_down_FD": P("tensor")}, "w_down_FD"),
    "rank_split": ({"u_DRWV": P("fsdp", None, "tensor", None)}, "u_DRWV"),
    "residual_stream_replicated": ({"x_BTD": P(None, None, None)}, "shard"),
    "residual_stream_over_tensor": ({"x_BTD": P("tensor", None, None)}, "sharded by"),
    "residual_stream_split_in_time": ({"x_BTD": P("data", "fsdp", None)}, "sharded by"),
}


def assert_traces_as_the_rules_say(kind="full"):
    """Trace the loss and its gradients, and check every spec, without compiling anything."""
    config = make_config(kind)
    with tiny.mesh(2, 2, 2):
        graph, shapes = shapes_of(config)
        assert_placed(shapes)
        gradient = jax.grad(lambda *args: batch_loss(graph, *args)[0])
        assert_placed(jax.eval_shape(gradient, shapes, tiny.make_batch(config), jnp.ones((2, tiny.WINDOW))))


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_carry_the_specs_of_their_parameters(kind):
    assert_traces_as_the_rules_say(kind)


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_is_noticed_before_anything_is_compiled(name, monkeypatch):
    changes, said = WRONG_RULES[name]
    for name, spec in changes.items():
        if name in PARAMETERS:
            monkeypatch.setitem(PARAMETERS, name, dataclasses.replace(PARAMETERS[name], spec=spec))
        else:
            for module in (attention, language_model):
                monkeypatch.setattr(module, "RULES", dataclasses.replace(RULES, **{name: spec}))
    with pytest.raises(Exception, match=said):
        assert_traces_as_the_rules_say()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_weights_of_one_layer_at_a_time_are_whole(remat, dtype):
    """ZeRO-3: neither the forward nor the backward pass keeps the gathered weights of all layers."""
    layers, width, wide = 5, 16, 48
    model = tiny.model_config(num_layers=layers, d_model=width, d_ff=wide, remat=remat, dtype=dtype)
    config = tiny.train_config(model, batch=8, seq_len=8)
    with tiny.mesh(1, 8, 1):
        trainer = make_trainer(config)
        text = trainer.step.lower(jax.eval_shape(trainer.init), tiny.make_batch(config)).compile().as_text()
    whole = [f"{layers},{width},{wide}", f"{layers},{wide},{width}"]
    assert [shape for shape in whole if f"[{shape}]" in text] == []
    assert f"[{layers},{width // 8},{wide}]" in text  # the parts that a device holds


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("spec", [SPECS[name] for name in ("wq_DNH", "w_up_DF", "w_down_FD")], ids=str)
def test_linear_has_the_gradients_of_einsum_and_sums_them_in_float32(spec, shape):
    """In bfloat16: the products are of rounded operands, and nothing of the weight's gradient is lost in their sum."""
    rng = np.random.default_rng(0)
    x, w, d = (rng.normal(size=shape).astype(jnp.bfloat16) for shape in [(8, 32, 4), (4, 8, 6), (8, 32, 8, 6)])
    w, d = (w, d) if len(spec) == 3 else (w[..., 0], d[..., 0])
    x64, w64, d64 = (a.astype(np.float64) for a in (x, w, d))
    expected = np.tensordot(x64, w64, 1), np.tensordot(d64, w64, (range(2, d.ndim), range(1, w.ndim)))
    with tiny.mesh(*shape) as mesh:
        inner, outer = ("tensor", None) if spec == SPECS["w_down_FD"] else (None, "tensor")
        x = jax.device_put(x, NamedSharding(mesh, P(BATCH, None, inner)))
        d = jax.device_put(d, NamedSharding(mesh, P(BATCH, None, outer, *[None] * (d.ndim - 3))))
        w = jax.device_put(w.astype(np.float32), NamedSharding(mesh, spec))
        y, pull = jax.vjp(layers.linear, x, w)
        d_x, d_w = pull(d)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert (y.sharding.spec, d_x.sharding.spec, d_w.sharding.spec) == (d.sharding.spec, x.sharding.spec, spec)
    for array, exact in zip((y, d_x), expected, strict=True):
        np.testing.assert_allclose(np.asarray(array, np.float64), exact, atol=2**-6 * np.abs(exact).max())
    np.testing.assert_allclose(d_w, np.tensordot(x64, d64, ((0, 1), (0, 1))), atol=1e-4)


def test_weights_travel_in_the_compute_dtype_and_their_gradients_in_float32():
    width, wide = 16, 48
    config = tiny.train_config(tiny.model_config(d_model=width, d_ff=wide, dtype="bfloat16"), batch=8, seq_len=8)
    with tiny.mesh(1, 8, 1):
        trainer = make_trainer(config)
        text = trainer.step.lower(jax.eval_shape(trainer.init), tiny.make_batch(config)).as_text()
    shape = rf"tensor<(?:{width}x{wide}|{wide}x{width})x(\w+)>"
    whole = rf"sharding_constraint (?!.*fsdp).*: {shape}"
    assert set(re.findall(whole, text)) == {"bf16"}
    assert set(re.findall(rf"dot_general .*-> {shape}", text)) == {"f32"}
