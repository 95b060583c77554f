"""The tiled loss against plain autodiff and against the formula, at any tile size; load balancing by hand."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from mtp_jax.config import OptimizerConfig
from mtp_jax.heads.factors import FACTORS
from mtp_jax.losses import mixture
from mtp_jax.losses import tiles as tiles_module
from mtp_jax.losses.balance import balance_loss
from mtp_jax.losses.mixture import Terms, factor_scores, mixture_log_likelihood, mixture_loss
from mtp_jax.model.layers import product
from mtp_jax.sharding import RULES
from mtp_jax.train.step import make_trainer

B, T, W, R, D, V, E = 4, 7, 4, 3, 8, 12, 5
GAMMA, Z = 0.8, 0.3
POSITION = R * W * V * 8  # bytes of the logits of one position, in float64
# Tiles of the 28 positions: one; 28 of one position; six of five positions, of which the last two are padding.
TILES = {"whole": (1, 10**9), "positions": (28, POSITION), "padded": (6, int(5.5 * POSITION))}


@pytest.fixture(autouse=True)
def mesh():
    with tiny.mesh():
        yield


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_softmax(z, axis=-1):
    z = z - z.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


def make_arrays(seed=0):
    """Hidden states, gate, targets and weights: windows end early, so that counts fall with the offset, unevenly."""
    rng = np.random.default_rng(seed)
    length_BT = rng.integers(0, W + 1, (B, T))
    valid_BTW = np.arange(W) < length_BT[..., None]
    return SimpleNamespace(
        x_BTD=rng.standard_normal((B, T, D)),
        log_w_BTR=log_softmax(rng.standard_normal((B, T, R))),
        targets_BTW=rng.integers(0, V, (B, T, W)).astype(np.int32),
        weights_BTW=valid_BTW / valid_BTW.sum((0, 1)),
        valid_BTW=valid_BTW,
    )


def on_mesh(arrays):
    return [tiny.shard(a) for a in (arrays.x_BTD, arrays.log_w_BTR, arrays.targets_BTW, arrays.weights_BTW)]


SHAPES = {
    "full": {"u_DRWV": (D, R, W, V)},
    "shared": {"map_DRWD": (D, R, W, D), "unembed_VD": (V, D)},
    "lowrank": {"map_DWD": (D, W, D), "down_DRWE": (D, R, W, E), "up_ED": (E, D), "unembed_VD": (V, D)},
    "lora": {"u_DWV": (D, W, V), "down_DRWE": (D, R, W, E), "up_EV": (E, V)},
}


def make_params(factors, seed=0):
    """Parameters on the mesh, split as those of a model are."""
    rng = np.random.default_rng(seed)

    def place(name, shape):
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), getattr(RULES, name))
        return jax.device_put(rng.standard_normal(shape) / 2, sharding)

    return {name: place(name, shape) for name, shape in SHAPES[factors].items()}


class Identity:
    """The form whose hidden states are the logits, so that their gradient is that of the logits."""

    @staticmethod
    def tables(params):
        return params

    @staticmethod
    def logits(tables, x_BTD):
        return x_BTD.reshape(*x_BTD.shape[:2], R, W, V)


def reference_logits(params, x_BTD):
    """Each form as it is written, from its parameters."""
    if "u_DRWV" in params:
        return jnp.einsum("btd,drwv->btrwv", x_BTD, params["u_DRWV"])
    if "map_DRWD" in params:
        return jnp.einsum("btd,drwe,ve->btrwv", x_BTD, params["map_DRWD"], params["unembed_VD"])
    if "u_DWV" in params:
        own_BTRWV = jnp.einsum("btd,drwe,ev->btrwv", x_BTD, params["down_DRWE"], params["up_EV"])
        return jnp.einsum("btd,dwv->btwv", x_BTD, params["u_DWV"])[:, :, None] + own_BTRWV
    shared_BTWV = jnp.einsum("btd,dwe,ve->btwv", x_BTD, params["map_DWD"], params["unembed_VD"])
    own = "btd,drwe,ec,vc->btrwv", x_BTD, params["down_DRWE"], params["up_ED"], params["unembed_VD"]
    return shared_BTWV[:, :, None] + jnp.einsum(*own)


def reference_loss(form, terms, params, x_BTD, log_w_BTR, targets_BTW, weights_BTW):
    """DESIGN 6 as it is written, with all logits at once and no thought for anything but clarity."""
    logits_BTRWV = (form or reference_logits)(params, x_BTD)
    lse_BTRW = jax.nn.logsumexp(logits_BTRWV, axis=-1)
    hit_BTWV = jax.nn.one_hot(targets_BTW, logits_BTRWV.shape[-1], dtype=logits_BTRWV.dtype)
    joint_BTR, before_BT, nll = log_w_BTR, 0.0, []
    for s in range(logits_BTRWV.shape[3]):
        joint_BTR = joint_BTR + (logits_BTRWV[:, :, :, s] * hit_BTWV[:, :, None, s]).sum(-1) - lse_BTRW[..., s]
        after_BT = jax.nn.logsumexp(joint_BTR, axis=2)
        nll.append(-jnp.sum(weights_BTW[..., s] * (after_BT - before_BT)))
        before_BT = after_BT
    z = jnp.sum(weights_BTW * jnp.mean(lse_BTRW**2, axis=2))
    loss = sum(terms.gamma**s * nll_s for s, nll_s in enumerate(nll)) + terms.z_weight * z
    return loss, jnp.stack(nll)


def recomputed_loss(form, terms, params, x_BTD, log_w_BTR, targets_BTW, weights_BTW):
    """The same by the other primitive, whose backward pass computes the logits again."""
    logp_BTRW, lse_BTRW = factor_scores(form, params, x_BTD, targets_BTW)
    return mixture._objective(terms, logp_BTRW, lse_BTRW, log_w_BTR, weights_BTW)


def differentiate(loss_fn, form, params, arrays, terms=Terms(GAMMA, Z), times=1.0):  # noqa: B008
    """((loss, nll), gradients of params, x and log w) of `times` the loss, compiled afresh.

    The reference runs on whole arrays, without shardings.
    """
    if loss_fn is reference_loss:
        params = jax.tree.map(np.asarray, params)
        values = arrays.x_BTD, arrays.log_w_BTR, arrays.targets_BTW, arrays.weights_BTW
    else:
        values = on_mesh(arrays)

    def loss(*args):
        value, nll_W = loss_fn(form, terms, *args)
        return times * value, nll_W

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.map(np.asarray, compiled(params, *values))


def assert_close(got, want, tolerance):
    """Every leaf within `tolerance` of the largest value of its reference."""

    def close(got, want):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())

    jax.tree.map(close, got, want)


def set_tile_bytes(monkeypatch, size):
    monkeypatch.setattr(tiles_module, "TILE_BYTES", {"cpu": size})


def set_tiles(monkeypatch, name):
    """Set the tile size; make sure that it gives the number of tiles that it is there for."""
    count, size = TILES[name]
    set_tile_bytes(monkeypatch, size)
    assert count * -(-B * T // count) >= B * T and -(-B * T // max(1, size // POSITION)) == count


@pytest.fixture(scope="module", params=FACTORS)
def problem(request):
    """Parameters, arrays, and the reference's loss and gradients, in float64."""
    with tiny.mesh(), jax.enable_x64(True):
        form, params, arrays = FACTORS[request.param], make_params(request.param), make_arrays()
        want = differentiate(reference_loss, None, params, arrays)
        return SimpleNamespace(factors=request.param, form=form, params=params, arrays=arrays, want=want)


