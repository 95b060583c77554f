"""The heads as probability laws: every head, on a vocabulary small enough to list all windows of W tokens."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.heads import factors as factors_module
from mtp_jax.heads.circuits import CPD
from mtp_jax.heads.factors import FACTORS
from mtp_jax.heads.mixture import Joint, MixtureHead
from mtp_jax.language_model import LanguageModel
from mtp_jax.parameters import init_weight
from mtp_jax.sharding import gather
from mtp_jax.validate import ConfigError
from support import tiny
from support.heads import (
    WINDOWS_NW,
    D,
    R,
    V,
    W,
    brute_conditionals,
    brute_law,
    brute_logits,
    brute_posteriors,
    hidden,
    log_softmax,
    loss_of,
    make,
    make_fresh,
    make_targets,
    parameters,
    run,
    seen,
)

pytestmark = pytest.mark.usefixtures("mesh")


CASES = [
    ("independent", 1, "full"),
    *(("cpd", R, factors) for factors in FACTORS),
    ("hmm", R, "full"),
    ("btree", R, "lowrank"),
]
every_factors = pytest.mark.parametrize("factors", list(FACTORS))


@pytest.fixture(scope="module", params=FACTORS)
def fresh(request):
    with tiny.mesh():
        return make_fresh(request.param)


def evaluate(model, x_ND):
    """What the head says of every window after each hidden state."""
    count = len(x_ND)
    x_NMD = np.repeat(x_ND[:, None], V**W, axis=1)
    targets_NMW = np.repeat(WINDOWS_NW[None], count, axis=0)

    def everything(model, x_NMD, targets_NMW, x_BD, targets_BW):
        head = model.head
        state = head.joint(seen(model, x_BD[:, None]), W)
        alphas, laws = [state.log_alpha_BR], []
        for s in range(W):
            laws.append(head.next_log_probs(state))
            state = head.condition(state, targets_BW[:, s])
            alphas.append(state.log_alpha_BR)
        likelihood = head.log_likelihood(seen(model, x_NMD), targets_NMW)
        return likelihood, jnp.stack(laws, 1), jnp.stack(alphas, 1), model.target(seen(model, x_NMD[:, :1]))[0][:, 0]

    flat = x_NMD.reshape(-1, x_ND.shape[-1]), targets_NMW.reshape(-1, W)
    likelihood, laws, alphas, target = run(everything, model, x_NMD, targets_NMW, *flat)
    laws, alphas = laws.reshape(count, V**W, W, V), alphas.reshape(count, V**W, W + 1, -1)
    return SimpleNamespace(likelihood=likelihood, laws=laws, alphas=alphas, target=target)


def check_normalised(got):
    """Windows sum to 1, and so do the law of each next token and the posterior of the components."""
    np.testing.assert_allclose(np.exp(got.likelihood.sum(-1, dtype=np.float64)).sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(np.exp(got.laws).sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(np.exp(got.alphas).sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(np.exp(got.target).sum(-1), 1, atol=2e-6)


def check_likelihood(got, law):
    """The conditionals of the loss are those of the joint law, window by window."""
    chosen = np.take_along_axis(brute_conditionals(law.joint), WINDOWS_NW[None, :, :, None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.exp(got.likelihood), chosen, atol=1e-6)
    np.testing.assert_allclose(got.likelihood, np.log(chosen), atol=1e-5)
    joint = law.joint.reshape(len(law.joint), -1)
    np.testing.assert_allclose(np.exp(got.likelihood.sum(-1)), joint, rtol=1e-5)


def check_drafting(got, law, circuit="cpd"):
    """Drafting token by token follows the joint law, with Bayes' posterior after each token where a component is that
    of the whole window."""
    np.testing.assert_allclose(np.exp(got.laws), brute_conditionals(law.joint), atol=1e-6)
    if circuit == "cpd":
        np.testing.assert_allclose(np.exp(got.alphas), brute_posteriors(law), atol=1e-6)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def case(request):
    """A head, what it says of every window, and the same by brute force."""
    circuit, rank, factors = request.param
    with tiny.mesh():
        model, x_ND = make(circuit=circuit, rank=rank, factors=factors), hidden(1, 2, D)
        return SimpleNamespace(head=model.head, x_ND=x_ND, got=evaluate(model, x_ND), law=brute_law(model, x_ND))


def test_all_laws_sum_to_one(case):
    check_normalised(case.got)


def test_likelihood_is_that_of_the_joint_law(case):
    check_likelihood(case.got, case.law)


def test_drafting_is_exact(case):
    check_drafting(case.got, case.law, case.head.config.circuit)


def test_components_matter_in_these_tests(case):
    """The conditionals of a mixture depend on the tokens before; those of independent offsets do not."""
    second_NMV = case.got.laws[:, :, 1]
    spread = np.ptp(second_NMV, axis=1).max()
    assert (spread > 0.1) == (case.head.config.rank > 1)


def test_marginal_target_is_the_first_tokens_law(case):
    np.testing.assert_allclose(np.exp(case.got.target), case.law.joint.sum((2, 3, 4)), atol=1e-6)


def faulty_advance(carry, score_R, offset):
    return carry, carry


def unnormalised_advance(carry, score_R, offset):
    return carry + score_R, carry + score_R


def late_advance(carry, score_R, offset):
    """The posterior of the components without the first token's score."""
    return true_advance(carry, score_R * (offset > 1), offset)


