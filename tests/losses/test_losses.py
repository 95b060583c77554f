"""The tiled loss against plain autodiff and against the formula, at any tile size."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtp_jax.heads.circuits import CIRCUITS, CPD
from mtp_jax.heads.factors import FACTORS
from mtp_jax.losses import mixture
from mtp_jax.losses import tiles as tiles_module
from mtp_jax.losses.mixture import Terms, conditionals, factor_scores, mixture_loss
from mtp_jax.model.layers import product
from support import tiny
from support.mixture_losses import (
    GAMMA,
    POSITION,
    PROBLEMS,
    TERMS,
    TILES,
    B,
    Identity,
    R,
    T,
    V,
    W,
    assert_close,
    differentiate,
    log_softmax,
    make_arrays,
    make_params,
    on_mesh,
    reference_loss,
    set_tile_bytes,
    set_tiles,
)

pytestmark = pytest.mark.usefixtures("mesh", "float64")


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
    """Parameters, arrays, and the reference's loss and gradients, in float64."""
    factors, circuit = PROBLEMS[request.param]
    with tiny.mesh(), jax.enable_x64(True):
        terms = dataclasses.replace(TERMS, law=CIRCUITS[circuit.removeprefix("narrow ")])
        make = functools.partial(make_params, factors, circuit=circuit)
        params, arrays = make(), make_arrays()
        want = differentiate(reference_loss, None, params, arrays, terms)
        return SimpleNamespace(
            factors=factors, form=FACTORS[factors], terms=terms, make=make, params=params, arrays=arrays, want=want
        )


# The bar is 1e-12 relative.


@pytest.mark.parametrize("tiles", TILES)
def test_loss_and_gradient_are_those_of_plain_autodiff(problem, tiles, monkeypatch):
    set_tiles(monkeypatch, tiles)
    got = differentiate(mixture_loss, problem.form, problem.params, problem.arrays, problem.terms)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"float64"}
    assert_close(got, problem.want, 1e-12)


def test_tiles_are_as_many_as_their_size_says(monkeypatch):
    for name in TILES:
        set_tiles(monkeypatch, name)
        text = jax.jit(functools.partial(mixture_loss, FACTORS["full"], Terms(CPD))).lower(
            make_params("full"), *on_mesh(make_arrays())
        )
        assert f"tensor<{TILES[name][0]}x1x" in text.as_text()


