"""How a model is laid out for decoding: the same numbers, arranged so that a step copies and computes less."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.decode.decoder import for_decoding
from mtp_jax.model.layers import linear, product
from mtp_jax.model.output_major import JOINED, OutputMajor, Together, few_rows
from mtp_jax.parameters import PARAMETERS
from mtp_jax.sharding import gather
from support import tiny

pytestmark = pytest.mark.usefixtures("mesh")


def whole_numbers(seed, *shape):
    """Small enough that sums of their products are exact in any order and dtype."""
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), jnp.bfloat16)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [1, 2, 5])
@pytest.mark.parametrize(("inputs", "shape"), [(1, (6, 4)), (1, (6, 2, 4)), (2, (2, 3, 5)), (1, (6, 2, 1, 5))])
def test_a_turned_weight_multiplies_as_it_did(inputs, shape, batch, time):
    x, w = tiny.shard(whole_numbers(0, batch, time, *shape[:inputs])), tiny.shard(whole_numbers(1, *shape))
    y, turned = linear(x, w), OutputMajor(w, inputs)
    assert turned.w_NK.shape == (np.prod(shape[inputs:]), np.prod(shape[:inputs]))
    np.testing.assert_array_equal(linear(x, turned), y)
    assert linear(x, turned).dtype == y.dtype == jnp.bfloat16
    if inputs == 1:
        equation = f"btd,d{'rwv'[: len(shape) - 1]}->bt{'rwv'[: len(shape) - 1]}"
        np.testing.assert_array_equal(product(equation, x, turned), product(equation, x, w))
    assert jax.typeof(linear(x, turned)).sharding == jax.typeof(y).sharding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch, time", [(1, 1), (1, 4), (2, 3)])
def test_weights_of_one_input_are_one_product(batch, time, dtype):
    shapes = [(4, 2), (2, 2), (3,)]
    weights = [tiny.shard(whole_numbers(i, 6, *shape).astype(dtype)) for i, shape in enumerate(shapes)]
    x, together = tiny.shard(whole_numbers(9, batch, time, 6).astype(dtype)), Together(weights, 1)
    assert together.w_NK.shape == (8 + 4 + 3, 6)
    for y, w in zip(together.times(x), weights, strict=True):
        np.testing.assert_array_equal(y, linear(x, w))
        assert y.dtype == jnp.float32 and jax.typeof(y).sharding == jax.typeof(linear(x, w)).sharding


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 4), (3, 1, 4), (1, 1, 1, 2, 4), (2, 3, 2, 1, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_few_rows_by_a_table(shape, dtype):
    x, table_VD = whole_numbers(0, *shape).astype(dtype), whole_numbers(1, 7, 4).astype(dtype)
    where = jax.NamedSharding(jax.sharding.get_mesh(), PARAMETERS["unembed_VD"].spec)
    y = few_rows(tiny.shard(x), gather(jax.device_put(table_VD, where)))
    np.testing.assert_array_equal(y, np.asarray(x, np.float64) @ np.asarray(table_VD, np.float64).T)
    assert y.dtype == jnp.float32


def turned(model):
    """The names of turned weights, one for each layer and offset, joined ones too, and of matrices that are not."""
    joined = [node for _, node in nnx.iter_graph(model) if hasattr(node, JOINED)]
    together = [name for module in joined for name in module.TOGETHER]
    flat = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, OutputMajor | nnx.Param)]
    names = [next(name for name in reversed(path) if isinstance(name, str)) for path, _ in flat]
    found = [name for name, (_, node) in zip(names, flat, strict=True) if isinstance(node, OutputMajor)]
    return found + together, [
        n
        for n, (_, node) in zip(names, flat, strict=True)
        if n in PARAMETERS and PARAMETERS[n].matrix and n not in found
    ]


@pytest.mark.parametrize("factors", ["full", "shared", "residual", "lowrank", "lora"])
def test_one_cpu_turns_every_matrix(factors):
    head = tiny.head_config(factors=factors)
    layers = ["wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD", "w_gate_DF", "w_up_DF", "w_down_FD"] * 2
    offsets = {
        "full": ["u_DRWV"] * 4,
        "shared": ["map_DRWD"] * 4,
        "residual": ["residual_DRWD"] * 4,
        "lowrank": ["map_DWD", "down_DRWE"] * 4,
        "lora": ["u_DWV", "down_DRWE"] * 4,
    }[factors]
    for dtype in "bfloat16", "float32":
        made = for_decoding(make(head, dtype=dtype))
        found, left = turned(made)
        assert sorted(found) == sorted([*layers, *offsets])
        assert not left
        assert {leaf.dtype for leaf in jax.tree.leaves(made.trunk.blocks[0].feed_forward)} == {jnp.dtype(dtype)}
        again = for_decoding(made)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(made))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_few_rows_leave_the_weight_on_the_left(dtype):
    """XLA packs a product's right operand at every call. Many rows are faster as they are."""
    w_NK = gather(jax.device_put(np.ones((48, 16), dtype)))
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    for rows, left in ((1, "1,16" if dtype == "float32" else "48,16"), (4, "48,16"), (64, "48,16"), (65, "65,16")):
        x = tiny.shard(np.ones((1, rows, 16), dtype))
        text = jax.jit(few_rows).lower(x, w_NK).as_text("hlo")
        (operands,) = re.findall(r"dot\((\S+), \S+\)", text)
        shapes = dict(re.findall(r"(\S+) = (\w+\[[\d,]+\])", text))
        assert shapes[operands] == f"{kind}[{left}]"
        if rows == 4:  # and XLA has not swapped them back
            assert "f32[48,4]" in jax.jit(few_rows).lower(x, w_NK).compile().as_text()


