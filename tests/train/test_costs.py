"""The predicted costs: FLOPs are those of the matrix products that are traced, parameters those that are there."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec as P

from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.encoder import ENCODERS
from mtp_jax.heads.factors import FACTORS, SharedFactors
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.heads.registry import check_head
from mtp_jax.model.config import ModelConfig
from mtp_jax.state import build_model, split
from mtp_jax.train.costs import (
    Costs,
    costs,
    peak_flops,
    training_flops,
    tree_bytes,
    trunk_forward_flops,
)
from mtp_jax.train.step import batch_loss, make_trainer
from support import tiny

pytestmark = pytest.mark.usefixtures("mesh")


# Every number differs from every other, so that none can stand in for another.
MODEL = dict(vocab_size=34, d_model=20, d_ff=28, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10)
HEADS = {
    "full": dict(factors="full"),
    "shared": dict(factors="shared"),
    "residual": dict(factors="residual"),
    "hmm": dict(circuit="hmm"),
    "btree": dict(circuit="btree", circuit_width=3),
    "lowrank": dict(factors="lowrank"),
    "lora": dict(factors="lora"),
    "full with its own next-token head": dict(factors="full", target="ntp"),
    "lowrank with its own next-token head": dict(factors="lowrank", target="ntp"),
    "independent": dict(circuit="independent", rank=1),
}
BATCH, TIME = 4, 16


def make_config(head="full", **model):
    head = tiny.head_config(**{**dict(window=5, rank=3, factor_width=7, balance="none"), **HEADS[head]})
    return tiny.train_config(tiny.model_config(**{**MODEL, **model}), head, batch=BATCH, seq_len=TIME)


def shapes(config):
    return split(jax.eval_shape(lambda: build_model(config, jax.random.key(0))))


def dot_flops(function, *args):
    """FLOPs of all matrix products that tracing `function` finds, loops counted as often as they run."""
    return count(jax.jit(function).trace(*args).jaxpr.jaxpr)


def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
        assert equation.primitive.name not in ("while", "cond"), "how often these run is not known"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(count(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def dense(config):
    """The config at whose length the mean causal attention is what is computed: all pairs, half of them masked."""
    model = dataclasses.replace(config.model, context_length=2 * TIME)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, seq_len=2 * TIME - 1))


def own_table(config):
    """The products of the model's own next-token loss, where it is the target, for one position."""
    return 2 * MODEL["vocab_size"] * MODEL["d_model"] if config.head.target == "ntp" else 0


def per_batch(config):
    """What `lowrank` computes once for all positions, U B, which the prediction per token leaves out."""
    return 2 * MODEL["vocab_size"] * MODEL["d_model"] * 7 if config.head.factors == "lowrank" else 0


# FLOPs


def test_the_counter_counts():
    a, b = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    assert dot_flops(lambda a, b: jnp.einsum("xij,jk->xik", a, b), a, b) == 2 * 2 * 3 * 4 * 5

    def loop(a, b):
        return jax.lax.scan(lambda c, x: (c + jax.jit(jnp.matmul)(x, b), None), jnp.zeros((3, 5)), a)[0]

    assert dot_flops(loop, a, b) == 2 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("model", [{}, dict(num_kv_heads=6, head_dim=4, qkv_bias=True, qk_norm=True)])
def test_the_trunks_flops_are_those_of_its_matrix_products(model):
    config = make_config(**model)
    graph, params = shapes(config)
    batch = tiny.make_batch(config)
    counted = dot_flops(
        lambda params, batch: nnx.merge(graph, params)(batch["tokens_BT"], batch["segments_BT"]), params, batch
    )
    assert counted == BATCH * TIME * trunk_forward_flops(config.model, 2 * TIME - 1)


