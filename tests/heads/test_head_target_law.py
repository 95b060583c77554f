"""Heads that learn the target's law: what is reported is what drafting says, however a batch is read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtp_jax.sharding import BATCH as BATCH_AXES
from mtp_jax.sharding import RULES
from mtp_jax.state import split
from mtp_jax.train.evaluate import evaluate, named
from mtp_jax.train.step import batch_loss, make_trainer, target_counts
from support import tiny
from support.heads import V, W, hidden, make, make_targets, run, seen

pytestmark = pytest.mark.usefixtures("mesh")
WEIGHTS = dict(nll_weight=0.5, kl_weight=0.7, tv_weight=0.3, acceptance_weight=0.2, lk_weight=0.4)
CASES = {
    "shared": dict(factors="shared"),
    "lora": dict(factors="lora"),
    "shortlist": dict(factors="lowrank", shortlist=3),
    "encoder": dict(factors="lowrank", encoder="token"),
    "encoder, shortlist": dict(factors="shared", shortlist=3, encoder="token"),
    "hmm": dict(factors="full", circuit="hmm"),
    "encoder, btree": dict(factors="shared", circuit="btree", encoder="token"),
    "sequential": dict(kind="sequential"),
    "sequential, shortlist": dict(kind="sequential", shortlist=3, per_offset=True),
    "encoder, full, one component": dict(factors="full", circuit="independent", rank=1, encoder="token"),
}
BATCH, TIME, TEMPERATURE, GAMMA = 2, 6, 0.7, 0.8


def model_of(case, **changes):
    values = dict(target="ntp", balance="none", temperature=TEMPERATURE, gamma=GAMMA, **WEIGHTS)
    return make(**{**values, **CASES[case], **changes})


def own_first(config):
    """Whether the first offset is the model's own law."""
    return config.encoder != "none" or config.kind == "sequential"


def weights_of(targets_BTW, weights_BTW):
    """Weights of losses against the target's law: no position outside the row."""
    inside_TW = np.arange(TIME)[:, None] + np.arange(W) < TIME
    valid_BTW = (weights_BTW > 0) & inside_TW
    return (valid_BTW / np.maximum(valid_BTW.sum((0, 1)), 1)).astype(np.float32)


def drafted(model, x_BTD, targets_BTW):
    """(log q(. | x_<s), log p at the position before each target) `[B, T, W, V]`, as drafting and decoding say them."""
    head, tokens_NW = model.head, targets_BTW.reshape(-1, W, out_sharding=P(BATCH_AXES, None))
    given = seen(model, x_BTD.reshape(-1, 1, x_BTD.shape[-1], out_sharding=RULES.x_BTD))
    p_BTV = jax.nn.log_softmax(model.next_token(x_BTD) / TEMPERATURE, axis=-1)
    if not own_first(head.config):
        draft, laws = head.joint(given, W), []
    else:
        draft, laws = head.begin(given, tokens_NW[:, 0], window=W), [model.next_token(given.x_BTD)[:, 0]]
    while len(laws) < W:
        laws.append(head.next_log_probs(draft))
        if len(laws) < W:
            draft = head.condition(draft, tokens_NW[:, len(laws) - 1])
    behind_TW = np.minimum(np.arange(TIME)[:, None] + np.arange(W), TIME - 1)
    return jnp.stack(laws, axis=1).reshape(*targets_BTW.shape, V, out_sharding=P(BATCH_AXES, None, None, None)), p_BTV[
        :, behind_TW
    ]


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_is_what_is_drafted(case):
    model = model_of(case)
    x_BTD, (targets_BTW, weights_BTW) = hidden(1, BATCH, TIME, 8), make_targets(1, BATCH, TIME)
    law_weights_BTW = weights_of(targets_BTW, weights_BTW)
    (logq, logp), (loss, aux) = run(
        lambda model, x, targets, weights, law: (
            drafted(model, x, targets),
            model.head.loss(seen(model, x), targets, weights, None, law),
        ),
        model,
        x_BTD,
        targets_BTW,
        weights_BTW,
        law_weights_BTW,
    )
    p, q = np.exp(logp.astype(np.float64)), np.exp(logq.astype(np.float64))
    own = int(own_first(model.head.config))
    if own:  # the first offset is the model's own law
        p[:, :, 0] = q[:, :, 0]
    listed_BTWV = q > 0
    kl = np.where(listed_BTWV, p * (np.log(p) - np.where(listed_BTWV, np.log(np.where(q, q, 1)), 0)), 0).sum(-1)
    overlap = np.minimum(p, q).sum(-1)
    before_BTW = np.ones((BATCH, TIME, W), bool)
    if "shortlist" in case:
        before_BTW[..., 2:] = np.cumprod(targets_BTW[..., 1:-1] < 3, axis=-1) > 0
    weights = law_weights_BTW * before_BTW
    mix = np.exp(-3 * overlap)
    each = {
        "kl_offset": kl,
        "overlap_offset": overlap,
        "acceptance_offset": -np.log(overlap),
        "lk_offset": mix * kl + (1 - mix) * (1 - overlap),
    }
    want = {name: (weights * value).sum((0, 1)) for name, value in each.items()}
    for name, value in want.items():
        np.testing.assert_allclose(aux[name], value, atol=2e-5, err_msg=name)
    assert (want["overlap_offset"][own:] > 0.05).all() and (want["kl_offset"][own:] > 0.01).all()
    tv = weights.sum((0, 1)) - want["overlap_offset"]
    against = 0.7 * want["kl_offset"] + 0.3 * tv + 0.2 * want["acceptance_offset"] + 0.4 * want["lk_offset"]
    nll = np.concatenate([np.zeros(own), aux["loss_offset"]])
    np.testing.assert_allclose(loss, np.sum((0.5 * nll + against) * GAMMA ** np.arange(W)), rtol=2e-5)
    means = named({**aux, "loss_offset": nll})
    for s in range(own, W):
        of = (weights > 0)[..., s]
        assert means[f"overlap_offset_{s + 1}"] == pytest.approx(overlap[..., s][of].mean(), abs=1e-4)
        assert means[f"kl_offset_{s + 1}"] == pytest.approx(kl[..., s][of].mean(), abs=1e-4)


