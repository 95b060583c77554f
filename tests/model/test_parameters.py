"""Parameters: which a variant has, at which scale they start, and that all are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.decode.decoder import for_decoding
from mtp_jax.model.cache import init_cache
from mtp_jax.state import build_model, split
from support import tiny
from support.noise import ROWS, TIME, make_model, make_tokens, random_params

pytestmark = pytest.mark.usefixtures("mesh")


def names(tree):
    return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


VARIANTS = {
    "plain": ({}, set()),
    "qkv_bias": ({"qkv_bias": True}, {f"trunk.blocks.attention.{n}" for n in ("bq_NH", "bk_KH", "bv_KH")}),
    "qk_norm": ({"qk_norm": True}, {f"trunk.blocks.attention.{n}.scale" for n in ("q_norm", "k_norm")}),
}


def param_names(**changes):
    head = tiny.head_config(factors="shared")
    return names(random_params(tiny.train_config(tiny.model_config(**changes), head))[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_adds_its_parameters_and_no_others(name):
    changes, added = VARIANTS[name]
    params = param_names(**changes)
    assert set(params) - set(param_names()) == added
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    assert all(leaf.shape[0] == 2 for path, leaf in params.items() if path.startswith("trunk.blocks."))


def test_tied_embeddings_are_the_table_of_the_vocabulary():
    assert set(param_names()) - set(param_names(tie_embeddings=True)) == {"embed_VD"}
    model = make_model(tie_embeddings=True)
    tokens = make_tokens()
    embedded = jax.jit(lambda m, t: m.embed(t))(model, tokens)
    np.testing.assert_array_equal(embedded, np.asarray(model.unembed_VD[...])[np.asarray(tokens)])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 1, "num_kv_heads": 1},
        {"num_kv_heads": 1},
        {"num_layers": 1},
        {"d_model": 1, "head_dim": 2},
        {"d_ff": 1},
        {"vocab_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("factors", ["full", "shared", "residual", "lowrank", "lora"])
def test_sizes_of_one_can_be_traced_in_training_and_in_decoding(changes, factors):
    head = tiny.head_config(factors=factors, **({"window": 1, "rank": 1} if "d_ff" in changes else {}))
    graph, params = random_params(tiny.train_config(tiny.model_config(**changes), head))

    def decode(params, tokens_BT):
        model = for_decoding(nnx.merge(graph, params))
        seen, _ = model.extend(tokens_BT, init_cache(model.config, ROWS, 8), tokens_BT[:, 0], 4)
        last = seen.at(tokens_BT[:, 1])
        first_BV = model.target(last)[0][:, 0]
        if head.window == 1:
            return first_BV
        return model.head.next_log_probs(model.head.begin(last, tokens_BT[:, 1], window=head.window))

    vocab = changes.get("vocab_size", tiny.VOCAB)
    tokens = make_tokens(ROWS)
    x_BTD = jax.eval_shape(lambda params, tokens: nnx.merge(graph, params)(tokens), params, tokens)
    assert x_BTD.shape == (ROWS, TIME, changes.get("d_model", 16))
    assert jax.eval_shape(decode, params, tokens[:, :2]).shape == (ROWS, vocab)


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"num_kv_heads": 1}, (2, 16, 1, 4)),
        ({"num_kv_heads": 4}, (2, 16, 4, 4)),
        ({"num_kv_heads": 2, "head_dim": 6, "num_layers": 3}, (3, 16, 2, 6)),
    ],
)
def test_grouped_heads_share_keys(changes, shape):
    params = param_names(**changes)
    assert params["trunk.blocks.attention.wk_DKH"].shape == params["trunk.blocks.attention.wv_DKH"].shape == shape
    assert params["trunk.blocks.attention.wq_DNH"].shape == (*shape[:2], 4, shape[3])
    assert params["trunk.blocks.attention.wo_NHD"].shape == (shape[0], 4, shape[3], 16)


def test_every_parameter_of_a_model_with_everything_is_used():
    """A gradient that is zero is a parameter that nobody reads."""
    head = tiny.head_config(factors="lowrank", target="ntp")
    config = tiny.train_config(tiny.model_config(qkv_bias=True, qk_norm=True), head, batch=2, seq_len=8)
    graph, params = random_params(config)
    batch = tiny.make_batch(config)

    def loss(params, batch):
        model = nnx.merge(graph, params)
        weights_BTW = batch["valid_BTW"] / 16.0
        return model.loss(batch, weights_BTW)[0]

    for path, grad in names(jax.jit(jax.grad(loss))(params, batch)).items():
        flat = np.asarray(grad).reshape(2, -1) if path.startswith("trunk.blocks.") else np.asarray(grad).reshape(1, -1)
        assert np.all(np.abs(flat).max(axis=1) > 1e-5), path


def test_the_compute_dtype_is_the_configs_and_parameters_stay_float32():
    config = tiny.train_config(tiny.model_config(dtype="bfloat16"))
    graph, params = random_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    model = nnx.merge(graph, params)
    x = jax.eval_shape(lambda m, t: m(t), model, make_tokens())
    assert x.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda m, t: m.target(m.see(t))[0], model, make_tokens()).dtype == jnp.float32


def test_every_weight_starts_at_the_scale_of_its_inputs(monkeypatch):
    """With ones in place of the noise, a weight shows its standard deviation."""
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, dtype, out_sharding: jnp.ones(shape, dtype, out_sharding=out_sharding)
    )
    head = tiny.head_config(factors="lowrank", init_noise=0.25)
    model = build_model(tiny.train_config(tiny.model_config(num_layers=3, head_dim=6), head), jax.random.key(0))
    # D = 16, F = 32, N x H = 24. Branches that end in the residual stream are divided by sqrt(2 L).
    expected = {
        "embed_VD": 16**-0.5,
        "trunk.blocks.attention.wq_DNH": 16**-0.5,
        "trunk.blocks.attention.wk_DKH": 16**-0.5,
        "trunk.blocks.attention.wv_DKH": 16**-0.5,
        "trunk.blocks.attention.wo_NHD": 24**-0.5 * 6**-0.5,
        "trunk.blocks.feed_forward.w_gate_DF": 16**-0.5,
        "trunk.blocks.feed_forward.w_up_DF": 16**-0.5,
        "trunk.blocks.feed_forward.w_down_FD": 32**-0.5 * 6**-0.5,
        "trunk.blocks.attention_norm.scale": 1,
        "trunk.blocks.feed_forward_norm.scale": 1,
        "trunk.norm.scale": 1,
        "head.circuit.gate_DR": 0,
        "unembed_VD": 16**-0.5,
        "head.factors.map_DWD": 16**-0.5,
        "head.factors.down_DRWE": 0.25 * 16**-0.5,
        "head.factors.up_ED": 8**-0.5,
    }
    params = names(split(model)[1])
    assert set(params) == set(expected)
    for path, std in expected.items():
        np.testing.assert_allclose(params[path], std, rtol=1e-6, err_msg=path)
    lora = build_model(tiny.train_config(head=tiny.head_config(factors="lora", init_noise=0.25)), jax.random.key(0))
    factors = names(split(lora)[1]["head"]["factors"])
    for name, std in {"u_DWV": 16**-0.5, "down_DRWE": 0.25 * 16**-0.5, "up_EV": 8**-0.5}.items():
        np.testing.assert_allclose(factors[name], std, rtol=1e-6, err_msg=name)


def test_no_two_weights_are_drawn_from_one_key(monkeypatch):
    """With one number of its key in place of the noise, every weight of every layer shows another one."""

    def fill(key, shape, dtype, out_sharding):
        return jnp.ones(shape, dtype, out_sharding=out_sharding) * jax.random.uniform(key)

    head = tiny.head_config(factors="lowrank")
    config = tiny.train_config(tiny.model_config(), head)
    drawn = []
    for draw in (fill, lambda key, shape, dtype, out_sharding: jnp.ones(shape, dtype, out_sharding=out_sharding)):
        monkeypatch.setattr(jax.random, "normal", draw)
        params = names(split(build_model(config, jax.random.key(0)))[1])
        drawn.append({path: np.asarray(leaf) for path, leaf in params.items() if path[-6:] not in (".scale", "ate_DR")})
    numbers = [number for path, std in drawn[1].items() for number in np.unique(np.round(drawn[0][path] / std, 5))]
    layers = sum(2 if path.startswith("trunk.blocks.") else 1 for path in drawn[0])
    assert len(numbers) == len(np.unique(numbers)) == layers