@pytest.mark.parametrize("head", HEADS)
def test_the_heads_flops_are_those_of_its_matrix_products(head):
    config = make_config(head)
    graph, params = shapes(config)

    def loss(params, x_BTD, batch):
        model = nnx.merge(graph, params)
        seen = model.seen(x_BTD, batch["tokens_BT"])
        return model.head.loss(seen, batch["targets_BTW"], batch["valid_BTW"] / 1.0)[0]

    def whole(params, batch):
        return nnx.merge(graph, params).loss(batch, batch["valid_BTW"] / 1.0)[0]

    x_BTD, batch = tiny.shard(np.zeros((BATCH, TIME, MODEL["d_model"]), np.float32)), tiny.make_batch(config)
    forward = MixtureHead.flops(config.head, config.model, frozen=False)[0]
    assert dot_flops(loss, params, x_BTD, batch) - per_batch(config) == BATCH * TIME * forward
    trunk = trunk_forward_flops(config.model, 2 * TIME - 1)
    counted = dot_flops(whole, params, batch) - per_batch(config)
    assert counted == BATCH * TIME * (trunk + forward + own_table(config))


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("factors", FACTORS)
def test_what_backward_saves_on_a_frozen_trunk(factors, encoder):
    """Of the factors' own products: the table needs no gradient, and hidden states only behind an encoder."""
    config, rows = make_config(factors), 6
    model, form = config.model, FACTORS[factors]
    params = {**form(config.head, model, rngs=nnx.Rngs(0)).params(), "unembed_VD": jnp.ones((34, 20))}
    trained = params.keys() - {"unembed_VD"}

    def logits(own, x_BTD, rest):
        return jnp.sum(form.logits(form.tables({**own, **rest}), x_BTD) ** 2)

    own, rest = ({name: a for name, a in params.items() if (name in trained) is of} for of in (True, False))
    gradient = jax.value_and_grad(logits, argnums=(0, 1) if encoder else 0)
    jaxpr = jax.jit(gradient).trace(own, jnp.ones((1, rows, 20)), rest).jaxpr.jaxpr
    # The rule of a product gives both gradients, and the compiler leaves out what nobody asks for.
    counted = count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])
    forward, states, table = form.flops(config.head, model)
    # U B is computed once for all positions; the prediction leaves it out, and the gradient of B.
    assert counted - 2 * per_batch(config) == rows * (3 * forward - table - (0 if encoder else states))


@pytest.mark.parametrize("attention", [False, True])
def test_the_flops_of_a_sequential_head_are_those_of_its_matrix_products(attention):
    """But for attention, which is little beside the rest, and the entries of the positions before, which are made once
    more."""
    head = HeadConfig(kind="sequential", window=5, target="ntp", attention=attention)
    config = dataclasses.replace(make_config(), head=head)
    graph, params = shapes(config)
    batch = tiny.make_batch(config)

    def loss(params, x_BTD, batch):
        model = nnx.merge(graph, params)
        seen = model.seen(x_BTD, batch["tokens_BT"])
        return model.head.loss(seen, batch["targets_BTW"], batch["valid_BTW"] / 1.0)[0]

    counted = dot_flops(loss, params, tiny.shard(np.ones((BATCH, TIME, 20), np.float32)), batch)
    forward = check_head(head).flops(head, config.model, frozen=False)[0]
    if attention:
        entry = 2 * (2 * 20 * 20 + 20 * 10 * (6 + 2 * 2))
        queries = sum(2 * 2 * 6 * 10 * (TIME + chain) for chain in range(4))
        forward += entry + queries
    assert counted == BATCH * TIME * forward


@pytest.mark.parametrize("layers, taps", [(1, ()), (2, (1,))])
def test_the_flops_of_the_block_encoder_are_those_of_its_matrix_products(layers, taps):
    """But for the scores of attention."""
    head = HeadConfig(window=5, target="ntp", encoder="block", encoder_layers=layers, taps=taps)
    config = dataclasses.replace(make_config(), head=head)
    graph, params = shapes(config)
    batch = tiny.make_batch(config)

    def encode(params, x_BTD, batch):
        model = nnx.merge(graph, params)
        seen = model.seen(x_BTD, batch["tokens_BT"], (x_BTD,) * len(taps))
        return model.head.encoder.encode(seen, batch["targets_BTW"][..., 0])

    counted = dot_flops(encode, params, tiny.shard(np.ones((BATCH, TIME, 20), np.float32)), batch)
    scores = layers * 2 * 2 * 6 * 10 * TIME
    assert counted == BATCH * TIME * (ENCODERS["block"].flops(head, config.model) + scores)