def test_weights_of_its_own_are_asked_for():
    model = model_of("shared")
    x_BTD, (targets_BTW, weights_BTW) = hidden(1, BATCH, TIME, 8), make_targets(1, BATCH, TIME)
    with pytest.raises(ValueError, match="give law_weights_BTW"):
        run(lambda model, x, *rest: model.head.loss(seen(model, x), *rest), model, x_BTD, targets_BTW, weights_BTW)


# A batch in parts, and several batches.


def make_config(**changes):
    changes = {**dict(factors="shared", target="ntp", encoder="token", shortlist=8), **WEIGHTS, **changes}
    return tiny.train_config(tiny.model_config(num_layers=1), tiny.head_config(**changes), seq_len=6)


def uneven_batch(config, seed=0):
    batch = tiny.make_batch(config, seed)
    valid_BTW = np.array(batch["valid_BTW"])
    valid_BTW[::4, 2:], valid_BTW[1::4, :, 2:] = False, False
    tokens = np.array(batch["targets_BTW"])
    tokens[::2] %= 8  # listed
    return {**batch, "valid_BTW": tiny.shard(valid_BTW), "targets_BTW": tiny.shard(tokens)}


@pytest.mark.slow
def test_a_batch_in_parts_is_the_batch():
    config = make_config()
    found = []
    for parts, shape in ((1, (1, 1, 1)), (4, (2, 1, 2))):
        with tiny.mesh(*shape):
            trainer = make_trainer(dataclasses.replace(config, grad_accumulation=parts))
            found.append(jax.device_get(trainer.step(trainer.init(), uneven_batch(config))[1]))
    assert {"kl_offset", "overlap_offset", "acceptance_offset", "lk_offset", "listed_before"} <= found[0].keys()
    for other in found[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), other, found[0])
    assert (found[0]["overlap_offset"] <= found[0]["listed_before"] + 1e-6).all()


def test_held_out_means_are_over_all_batches():
    """Of as many targets in all: a batch of both has what two of them have."""
    config = make_config()
    graph, params = split(tiny.make_model(config))
    batches = [uneven_batch(config, seed) for seed in (0, 1)]
    both = jax.tree.map(lambda *rows: tiny.shard(np.concatenate(rows)), *batches)
    loss = jax.jit(functools.partial(batch_loss, graph))
    apart, together = evaluate(loss, params, batches), evaluate(loss, params, [both])
    assert "kl_offset_4" in apart and apart["overlap_offset_1"] == pytest.approx(1)
    assert apart == pytest.approx(together, rel=1e-5)


def test_counts_are_those_of_the_rows():
    batch = {"valid_BTW": jnp.ones((2, 6, 4), bool)}
    np.testing.assert_array_equal(target_counts([batch, batch]), [[24] * 4, [24, 20, 16, 12]])
    none = {"valid_BTW": jnp.zeros((2, 6, 4), bool)}
    np.testing.assert_array_equal(target_counts([none]), np.zeros((2, 4)))


def test_nothing_of_it_runs_without_a_weight():
    """The step of a head that learns likelihood alone has no product more than before: that of the trunk and table."""
    plain, learnt = (
        make_config(shortlist=0, encoder="none", **w) for w in (dict.fromkeys(WEIGHTS, 0) | {"nll_weight": 1}, {})
    )
    text = []
    for config in (plain, learnt):
        graph, params = split(tiny.make_model(config))
        batch = tiny.make_batch(config)
        gradient = jax.grad(functools.partial(batch_loss, graph), has_aux=True)
        text.append(str(jax.make_jaxpr(gradient)(params, batch, target_counts([batch]))))
    products = [found.count("dot_general") for found in text]
    assert products[0] + 1 == products[1]