def component_advance(carry, score_R, offset):
    return true_advance(carry, jnp.cumsum(score_R, axis=-1), offset)


def stuck_next_log_probs(self, draft):
    return jax.nn.logsumexp(draft.log_alpha_BR[:, :, None] + draft.logp_BRV[0], axis=1)


def prior_next_log_probs(self, draft):
    return jnp.mean(draft.logp_BRV[draft.offset], axis=1)


def skipping_condition(self, draft, token_B):
    return Joint(draft.carry, draft.log_alpha_BR, draft.logp_BRV, draft.offset + 1)


def unnormalised_gate(self, x_BTD):
    return jnp.einsum("btd,dr->btr", x_BTD, gather(self.gate_DR[...]))


true_advance = CPD.advance

FAULTS = {
    "forgets to condition": (CPD, "advance", staticmethod(faulty_advance), check_drafting),
    "forgets it in the loss": (CPD, "advance", staticmethod(faulty_advance), check_likelihood),
    "drafting alone forgets it": (MixtureHead, "condition", skipping_condition, check_drafting),
    "posterior not normalised": (CPD, "advance", staticmethod(unnormalised_advance), check_normalised),
    "stuck at the first offset": (MixtureHead, "next_log_probs", stuck_next_log_probs, check_drafting),
    "mean of log-probabilities": (MixtureHead, "next_log_probs", prior_next_log_probs, check_normalised),
    "gate not normalised": (CPD, "latent", unnormalised_gate, check_normalised),
    "first token unheard": (CPD, "advance", staticmethod(late_advance), check_likelihood),
    "scores of other components": (CPD, "advance", staticmethod(component_advance), check_likelihood),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, monkeypatch):
    """Each check above fails on a head that is wrong in the way that the check is there for."""
    owner, name, replacement, check = FAULTS[fault]
    model, x_ND = make(), hidden(1, 2, D)
    monkeypatch.setattr(owner, name, replacement)
    got = evaluate(model, x_ND)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(got) if check is check_normalised else check(got, brute_law(model, x_ND))


@every_factors
def test_logits_of_every_factor_and_of_some_offsets(factors):
    model, x_BTD = make(factors=factors), hidden(2, 2, 3, D)
    want = brute_logits(model, x_BTD.reshape(-1, D)).reshape(2, 3, R, W, V)

    def logits(model, x_BTD):
        given = seen(model, x_BTD)
        return jnp.stack(model.head.logits(given), 3), jnp.stack(model.head.logits(given, 1, 3), 3)

    whole, part = run(logits, model, x_BTD)
    np.testing.assert_allclose(whole, want, atol=5e-6)
    np.testing.assert_allclose(part, want[:, :, :, 1:3], atol=5e-6)


def test_narrow_draft_is_the_start_of_the_whole_one():
    model, x_BTD = make(factors="lowrank"), hidden(2, 3, 1, D)
    whole, narrow = run(lambda m, x: [m.head.joint(seen(m, x), width) for width in (W, 2)], model, x_BTD)
    np.testing.assert_array_equal(narrow.log_alpha_BR, whole.log_alpha_BR)
    np.testing.assert_allclose(np.stack(narrow.logp_BRV), np.stack(whole.logp_BRV[:2]), atol=1e-6)