@pytest.mark.parametrize("head", HEADS)
def test_training_is_three_times_the_forward_pass(head):
    config = make_config(head)
    graph, params = shapes(config)
    batch = tiny.make_batch(config)
    gradient = jax.grad(lambda params, batch, n: batch_loss(graph, params, batch, n)[0])
    counted = dot_flops(gradient, params, batch, jnp.ones((2, 5))) - 3 * per_batch(config)
    predicted = costs(dense(config), params)
    assert counted == BATCH * TIME * (predicted.trunk_flops + predicted.head_flops)


@pytest.mark.parametrize("changes", [{}, {"shortlist": 9}, {"encoder": "token"}])
def test_the_targets_law_is_formed_once_and_not_differentiated(changes):
    """Of every position, and of those behind the last one that a tile reaches."""
    config = make_config("lowrank with its own next-token head")
    config = dataclasses.replace(config, head=dataclasses.replace(config.head, **changes))
    learnt = dataclasses.replace(config, head=dataclasses.replace(config.head, kl_weight=1.0))
    batch, found = tiny.make_batch(config), []
    for one in (config, learnt):
        graph, params = shapes(one)
        gradient = jax.grad(
            lambda params, batch, n, graph=graph: batch_loss(graph, params, batch, n)[0], allow_int=True
        )
        found.append(dot_flops(gradient, params, batch, jnp.ones((2, 5))))
    more = np.diff([sum(MixtureHead.flops(one.head, one.model, frozen=False)) for one in (config, learnt)])
    assert more == 2 * MODEL["d_model"] * (config.model.vocab_size + config.head.shortlist)
    assert np.diff(found) == more * (BATCH * TIME + config.head.window - 1)


@pytest.mark.parametrize("head", [{"encoder": "token"}, {"kind": "sequential"}, {"encoder": "none"}])
def test_a_normaliser_that_is_kept_saves_the_product_with_the_table(head):
    """Not where the first offset's own columns are the whole vocabulary."""
    config = make_config("lowrank with its own next-token head")
    if "kind" in head:
        config = dataclasses.replace(config, head=HeadConfig(window=5, target="ntp"))
    config = dataclasses.replace(
        config, base="b", head=dataclasses.replace(config.head, shortlist=9, kl_weight=1.0, **head)
    )
    graph, params = split(jax.eval_shape(lambda: build_model(config, jax.random.key(0), trunk=False)))
    batch, counted = tiny.make_batch(config), []
    kept = {"x_BTD": tiny.shard(np.ones((BATCH, TIME, MODEL["d_model"]), np.float32))}
    for more in (kept, {**kept, "normaliser_BT": tiny.shard(np.ones((BATCH, TIME), np.float32))}):
        loss = lambda params, batch, n: batch_loss(graph, params, batch, n, own=False)[0]  # noqa: E731
        counted.append(dot_flops(loss, params, {**batch, **more}, jnp.ones((2, 5))))
    predicted = [costs(config, params, normalised).head_flops for normalised in (False, True)]
    table = 2 * MODEL["d_model"] * config.model.vocab_size * (head != {"encoder": "none"})
    assert -np.diff(predicted) == table
    assert -np.diff(counted) == table * (BATCH * TIME + config.head.window - 1)


def test_attention_is_counted_at_its_mean_length():
    """Position t attends to t + 1 keys."""
    model = make_config().model
    attention = [trunk_forward_flops(model, n) - trunk_forward_flops(model, 1) for n in (1, 2, 16)]
    per_key = 3 * 2 * 2 * 6 * 10
    assert attention == [0, per_key * (1 + 2) / 2 - per_key, per_key * sum(range(1, 17)) / 16 - per_key]


def test_the_ratio_is_to_a_plain_next_token_head():
    config = make_config()
    found = costs(config, shapes(config)[1])
    assert found.plain_flops == found.trunk_flops + 6 * 34 * 20
    assert found.head_flops == 6 * (5 * 3 * 34 * 20 + 20 * 3)
    assert found.step_ratio == (found.trunk_flops + found.head_flops) / (found.trunk_flops + 6 * 34 * 20)
    assert Costs(0, 0, 0, 10.0, 30.0, 20.0).step_ratio == 2.0