# The bar is 1e-12 relative.


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("loss_fn", [mixture_loss, recomputed_loss])
def test_loss_and_gradient_are_those_of_plain_autodiff(problem, loss_fn, tiles, monkeypatch):
    set_tiles(monkeypatch, tiles)
    got = differentiate(loss_fn, problem.form, problem.params, problem.arrays)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"float64"}
    assert_close(got, problem.want, 1e-12)


def test_tiles_are_as_many_as_their_size_says(monkeypatch):
    for name in TILES:
        set_tiles(monkeypatch, name)
        text = jax.jit(functools.partial(mixture_loss, FACTORS["full"], Terms())).lower(
            make_params("full"), *on_mesh(make_arrays())
        )
        assert f"tensor<{TILES[name][0]}x1x" in text.as_text()


@pytest.mark.parametrize(("tiles", "time"), [(1, T), (2, T), (T, T), (1, 1)])
def test_batch_of_one_sequence(tiles, time, monkeypatch):
    set_tile_bytes(monkeypatch, POSITION * -(-time // tiles))
    params, arrays = make_params("full"), SimpleNamespace(**{k: v[:1, :time] for k, v in vars(make_arrays()).items()})
    got = differentiate(mixture_loss, FACTORS["full"], params, arrays)
    assert_close(got, differentiate(reference_loss, None, params, arrays), 1e-12)


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 4), (1, 4, 1)])
@pytest.mark.parametrize("loss_fn", [mixture_loss, recomputed_loss])
def test_gradients_on_eight_devices_are_those_of_one(problem, loss_fn, shape, monkeypatch):
    """Batch over data and fsdp, vocabulary over tensor, several tiles; and split as the parameters are."""
    set_tile_bytes(monkeypatch, 3 * POSITION // 4)
    with tiny.mesh(*shape):
        params = make_params(problem.factors)
        loss = functools.partial(loss_fn, problem.form, Terms(GAMMA, Z))
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
        for loss_fn in (mixture_loss, recomputed_loss):
            loss = functools.partial(loss_fn, problem.form, Terms(GAMMA, Z))
            compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            got = compiled(params, *(jax.device_put(a, everywhere) for a in arrays))
            assert_close(jax.device_get(got), problem.want, 1e-12)


def lower_large(shape, factors="shared", dtype=jnp.float32, batch=8, time=128, vocab=4096):
    """The compiled loss and gradient of a problem that is never run, R = 8, W = 4, D = 256."""
    sizes = {"D": 256, "R": 8, "W": 4, "V": vocab, "E": 64}
    with tiny.mesh(*shape) as mesh, jax.enable_x64(False):

        def abstract(dtype, spec, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

        params = {
            name: abstract(jnp.float32, getattr(RULES, name), *(sizes[letter] for letter in name.split("_")[1]))
            for name in SHAPES[factors]
        }
        arrays = [
            abstract(kind, RULES.x_BTD, batch, time, size)
            for size, kind in ((256, dtype), (8, jnp.float32), (4, jnp.int32), (4, jnp.float32))
        ]
        loss = functools.partial(mixture_loss, FACTORS[factors], Terms())
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(params, *arrays).compile()


def loop_and_rest(text):
    """The lines of a compiled program that are in the body of a loop, and the others."""
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    inside, rest, here = [], [], False
    for line in text.splitlines():
        if match := re.match(r"%?([\w.\-]+) \(.*\{$", line):
            here = match[1] in bodies
        (inside if here else rest).append(line)
    return inside, rest


def collectives(lines):
    """Elements that each collective of these lines gives, largest first."""
    found = []
    for line in lines:
        if match := re.search(r"= (\(?[^=]*?) (all-reduce|reduce-scatter|all-gather|all-to-all)\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    return sorted(found, reverse=True)


def test_no_gradient_of_a_table_is_exchanged_in_the_loop():
    """In it only what positions have; after it one reduction for each table."""
    with pytest.MonkeyPatch.context() as patch:
        set_tile_bytes(patch, 2**20)
        inside, rest = loop_and_rest(lower_large((2, 2, 2)).as_text())
    positions = 2**20 // (8 * 4 * 2048 * 4)
    assert collectives(inside) and collectives(inside)[0] <= positions * 256
    # The largest outside: a map [D, R, W, D] is gathered, its gradient scattered over fsdp.
    assert collectives(rest)[0] == 256 * 8 * 4 * 256


def test_work_is_divided_among_devices():
    """A loop's body is counted once, so the tiles are made one."""
    with pytest.MonkeyPatch.context() as patch:
        set_tile_bytes(patch, 2**40)
        flops = {shape: lower_large(shape).cost_analysis()["flops"] for shape in ((1, 1, 1), (8, 1, 1), (2, 2, 2))}
    assert flops[8, 1, 1] < 1.02 * flops[1, 1, 1] / 8
    # The maps are not split over tensor: a small part of the work, at this vocabulary 1/16 of the logits'.
    assert flops[2, 2, 2] < 1.15 * flops[1, 1, 1] / 8


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

    (loss, nll_W), (_, d_x, d_log_w) = differentiate(mixture_loss, Identity, {}, arrays, Terms(GAMMA))
    marginal_BTW = np.log(np.exp(joint_BTRW).sum(2))
    before_BTW = np.concatenate([np.zeros((B, T, 1)), marginal_BTW[..., :-1]], axis=-1)
    want_W = -(arrays.weights_BTW * (marginal_BTW - before_BTW)).sum((0, 1))
    np.testing.assert_allclose(nll_W, want_W, rtol=1e-12, err_msg="value by offset")
    np.testing.assert_allclose(loss, GAMMA ** np.arange(W) @ want_W, rtol=1e-12, err_msg="value")
    np.testing.assert_allclose(d_x.reshape(d_logits.shape), d_logits, atol=1e-14, err_msg="gradient of logits")
    np.testing.assert_allclose(d_log_w, each_BTRW.sum(-1), atol=1e-14, err_msg="gradient of log w")


def test_gradient_is_the_formula():
    check_formula(make_logits_problem())


true_conditionals, true_untile, true_cumsum = mixture.conditionals, tiles_module.Device.untile, jnp.cumsum
true_d_logits = tiles_module.Device.d_logits


def one_posterior(logp_BTRW, log_w_BTR):
    """The right values, with the gradient that the posterior of the last offset gives to all."""
    joint_BTRW = jnp.cumsum(logp_BTRW, axis=-1) + log_w_BTR[..., None]
    posterior_BTR = jax.lax.stop_gradient(jax.nn.softmax(joint_BTRW[..., -1], axis=2))
    joint_BTW = (posterior_BTR[..., None] * joint_BTRW).sum(2)
    straight = jnp.diff(joint_BTW, axis=-1, prepend=jnp.zeros_like(joint_BTW[..., :1]))
    return straight + jax.lax.stop_gradient(true_conditionals(logp_BTRW, log_w_BTR) - straight)


def no_hit(self, logits, lse, targets, d_logp, d_lse):
    """The gradient of the normalisers alone."""
    return true_d_logits(self, logits, lse, jnp.full_like(targets, V), d_logp, d_lse)


FAULTS = {
    "one posterior for all offsets": (mixture, "conditionals", one_posterior, "gradient of logits"),
    "cumsum over components": (jnp, "cumsum", lambda a, axis: true_cumsum(a, axis=2), "value by offset"),
    "tiles out of order": (
        tiles_module.Device,
        "untile",
        lambda self, a, x: true_untile(self, a[::-1], x),
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
    d_params, *_ = differentiate(mixture_loss, problem.form, problem.params, problem.arrays)[1]
    d_own = {"full": "u_DRWV", "shared": "map_DRWD"}.get(problem.factors, "down_DRWE")
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
    loss = functools.partial(mixture_loss, problem.form, Terms(GAMMA))
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
                mixture_loss(problem.form, Terms(GAMMA, Z), params, *arrays),
                mixture_log_likelihood(problem.form, params, *arrays[:3]),
            )
        )(problem.params, *arrays),
    )
    assert_close(forward, problem.want[0], 1e-12)
    valid_BTW = problem.arrays.valid_BTW
    means_W = [-likelihood_BTW[..., s][valid_BTW[..., s]].mean() for s in range(W)]
    assert len({valid_BTW[..., s].sum() for s in range(W)}) > 1
    np.testing.assert_allclose(forward[1], means_W, rtol=1e-12)


@pytest.mark.parametrize("loss_fn", [mixture_loss, recomputed_loss])
def test_cotangent_scales_the_gradient(problem, loss_fn):
    scaled = differentiate(loss_fn, problem.form, problem.params, problem.arrays, times=-2.5)
    assert_close(scaled[1], jax.tree.map(lambda g: -2.5 * g, problem.want[1]), 1e-12)


def test_reported_offsets_carry_no_gradient():
    params, arrays = make_params("full"), on_mesh(make_arrays())
    loss = functools.partial(mixture_loss, FACTORS["full"], Terms())
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
    truth = differentiate(reference_loss, None, params, arrays, Terms())[1]
    single = jax.tree.map(lambda a: a.astype(np.float32), params)
    arrays.log_w_BTR, arrays.weights_BTW = (a.astype(np.float32) for a in (arrays.log_w_BTR, arrays.weights_BTW))

    def naive_logits(params, x_BTD):
        rows = jnp.einsum("btd,drwe->btrwe", x_BTD, params["map_DRWD"].astype(jnp.bfloat16))
        return jnp.einsum("btrwd,vd->btrwv", rows.astype(jnp.float32), params["unembed_VD"])

    arrays.x_BTD = np.asarray(jnp.asarray(arrays.x_BTD, jnp.bfloat16))
    for name, loss_fn, kind in (("ours", mixture_loss, form), ("naive", reference_loss, naive_logits)):
        with jax.enable_x64(False):
            found = differentiate(loss_fn, kind, single, arrays, Terms())[1]
        pairs = zip(jax.tree.leaves(found[:2]), jax.tree.leaves(truth[:2]), strict=True)
        seen[name] = [np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b) for a, b in pairs]
    assert max(seen["ours"]) < 0.02
    assert all(ours < 1.3 * naive for ours, naive in zip(seen["ours"], seen["naive"], strict=True)), seen


# Memory.


def scratch_bytes(batch, time, factors="shared", vocab=32768):
    return lower_large((1, 1, 1), factors, batch=batch, time=time, vocab=vocab).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("factors", ["shared", "lowrank"])
def test_memory_is_that_of_a_tile(factors):
    """The logits of 512 positions are 2 GiB; 100 MiB are enough, of which 32 are the table's gradient."""
    assert scratch_bytes(2, 256, factors) < 100 * 2**20


@pytest.mark.parametrize(("batch", "time"), [(4, 8192), (2048, 16), (8192, 4)])
def test_memory_does_not_grow_with_the_batch(batch, time):
    """From 4,096 to 32,768 positions, beyond the gradient of the hidden states, whatever the shape of the batch is."""

    def beyond(batch, time):
        return scratch_bytes(batch, time) - 4 * 256 * batch * time

    assert beyond(batch, time) < 1.05 * beyond(4, 1024)


def test_memory_of_one_large_tile_is_seen(monkeypatch):
    """The measure that the tests above use does see logits that live together."""
    set_tile_bytes(monkeypatch, 2**31)
    assert scratch_bytes(2, 256) > 2**31


@pytest.mark.slow
def test_a_large_vocabulary_trains():
    """A real step at V = 32,768, R = 8, W = 4: the loss falls."""
    with jax.enable_x64(False):
        model = tiny.model_config(vocab_size=32768)
        config = tiny.train_config(
            model,
            tiny.head_config(rank=8, factors="lowrank"),
            batch=2,
            seq_len=8,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        )
        trainer = make_trainer(config)
        state, batch, losses = trainer.init(), tiny.make_batch(config), []
        for _ in range(3):
            state, metrics = trainer.step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2] and losses[0] < 1.05 * W * np.log(32768)