def test_a_draft_begins_behind_the_first_token_whether_its_law_is_known_or_not():
    """The factors of the first offset may come from the target's law: the draft is the same."""
    model, x_BTD, token_B = make(), hidden(2, 3, 1, D), np.array([1, 0, 3], np.int32)

    def laws(model, x_BTD, token_B):
        given = seen(model, x_BTD)
        first_BRV = model.target(given)[1][:, 0]
        begun = [model.head.begin(given, token_B, window=3, memo=memo) for memo in (None, first_BRV)]
        return [model.head.next_log_probs(draft) for draft in begun]

    alone, given = run(laws, model, x_BTD, token_B)
    np.testing.assert_allclose(given, alone, atol=1e-6)


@every_factors
def test_laws_are_float32_when_the_trunk_is_bfloat16(factors):
    model = make(factors=factors)
    x_BTD, targets_BTW = tiny.shard(hidden(2, 2, 3, D)).astype(jnp.bfloat16), tiny.shard(np.zeros((2, 3, W), np.int32))
    weights_BTW = tiny.shard(np.ones((2, 3, W), np.float32))
    given, head = seen(model, x_BTD), model.head
    laws = jax.eval_shape(
        lambda: (
            head.log_weights(x_BTD),
            head.log_likelihood(given, targets_BTW),
            model.target(given),
            head.joint(seen(model, x_BTD[:, :1]), W),
            head.loss(given, targets_BTW, weights_BTW),
        )
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(laws)} == {"float32"}


def cross_entropies(model, x_BTD, targets_BTW):
    """The plain cross-entropy of each offset's own logits, `[B, T, W]`, for heads of rank 1."""
    logits = brute_logits(model, x_BTD.reshape(-1, D).astype(np.float64))[:, 0].reshape(*targets_BTW.shape, V)
    return -np.take_along_axis(log_softmax(logits), targets_BTW[..., None], axis=-1)[..., 0]


@every_factors
def test_rank_one_is_independent_offsets_and_plain_cross_entropies(factors):
    x_BTD, (targets_BTW, weights_BTW) = hidden(3, 2, 7, D), make_targets(3, 2, 7)
    heads = [make(circuit=circuit, rank=1, factors=factors) for circuit in ("cpd", "independent")]
    cpd, independent = (loss_of(head, x_BTD, targets_BTW, weights_BTW) for head in heads)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), cpd, independent)
    entropies_W = (cross_entropies(heads[1], x_BTD, targets_BTW) * weights_BTW).sum((0, 1))
    np.testing.assert_allclose(cpd[0], entropies_W.sum(), rtol=1e-6)
    np.testing.assert_allclose(cpd[1]["loss_offset"], entropies_W, rtol=1e-6)


BY_COMPONENT = {
    "full": "u_DRWV",
    "shared": "map_DRWD",
    "residual": "residual_DRWD",
    "lowrank": "down_DRWE",
    "lora": "down_DRWE",
}


@every_factors
def test_order_of_components_does_not_matter(factors):
    order, name = [2, 0, 1], BY_COMPONENT[factors]
    head = make(factors=factors)
    values = {key: parameters(head)[key][:, order] for key in ("gate_DR", name)}
    arrays = hidden(3, 2, 7, D), *make_targets(3, 2, 7)
    loss, aux = loss_of(head, *arrays)
    other, other_aux = loss_of(make(factors=factors, values=values), *arrays)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    np.testing.assert_allclose(other_aux.pop("gate_share"), aux.pop("gate_share")[order], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), other_aux, aux)
    # Components that lose their own gate are seen.
    parted = loss_of(make(factors=factors, values={name: values[name]}), *arrays)[0]
    assert abs(parted - loss) > 1e-2


@every_factors
def test_equal_components_have_the_loss_of_rank_one_whatever_the_gate(factors):
    name, common = BY_COMPONENT[factors], dict(factors=factors, balance="none")
    one = parameters(make(factors=factors))[name][:, :1]
    arrays = hidden(3, 2, 7, D), *make_targets(3, 2, 7)
    single = loss_of(make(rank=1, values={name: one}, **common), *arrays)[0]
    equal = loss_of(make(gate=3.0, values={name: np.repeat(one, R, axis=1)}, **common), *arrays)[0]
    np.testing.assert_allclose(equal, single, rtol=1e-6)