@pytest.mark.parametrize(("tiles", "time"), [(1, T), (2, T), (T, T), (1, 1)])
def test_batch_of_one_sequence(tiles, time, monkeypatch):
    set_tile_bytes(monkeypatch, POSITION * -(-time // tiles))
    params, arrays = make_params("full"), SimpleNamespace(**{k: v[:1, :time] for k, v in vars(make_arrays()).items()})
    got = differentiate(mixture_loss, FACTORS["full"], params, arrays)
    assert_close(got, differentiate(reference_loss, None, params, arrays), 1e-12)


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 1, 4), (1, 4, 1)))]
)
def test_gradients_on_eight_devices_are_those_of_one(problem, shape, monkeypatch):
    """Batch over data and fsdp, vocabulary over tensor, several tiles; and split as the parameters are."""
    set_tile_bytes(monkeypatch, 3 * POSITION // 4)
    with tiny.mesh(*shape):
        params = problem.make()
        loss = functools.partial(mixture_loss, problem.form, problem.terms)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        got = compiled(params, *on_mesh(problem.arrays))
        specs = [jax.tree.map(lambda a: a.sharding.spec, tree) for tree in (got[1][0], params)]
    assert specs[0] == specs[1]
    assert_close(jax.device_get(got), problem.want, 1e-12)


def test_devices_that_do_the_same_work_do_not_add_up(problem):
    """Parameters and batch that are whole on every device."""
    with tiny.mesh(2, 2, 2):
        mesh = jax.sharding.get_mesh()
        everywhere = jax.NamedSharding(mesh, P())
        params = jax.tree.map(lambda a: jax.device_put(np.asarray(a), everywhere), problem.params)
        arrays = (
            problem.arrays.x_BTD,
            problem.arrays.log_w_BTR,
            problem.arrays.targets_BTW,
            problem.arrays.weights_BTW,
        )
        loss = functools.partial(mixture_loss, problem.form, problem.terms)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        got = compiled(params, *(jax.device_put(a, everywhere) for a in arrays))
        assert_close(jax.device_get(got), problem.want, 1e-12)


def test_accelerators_have_the_same_gradient(monkeypatch):
    """They compare all logits with the target's place where CPUs set it."""
    params, arrays = make_params("shared"), make_arrays()
    with tiny.mesh():
        want = differentiate(mixture_loss, FACTORS["shared"], params, arrays)
        monkeypatch.setattr(tiles_module, "platform", lambda: "gpu")
        got = differentiate(mixture_loss, FACTORS["shared"], params, arrays)
    assert_close(jax.device_get(got), jax.device_get(want), 1e-13)


def make_logits_problem():
    """Arrays whose hidden states are the logits."""
    arrays = make_arrays()
    arrays.x_BTD = 2 * np.random.default_rng(2).standard_normal((B, T, R * W * V))
    return arrays


def check_formula(arrays):
    """DESIGN 6: -sum_{s>=j} (lambda_s - lambda_{s+1}) posterior_s, with the posterior of each s and signed differences.

    For the logits this is multiplied by the derivative of log p_rj(x_j), which is 1[v = x_j] - p_rj(v).
    """
    logp_BTRWV = log_softmax(arrays.x_BTD.reshape(B, T, R, W, V))
    hit_BTWV = np.eye(V)[arrays.targets_BTW]
    logp_BTRW = np.einsum("btrwv,btwv->btrw", logp_BTRWV, hit_BTWV)
    joint_BTRW = np.stack([arrays.log_w_BTR + sum(logp_BTRW[..., j] for j in range(s + 1)) for s in range(W)], axis=-1)
    posterior_BTRW = np.exp(log_softmax(joint_BTRW, axis=2))
    lambda_BTW = arrays.weights_BTW * GAMMA ** np.arange(W)
    step_BTW = np.array(lambda_BTW)
    step_BTW[..., :-1] -= lambda_BTW[..., 1:]
    assert (step_BTW < -1e-3).any(), "no coefficient is negative, so a sign could not go wrong"
    each_BTRW = -step_BTW[:, :, None] * posterior_BTRW
    d_logp_BTRW = np.stack([each_BTRW[..., j:].sum(-1) for j in range(W)], axis=-1)
    d_logits = d_logp_BTRW[..., None] * (hit_BTWV[:, :, None] - np.exp(logp_BTRWV))

    (loss, nll_W), (_, d_x, d_log_w) = differentiate(mixture_loss, Identity, {}, arrays, Terms(CPD, GAMMA))
    marginal_BTW = np.log(np.exp(joint_BTRW).sum(2))
    before_BTW = np.concatenate([np.zeros((B, T, 1)), marginal_BTW[..., :-1]], axis=-1)
    want_W = -(arrays.weights_BTW * (marginal_BTW - before_BTW)).sum((0, 1))
    np.testing.assert_allclose(nll_W, want_W, rtol=1e-12, err_msg="value by offset")
    np.testing.assert_allclose(loss, GAMMA ** np.arange(W) @ want_W, rtol=1e-12, err_msg="value")
    np.testing.assert_allclose(d_x.reshape(d_logits.shape), d_logits, atol=1e-14, err_msg="gradient of logits")
    np.testing.assert_allclose(d_log_w, each_BTRW.sum(-1), atol=1e-14, err_msg="gradient of log w")


def test_gradient_is_the_formula():
    check_formula(make_logits_problem())


true_conditionals, true_untile, true_advance = mixture.conditionals, tiles_module.Device.untile, CPD.advance
true_d_logits = tiles_module.Device.d_logits


def one_posterior(law, log_w_BTR, logp_BTRW):
    """The right values, with the gradient that the posterior of the last offset gives to all."""
    joint_BTRW = jnp.cumsum(logp_BTRW, axis=-1) + log_w_BTR[..., None]
    posterior_BTR = jax.lax.stop_gradient(jax.nn.softmax(joint_BTRW[..., -1], axis=2))
    joint_BTW = (posterior_BTR[..., None] * joint_BTRW).sum(2)
    straight = jnp.diff(joint_BTW, axis=-1, prepend=jnp.zeros_like(joint_BTW[..., :1]))
    return straight + jax.lax.stop_gradient(true_conditionals(law, log_w_BTR, logp_BTRW) - straight)


def shifted_advance(carry, score_R, offset):
    """The posterior from the scores of the neighbouring components."""
    return true_advance(carry, jnp.roll(score_R, 1, axis=-1), offset)


def no_hit(self, logits, lse, targets, d_logp, d_lse):
    """The gradient of the normalisers alone."""
    return true_d_logits(self, logits, lse, jnp.full_like(targets, V), d_logp, d_lse)


FAULTS = {
    "one posterior for all offsets": (mixture, "conditionals", one_posterior, "gradient of logits"),
    "scores of other components": (CPD, "advance", staticmethod(shifted_advance), "value by offset"),
    "tiles out of order": (
        tiles_module.Device,
        "untile",
        lambda self, a, like_BT: true_untile(self, a[::-1], like_BT),
        "gradient of logits",
    ),
    "no target in the gradient": (tiles_module.Device, "d_logits", no_hit, "gradient of logits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, monkeypatch):
    """The check above fails on a loss that is wrong in one way, at the place where it is wrong."""
    owner, name, replacement, place = FAULTS[fault]
    set_tile_bytes(monkeypatch, POSITION)
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(AssertionError, match=f"Not equal to tolerance.*\n{place}\n"):
        check_formula(make_logits_problem())


def test_every_factor_gets_a_gradient(problem):
    """Of its own: each rank and each offset."""
    d_params, *_ = differentiate(mixture_loss, problem.form, problem.params, problem.arrays, problem.terms)[1]
    d_own = {"full": "u_DRWV", "shared": "map_DRWD", "residual": "residual_DRWD"}.get(problem.factors, "down_DRWE")
    norm_RW = np.sqrt((d_params[d_own] ** 2).sum((0, 3)))
    assert norm_RW.shape == (R, W)
    assert (norm_RW > 1e-3).all()


def test_masked_targets_contribute_nothing(problem, monkeypatch):
    """Their ids change neither loss nor gradient, not even in the last bit."""
    set_tiles(monkeypatch, "padded")
    other = SimpleNamespace(**vars(problem.arrays))
    garbage = np.random.default_rng(9).integers(0, V, other.targets_BTW.shape).astype(np.int32)
    other.targets_BTW = np.where(other.valid_BTW, other.targets_BTW, garbage)
    assert (other.targets_BTW != problem.arrays.targets_BTW).any()
    loss = functools.partial(mixture_loss, problem.form, dataclasses.replace(problem.terms, z_weight=0.0))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    runs = [compiled(problem.params, *on_mesh(arrays)) for arrays in (problem.arrays, other)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    # A position without any valid target has no gradient.
    masked_BT = ~other.valid_BTW.any(-1)
    assert masked_BT.any()
    assert not np.asarray(runs[0][1][1])[masked_BT].any()


def test_forward_only_is_the_value_that_is_differentiated(problem, monkeypatch):
    """And its offsets are the means, each over its own valid targets, of the conditional log-likelihoods."""
    set_tiles(monkeypatch, "padded")
    arrays = on_mesh(problem.arrays)
    forward, likelihood_BTW = jax.tree.map(
        np.asarray,
        jax.jit(
            lambda params, *arrays: (
                mixture_loss(problem.form, problem.terms, params, *arrays),
                conditionals(
                    problem.terms.law,
                    problem.terms.law.unfold(params, arrays[1], arrays[0]),
                    factor_scores(problem.form, params, arrays[0], arrays[2])[0],
                ),
            )
        )(problem.params, *arrays),
    )
    assert_close(forward, problem.want[0], 1e-12)
    valid_BTW = problem.arrays.valid_BTW
    means_W = [-likelihood_BTW[..., s][valid_BTW[..., s]].mean() for s in range(W)]
    assert len({valid_BTW[..., s].sum() for s in range(W)}) > 1
    np.testing.assert_allclose(forward[1], means_W, rtol=1e-12)


def test_cotangent_scales_the_gradient(problem):
    scaled = differentiate(mixture_loss, problem.form, problem.params, problem.arrays, problem.terms, times=-2.5)
    assert_close(scaled[1], jax.tree.map(lambda g: -2.5 * g, problem.want[1]), 1e-12)


def test_reported_offsets_carry_no_gradient():
    params, arrays = make_params("full"), on_mesh(make_arrays())
    loss = functools.partial(mixture_loss, FACTORS["full"], Terms(CPD))
    gradient = jax.jit(jax.grad(lambda *args: loss(*args)[1].sum(), argnums=(0, 1, 2)))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(params, *arrays)))


def test_bfloat16_gradients_are_as_good_as_those_of_the_naive_loss():
    """Against float64. The naive loss has the same rounded operands, and logits and softmax in float32."""
    rng = np.random.default_rng(0)
    (batch, time, width, vocab), seen = (2, 32, 64, 1000), {}
    rounded = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), np.float64)  # noqa: E731
    params = {"map_DRWD": rounded(width, R, W, width) / 8, "unembed_VD": rounded(vocab, width) / 4}
    arrays = SimpleNamespace(x_BTD=rounded(batch, time, width), log_w_BTR=log_softmax(rounded(batch, time, R)))
    arrays.targets_BTW = rng.integers(0, vocab, (batch, time, W)).astype(np.int32)
    arrays.weights_BTW = np.full((batch, time, W), 1 / (batch * time))
    form = FACTORS["shared"]
    truth = differentiate(reference_loss, None, params, arrays, Terms(CPD))[1]
    single = jax.tree.map(lambda a: a.astype(np.float32), params)
    arrays.log_w_BTR, arrays.weights_BTW = (a.astype(np.float32) for a in (arrays.log_w_BTR, arrays.weights_BTW))

    def naive_logits(params, x_BTD):
        rows = jnp.einsum("btd,drwe->btrwe", x_BTD, params["map_DRWD"].astype(jnp.bfloat16))
        return jnp.einsum("btrwd,vd->btrwv", rows.astype(jnp.float32), params["unembed_VD"])

    arrays.x_BTD = np.asarray(jnp.asarray(arrays.x_BTD, jnp.bfloat16))
    for name, loss_fn, kind in (("ours", mixture_loss, form), ("naive", reference_loss, naive_logits)):
        with jax.enable_x64(False):
            found = differentiate(loss_fn, kind, single, arrays, Terms(CPD))[1]
        pairs = zip(jax.tree.leaves(found[:2]), jax.tree.leaves(truth[:2]), strict=True)
        seen[name] = [np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b) for a, b in pairs]
    assert max(seen["ours"]) < 0.02
    assert all(ours < 1.3 * naive for ours, naive in zip(seen["ours"], seen["naive"], strict=True)), seen


# Products.


def test_a_product_sums_in_float32():
    """bfloat16 operands, and a weight's gradient that keeps the digits of its sum."""
    x, w = jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.float32)
    with jax.enable_x64(False):
        y, pull = jax.vjp(lambda x, w: product("btd,vd->btv", x, w), x, w)
        d_x, d_w = pull(jnp.ones_like(y).at[0, 0, 0].set(1 + 2**-7))
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert float(d_w[0, 0]) == 4096 + 2**-7


@pytest.mark.parametrize("equation, shape", [("btd,dv->btv", (3, 5)), ("btd,vd->btv", (5, 3))])
def test_a_product_in_bfloat16_has_the_gradients_of_einsum(equation, shape):
    """Small whole numbers, whose sums are exact in any order."""
    rng = np.random.default_rng(0)
    x, w, d = (rng.integers(-3, 4, size).astype(np.float32) for size in ((2, 4, 3), shape, (2, 4, 5)))
    expected = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)[1](d)
    with tiny.mesh():
        operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32)
        found = jax.vjp(lambda x, w: product(equation, x, w), *operands)[1](jnp.asarray(d, jnp.float32))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)