# Products.


def test_a_product_sums_in_float32():
    """bfloat16 operands, and a weight's gradient that keeps the digits of its sum."""
    x, w = jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.float32)
    with jax.enable_x64(False):
        y, pull = jax.vjp(lambda x, w: product("btd,vd->btv", x, w), x, w)
        d_x, d_w = pull(jnp.ones_like(y).at[0, 0, 0].set(1 + 2**-7))
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert float(d_w[0, 0]) == 4096 + 2**-7


# Load balancing.


def run_balance(balance, form, z_BTR, weight_BT):
    """The penalty and its gradient with respect to the gate's logits."""
    compiled = jax.jit(jax.value_and_grad(lambda z, weight: balance(form, jax.nn.log_softmax(z, axis=-1), weight)))
    value, gradient = compiled(tiny.shard(z_BTR.astype(np.float32)), tiny.shard(weight_BT.astype(np.float32)))
    return float(value), np.asarray(gradient)


def make_gate(seed=0):
    """Logits of the gate of two rows of six positions, and weights that sum to 1, some of them 0."""
    rng = np.random.default_rng(seed)
    weight_BT = rng.random((2, 6)) * (rng.random((2, 6)) < 0.8)
    return 2 * rng.standard_normal((2, 6, R)) + np.arange(R), weight_BT / weight_BT.sum()