def check_copies(fresh):
    """At step 0 the loss is within 1e-3 nats a token of rank 1's, although the components differ by the noise."""
    x_BTD, arrays = hidden(4, 8, 512, 64), make_targets(4, 8, 512, 64, masked=False)
    start, single = (loss_of(head, x_BTD, *arrays)[1]["loss_offset"] for head in (fresh.start, fresh.single))
    np.testing.assert_allclose(start, single, atol=1e-3)
    noise = fresh.start.head.config.init_noise
    noise *= 0.6 if fresh.start.head.config.factors == "residual" else 1  # the slope of silu
    assert noise / 2 < brute_logits(fresh.start, x_BTD[0]).std(axis=1).mean() < 2 * noise


def check_scale(fresh):
    """1 / sqrt(D) for each (r, s): R and W are batch axes, so they are no part of the fan-in. Logits start near 1."""
    found, width = parameters(fresh.start), 64
    scales = dict.fromkeys(found, width**-0.5) | {"down_DRWE": fresh.start.head.config.init_noise * width**-0.5}
    per_factor = {"map_DWD": (0, 2)} | dict.fromkeys(("u_DRWV", "map_DRWD", "residual_DRWD", "down_DRWE"), (0, 3))
    for name in found.keys() - {"gate_DR"}:
        std = found[name].std(axis=per_factor.get(name))
        np.testing.assert_allclose(std, scales[name], rtol=0.06, err_msg=name)
    # h + silu(z) of normal h and z has the variance 1 + 0.36.
    scale = 1.16 if "residual_DRWD" in found else 1
    np.testing.assert_allclose(brute_logits(fresh.start, hidden(5, 64, width)).std(axis=(0, 3)), scale, rtol=0.1)


def test_components_start_as_copies(fresh):
    check_copies(fresh)


def test_initial_scale_is_that_of_one_factor(fresh):
    check_scale(fresh)


def test_no_noise_makes_equal_components(fresh):
    equal, single = (brute_logits(head, hidden(4, 8, 64)) for head in (fresh.equal, fresh.single))
    np.testing.assert_array_equal(equal, np.repeat(single, 4, axis=1))


def separate_components(rngs, name, shape, noise):
    return init_weight(rngs, name, shape)


def wide_fan_in(rngs, name, shape, scale=1.0):
    return init_weight(rngs, name, shape, scale / np.sqrt(np.prod(shape[1:-1])))


INIT_FAULTS = {
    "components drawn apart": ("_copies", separate_components, check_copies),
    "rank and window in the fan-in": ("init_weight", wide_fan_in, check_scale),
}


@pytest.mark.parametrize("fault", INIT_FAULTS)
def test_fault_of_initialisation_is_caught(fault, monkeypatch):
    name, replacement, check = INIT_FAULTS[fault]
    monkeypatch.setattr(factors_module, name, replacement)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(make_fresh("full"))


def test_gate_starts_uniform(fresh):
    log_w_BTR = run(lambda model, x_BTD: model.head.log_weights(x_BTD), fresh.start, hidden(5, 2, 3, 64))
    np.testing.assert_allclose(np.exp(log_w_BTR), 1 / 4, rtol=1e-6)


