"""Ancestral drafts: one component of each row, drawn from its posterior. The law of the output stays the target's."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_law import FALSE_ALARM, POWER, goodness_of_fit

from mtp_jax.decode import loop
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.generate import for_decoding, generate, make_request, result, start
from mtp_jax.decode.law import Sampling

R, W, SMALL, NEW = tiny.RANK, tiny.WINDOW, 4, 4


@pytest.fixture(autouse=True)
def mesh():
    with tiny.mesh() as mesh:
        yield mesh


def make(factors, **changes):
    """A model whose gate and hidden states matter."""
    model = tiny.make_model(
        tiny.train_config(tiny.model_config(num_layers=1, **changes), tiny.head_config(factors=factors))
    )
    rng = np.random.default_rng(0)
    gate_DR = rng.standard_normal(model.head.gate_DR[...].shape).astype(np.float32)
    model.head.gate_DR[...] = jax.device_put(gate_DR, model.head.gate_DR[...].sharding)
    return model


@pytest.mark.parametrize("factors", ["full", "shared", "lowrank", "lora"])
def test_the_laws_are_those_of_the_component(factors):
    head = make(factors).head
    x_BD = np.random.default_rng(1).standard_normal((6, 16)).astype(np.float32)
    component_B, token_B = np.array([0, 1, 2, 2, 1, 0], np.int32), np.arange(6, dtype=np.int32)

    def states(head, x_BD, component_B, token_B):
        joint = head.condition(head.draft_state(x_BD), token_B)
        first = head.draft_state(x_BD, 1, joint.logp_BRV[0])
        return joint, head.component_state(head.condition(first, token_B), x_BD, component_B, W)

    joint, alone = jax.jit(states)(head, *map(tiny.shard, (x_BD, component_B, token_B)))
    assert alone.offset == 1 and not np.any(alone.log_alpha_BR) and len(alone.logp_BRV) == W
    for s in range(1, W):
        of_row = np.asarray(joint.logp_BRV[s])[np.arange(6), component_B]
        np.testing.assert_allclose(alone.logp_BRV[s][:, 0], of_row, atol=2e-6)


def test_components_are_drawn_from_the_posterior():
    """Power: against a posterior that is off by a tenth."""
    rows, posterior_R = 8192, np.array([0.55, 0.3, 0.15])
    log_alpha_BR = tiny.shard(np.tile(np.log(posterior_R).astype(np.float32), (rows, 1)))
    keys_B = jax.jit(jax.vmap(jax.random.key))(tiny.shard(np.arange(rows, dtype=np.uint32)))

    def drawn(temperature):
        full = [tiny.shard(np.full(rows, value, np.float32)) for value in (temperature, 0, 1)]
        return np.asarray(loop.draw_component(log_alpha_BR, Sampling(*full, keys_B), tiny.shard(np.full(rows, 7))))

    counts = np.bincount(drawn(0.7), minlength=R)
    value, power = goodness_of_fit(counts, posterior_R, np.array([0.605, 0.27, 0.125]))
    assert power > POWER and value > FALSE_ALARM
    assert (drawn(0.0) == 0).all()


@pytest.mark.parametrize(("factors", "draft"), [
    ("full", "ancestral"), ("shared", "ancestral"), ("lowrank", "ancestral"), ("lora", "ancestral"),
    ("full", "unconditioned"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "coupled"])
def test_the_output_is_that_of_plain_decoding(factors, draft, options):
    model, prompts = for_decoding(make(factors)), [[5, 1, 9], [4, 30, 6, 7], [3]]
    plain = generate(model, prompts, max_new_tokens=40, k=0, **options)
    drafted = generate(model, prompts, max_new_tokens=40, draft=draft, **options)
    for a, b in zip(plain.tokens, drafted.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    assert drafted.accepted.sum()


def joint_law(model, prompt, new):
    """Probabilities of all `new` tokens behind the prompt, by whole forwards."""
    chains = np.array(list(itertools.product(range(SMALL), repeat=new)), np.int32)
    tokens_BT = np.concatenate([np.tile(np.array(prompt, np.int32), (len(chains), 1)), chains], axis=1)
    logp_BTV = jax.jit(lambda m, t: m.head.target_log_probs(m(t)))(model, tiny.shard(tokens_BT))
    at = np.take_along_axis(np.asarray(logp_BTV)[:, len(prompt) - 1 : -1], chains[:, :, None], axis=2)
    law = np.exp(np.float64(at[..., 0]).sum(1))
    return law / law.sum()  # of rounding


def counts(model, prompt, new, rows, verifier):
    config = DecodeConfig(new, temperature=1.0, seed=5, verifier=verifier, draft="ancestral")
    request = make_request(model, [prompt] * rows, config)
    state = start(model, request)
    for _ in range(new - 1):  # a row commits at least one token each time
        state = jax.jit(loop.step, static_argnums=0)(request.plan, model, state, request.sampling, request.stops)
    tokens = np.stack(result(request, state).tokens)
    return np.bincount(tokens @ SMALL ** np.arange(new)[::-1], minlength=SMALL**new)


@pytest.fixture(scope="module")
def small():
    """A model of four tokens, as training and as decoding have it, and the joint law of four of them."""
    with tiny.mesh():
        model = make("shared", vocab_size=SMALL)
        maps = model.head.factors.map_DRWD
        maps[...] = 4 * maps[...]  # components that are far apart
        return for_decoding(model), joint_law(model, [2, 0, 1], NEW)


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_the_joint_law_is_the_targets(small, verifier):
    """32,768 rows. Power: against 5% of the rows being uniform."""
    model, law = small
    value, power = goodness_of_fit(counts(model, [2, 0, 1], NEW, 2**15, verifier), law, 0.95 * law + 0.05 / len(law))
    assert power > POWER and value > FALSE_ALARM


def test_fault_reporting_the_law_of_another_component_is_seen(small, monkeypatch):
    draft = loop.draft

    def first_component(plan, model, state, x_BD, token_B, sampling, first_BRV):
        out = draft(plan, model, state, x_BD, token_B, sampling, first_BRV)
        joint, laws = model.head.condition(model.head.draft_state(x_BD), token_B), []
        alone = model.head.component_state(joint, x_BD, jnp.zeros_like(token_B), W)
        for _ in range(plan.k):
            laws.append(model.head.next_log_probs(alone))
            alone = dataclasses.replace(alone, offset=alone.offset + 1)
        return dataclasses.replace(out, logq_BkV=jnp.stack(laws, axis=1))

    monkeypatch.setattr(loop, "draft", first_component)
    jax.clear_caches()
    model, law = small
    value, _ = goodness_of_fit(counts(model, [2, 0, 1], NEW, 2**15, "token"), law, law)
    jax.clear_caches()
    assert value < FALSE_ALARM