def gate_shares(z_BTR, weight_BT):
    """The mean weight of each component, and the fraction of positions at which it is the largest."""
    w_BTR = np.exp(log_softmax(z_BTR))
    mean_R = np.einsum("bt,btr->r", weight_BT, w_BTR)
    return mean_R, np.einsum("bt,btr->r", weight_BT, np.eye(R)[w_BTR.argmax(-1)])


def check_values(balance):
    """By hand, with positions of unequal weight: squared distance from equal shares, and the Switch form."""
    z_BTR, weight_BT = make_gate()
    mean_R, first_R = gate_shares(z_BTR, weight_BT)
    squared, switch = (run_balance(balance, form, z_BTR, weight_BT)[0] for form in ("squared", "switch"))
    np.testing.assert_allclose(squared, ((mean_R - 1 / R) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(switch, R * first_R @ mean_R, rtol=1e-5)


def check_extremes(balance):
    """Decided positions with equal shares have the least penalty; one component that takes all has the most."""
    weight_BT = np.full((2, 6), 1 / 12)
    decided_BTR = 50 * np.eye(R)[np.arange(12) % R].reshape(2, 6, R)
    collapsed_BTR = 50 * np.broadcast_to(np.eye(R)[0], (2, 6, R))
    for form, least, most in ("squared", 0, 1 - 1 / R), ("switch", 1, R):
        equal = run_balance(balance, form, decided_BTR, weight_BT)[0]
        np.testing.assert_allclose(equal, least, rtol=1e-5, atol=1e-10)
        np.testing.assert_allclose(run_balance(balance, form, collapsed_BTR, weight_BT)[0], most, rtol=1e-5)


def check_direction(balance):
    """A step against the gradient evens the shares."""
    z_BTR, weight_BT = make_gate()
    before_R = gate_shares(z_BTR, weight_BT)[0]
    for form in "squared", "switch":
        step = run_balance(balance, form, z_BTR, weight_BT)[1]
        after_R = gate_shares(z_BTR - step / np.abs(step).max(), weight_BT)[0]
        assert np.ptp(after_R) < 0.95 * np.ptp(before_R), f"{form} does not even the shares"


def check_parts(balance):
    """Micro-batches: weights add up to 1 over all parts, so equal parts give the whole and others no less."""
    z_BTR, weight_BT = make_gate()
    for form in "squared", "switch":
        whole, gradient = run_balance(balance, form, z_BTR, weight_BT)
        part, part_gradient = run_balance(balance, form, z_BTR, weight_BT / 4)
        np.testing.assert_allclose(4 * part, whole, rtol=1e-5)
        np.testing.assert_allclose(4 * part_gradient, gradient, rtol=1e-4, atol=1e-7)
    split = [run_balance(balance, "squared", z_BTR, weight_BT * rows)[0] for rows in ([[1], [0]], [[0], [1]])]
    assert sum(split) >= run_balance(balance, "squared", z_BTR, weight_BT)[0] > 1e-3


@pytest.mark.parametrize("check", [check_values, check_extremes, check_direction, check_parts])
def test_balance(check):
    check(balance_loss)


def per_position(form, log_w_BTR, weight_BT):
    distance_BT = jnp.square(jnp.exp(log_w_BTR) - 1 / R).sum(-1)
    return jnp.sum(weight_BT * distance_BT) if form == "squared" else balance_loss(form, log_w_BTR, weight_BT)


def unweighted(form, log_w_BTR, weight_BT):
    return balance_loss(form, log_w_BTR, jnp.full_like(weight_BT, 1 / 12))


BALANCE_FAULTS = {
    "every position on its own": (per_position, check_extremes),
    "masked positions counted": (unweighted, check_values),
    "wrong sign": (lambda *args: -balance_loss(*args), check_direction),
    "share of the part forgotten": (lambda *args: balance_loss(*args) / jnp.sum(args[2]), check_parts),
}


@pytest.mark.parametrize("fault", BALANCE_FAULTS)
def test_fault_of_balance_is_caught(fault):
    balance, check = BALANCE_FAULTS[fault]
    with pytest.raises(AssertionError, match=r"Not equal to tolerance|does not even"):
        check(balance)


def test_switch_gradient_takes_the_fractions_as_constants():
    z_BTR, weight_BT = make_gate()
    w_BTR, (_, first_R) = np.exp(log_softmax(z_BTR)), gate_shares(z_BTR, weight_BT)
    # The derivative of w_r with respect to z_q is w_r (1[q = r] - w_q).
    want = R * weight_BT[..., None] * w_BTR * (first_R - (w_BTR @ first_R)[..., None])
    np.testing.assert_allclose(run_balance(balance_loss, "switch", z_BTR, weight_BT)[1], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["squared", "switch"])
def test_part_without_targets_has_no_penalty(form):
    value, gradient = run_balance(balance_loss, form, make_gate()[0], np.zeros((2, 6)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