def test_gate_and_first_token_are_reported():
    """Means over the positions with a next token, as sums that add up."""
    model, x_BTD = make(), hidden(3, 2, 7, D)
    targets_BTW, weights_BTW = make_targets(3, 2, 7)
    aux = loss_of(model, x_BTD, targets_BTW, weights_BTW)[1]
    w_NR, weight_N = brute_law(model, x_BTD.reshape(-1, D)).w_NR, weights_BTW[..., 0].reshape(-1)
    np.testing.assert_allclose(aux["gate_share"], weight_N @ w_NR, rtol=1e-5)
    np.testing.assert_allclose(aux["gate_share"].sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(aux["gate_entropy"], -weight_N @ (w_NR * np.log(w_NR)).sum(-1), rtol=1e-5)


@every_factors
def test_next_token_target_is_the_models_own(factors):
    """Target `ntp` is the softmax of the model's table; its cross-entropy is added and reported."""
    model = make(factors=factors, target="ntp", ntp_weight=0.3, balance="none", gamma=0.5)
    tokens_BT, (targets_BTW, weights_BTW) = np.arange(14).reshape(2, 7) % V, make_targets(3, 2, 7)
    batch = {"tokens_BT": tokens_BT, "segments_BT": np.zeros_like(tokens_BT), "targets_BTW": targets_BTW}

    def everything(model, weights_BTW, *batch_arrays):
        batch = dict(zip(("tokens_BT", "segments_BT", "targets_BTW"), batch_arrays, strict=True))
        given = model.see(batch["tokens_BT"])
        return model.loss(batch, weights_BTW), model.target(given)[0], given.x_BTD

    (loss, aux), target, x_BTD = run(everything, model, weights_BTW, *batch.values())
    want = log_softmax(x_BTD.astype(np.float64) @ parameters(model)["unembed_VD"].T)
    np.testing.assert_allclose(target, want, atol=5e-6)
    np.testing.assert_allclose(np.exp(target).sum(-1), 1, atol=1e-6)
    chosen_BT = np.take_along_axis(want, targets_BTW[..., :1], axis=-1)[..., 0]
    entropy = -(chosen_BT * weights_BTW[..., 0]).sum()
    np.testing.assert_allclose(aux["loss_first_token"], entropy, rtol=1e-5)
    np.testing.assert_allclose(loss, aux["loss_offset"] @ 0.5 ** np.arange(W) + 0.3 * entropy, rtol=1e-5)
    # The mixture's own first token is another law, so this test would see one in place of the other.
    assert abs(aux["loss_offset"][0] - entropy) > 1e-3


@pytest.mark.parametrize("form", ["none", "squared", "switch"])
def test_balance_enters_the_loss_with_its_weight(form):
    x_BTD, (targets_BTW, weights_BTW) = hidden(3, 2, 7, D), make_targets(3, 2, 7)
    model = make(balance=form, balance_weight=0.7)
    loss, aux = loss_of(model, x_BTD, targets_BTW, weights_BTW)
    first_NR = np.eye(R)[brute_law(model, x_BTD.reshape(-1, D)).w_NR.argmax(-1)]
    penalty = {
        "none": 0.0,
        "squared": ((aux["gate_share"] - 1 / R) ** 2).sum(),
        "switch": R * (weights_BTW[..., 0].reshape(-1) @ first_NR) @ aux["gate_share"],
    }[form]
    np.testing.assert_allclose(loss - aux["loss_offset"].sum(), 0.7 * penalty, atol=2e-6)


UNKNOWN = {
    "kind": ("mixtur", r"HeadConfig.kind is 'mixtur'; did you mean 'mixture'\?"),
    "circuit": ("cdp", r"HeadConfig.circuit is 'cdp'; did you mean 'cpd'\?.*btree, cpd, hmm, independent"),
    "factors": (
        "low-rank",
        r"HeadConfig.factors is 'low-rank'; did you mean 'lowrank'\?.*full, lora, lowrank, residual, shared",
    ),
}


@pytest.mark.parametrize("field", UNKNOWN)
def test_unknown_names_are_answered_with_the_nearest(field):
    name, message = UNKNOWN[field]
    with pytest.raises(ConfigError, match=message):
        make(**{field: name})


@every_factors
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_targets_law_can_be_differentiated(factors, shape):
    """By whoever distils into it, on any mesh: with respect to the hidden states, against finite differences."""
    with tiny.mesh(*shape):
        configs = tiny.model_config(num_layers=1), tiny.head_config(factors=factors)
        model = jax.jit(lambda: LanguageModel(*configs, rngs=nnx.Rngs(0)))()
        x_BTD, direction = hidden(0, 4, 2, 16), hidden(1, 4, 2, 16)
        value = lambda x: jnp.sum(model.target(seen(model, x))[0] * (jnp.arange(tiny.VOCAB) == 3)[None, None])  # noqa: E731
        gradient, value = jax.jit(jax.grad(value))(tiny.shard(x_BTD)), jax.jit(value)
        ahead, behind = (float(value(tiny.shard(x_BTD + step * direction))) for step in (0.01, -0.01))
    assert (np.asarray(gradient) * direction).sum() == pytest.approx((ahead - behind) / 0.02, rel=2e-2, abs=2e-2)