@pytest.mark.parametrize("factors", ["full", "shared", "residual", "lowrank", "lora"])
def test_a_model_that_is_laid_out_has_the_laws_that_it_had(factors):
    tokens_BT = tiny.shard(np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 5)).astype(np.int32))
    found = []
    for dtype in "float32", "bfloat16":
        model = make(tiny.head_config(factors=factors), dtype=dtype)
        for laid_out in model, for_decoding(model):
            seen = model.see(tokens_BT)
            given = laid_out.seen(seen.x_BTD, tokens_BT)
            last = given.at(jnp.full(2, 4))
            laws = [laid_out.target(given)[0], *laid_out.head.joint(last, tiny.WINDOW).logp_BRV]
            found.append([np.asarray(law) for law in laws])
    exact, laid_out, narrow, narrow_laid_out = found
    for law, expected in zip(laid_out, exact, strict=True):
        np.testing.assert_allclose(law, expected, atol=1e-5)
    for law, rounded, expected in zip(narrow_laid_out, narrow, exact, strict=True):
        assert np.abs(law - expected).max() < max(0.05, 2 * np.abs(rounded - expected).max())


def test_many_devices_turn_nothing():
    with tiny.mesh(data=2):
        assert not turned(for_decoding(make(tiny.head_config(), dtype="bfloat16")))[0]


def test_the_table_of_the_corrections_is_made_once():
    """U B is a large product: a step of decoding that formed it would cost more than the trunk."""
    model = make(tiny.head_config(factors="lowrank"))
    x_BTD, tokens_BT = tiny.shard(np.zeros((1, 1, 16), np.float32)), tiny.shard(np.zeros((1, 1), np.int32))

    def products(model):
        jaxpr = jax.make_jaxpr(lambda m, x: m.head.logits(m.seen(x, tokens_BT), stop=1))(model, x_BTD)
        return str(jaxpr).count("dot_general")

    before, after = products(model), products(for_decoding(model))
    assert (before, after) == (5, 4)


def make(head, **changes):
    return tiny.make_model(tiny.train_config(tiny.model_config(**changes), head))