# Parameters

D, V, F, L, N, K, H, W, R, E = 20, 34, 28, 3, 6, 2, 10, 5, 3, 7
BLOCK = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F + 2 * D
HEAD_PARAMS = {
    "full": D * R * W * V + D * R,
    "shared": D * R * W * D + D * R,
    "residual": D * R * W * D + D * R,
    "hmm": D * R * W * V + D * R + D * (W - 1) * R * R,
    "btree": D * R * W * V + D * R + 3 * (D + (W - 2) * R * R),
    "lowrank": W * D * D + D * R * W * E + E * D + D * R,
    "lora": D * W * V + D * R * W * E + E * V + D * R,
    "full with its own next-token head": D * R * W * V + D * R,
    "lowrank with its own next-token head": W * D * D + D * R * W * E + E * D + D * R,
    "independent": D * W * V,
}
# Heads without a table beside the input embedding.
ONE_TABLE = {"full", "lora", "independent", "hmm", "btree"}


@pytest.mark.parametrize("head", HEADS)
def test_parameters_are_counted_one_by_one(head):
    config = make_config(head)
    found = costs(config, shapes(config)[1])
    assert found.trunk_params == L * BLOCK + D
    assert found.head_params == HEAD_PARAMS[head]
    assert found.embedding_params == V * D * (1 if head in ONE_TABLE else 2)


def test_tied_embeddings_biases_and_norms_are_counted_once():
    config = make_config("lowrank", tie_embeddings=True, qkv_bias=True, qk_norm=True)
    _, params = shapes(config)
    found = costs(config, params)
    assert found.embedding_params == V * D
    assert found.trunk_params == L * (BLOCK + N * H + 2 * K * H + 2 * H) + D
    assert found.trunk_params + found.head_params + found.embedding_params == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )


# Devices


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_kind(kind, tera):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA GeForce RTX 4090"])
def test_the_peak_of_another_device_is_not_guessed(kind):
    assert peak_flops(SimpleNamespace(device_kind=kind)) is None


def test_bytes_are_those_of_one_devices_shards():
    def make():
        return {
            "both": jnp.zeros((8, 16), jnp.float32, out_sharding=P("fsdp", "tensor")),
            "one": jnp.zeros((8, 16), jnp.bfloat16, out_sharding=P(None, "tensor")),
            "none": jnp.zeros((8, 16), jnp.int32, out_sharding=P(None, None)),
        }

    expected = 8 * 16 * 4 // 8 + 8 * 16 * 2 // 2 + 8 * 16 * 4
    with tiny.mesh(1, 4, 2):
        assert tree_bytes(jax.eval_shape(make)) == expected
        arrays = jax.jit(make)()
    assert tree_bytes(arrays) == expected
    first = jax.devices()[0]
    held = [s.data.nbytes for a in arrays.values() for s in a.addressable_shards if s.device == first]
    assert sum(held) == expected
    assert tree_bytes(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)) == 30


def test_a_state_takes_the_bytes_that_its_shards_take():
    config = tiny.train_config()
    with tiny.mesh(2, 2, 2):
        state = jax.eval_shape(make_trainer(config).init)
    sharded = tree_bytes(state.params)
    whole = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(state.params))
    # Weights are split in four (in two where only one axis splits them); norms are not.
    assert whole / 4 <= sharded < whole / 2
    # Two moments, and the counters of AdamW and of its schedule.
    assert 2 * sharded <= tree_bytes(state.opt_state) <= 2 * sharded + 16


@pytest.mark.parametrize("target", ["marginal", "ntp"])
def test_what_is_drawn_instead_of_done_costs_less(target):
    """The gate and the model's own next-token logits are always whole."""
    model, head = ModelConfig(), HeadConfig(rank=8, factors="shared", target=target)
    factors = SharedFactors.flops(head, model)[0]
    rest = 2 * model.d_model * 8 + (2 * model.vocab_size * model.d_model if target == "ntp" else 0)

    def training(**changes):
        return training_flops(tiny.train_config(model, dataclasses.replace(head, **changes)))[1]

    assert training() == 3 * (rest + factors)
    assert training(loss_fraction=0.25) == 3 * rest + 0.25 * 3 * factors
