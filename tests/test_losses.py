"""The tiled loss against plain autodiff and against the formula, at any tile size; load balancing by hand."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from mtp_jax.heads.factors import FACTORS, factor_logits
from mtp_jax.losses import mixture
from mtp_jax.losses.balance import balance_loss
from mtp_jax.losses.mixture import mixture_log_likelihood, mixture_loss
from mtp_jax.model.layers import init_weight
from mtp_jax.sharding import RULES, gather

B, T, W, R, D, V = 4, 7, 4, 3, 8, 12
GAMMA = 0.8
POSITION = B * R * W * V * 4  # bytes of the logits of one position of every row, in float32
# One tile; seven of one position; three of three positions, of which the last two are padding.
TILES = {"whole": (1, 10**9), "positions": (7, POSITION), "padded": (3, int(2.5 * POSITION))}


@pytest.fixture(autouse=True)
def mesh():
    with tiny.mesh():
        yield


def log_softmax(z, axis=-1):
    z = z - z.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


def make_arrays(seed=0, dtype=np.float32):
    """Hidden states, gate, targets and weights: windows end early, so that counts fall with the offset, unevenly."""
    rng = np.random.default_rng(seed)
    length_BT = rng.integers(0, W + 1, (B, T))
    valid_BTW = np.arange(W) < length_BT[..., None]
    return SimpleNamespace(
        x_BTD=rng.standard_normal((B, T, D)).astype(dtype),
        log_w_BTR=log_softmax(rng.standard_normal((B, T, R))).astype(dtype),
        targets_BTW=rng.integers(0, V, (B, T, W)).astype(np.int32),
        weights_BTW=(valid_BTW / valid_BTW.sum((0, 1))).astype(dtype),
        valid_BTW=valid_BTW,
    )


def replicated():
    return jax.NamedSharding(jax.sharding.get_mesh(), P())


def on_mesh(arrays):
    return [tiny.shard(a) for a in (arrays.x_BTD, arrays.log_w_BTR, arrays.targets_BTW, arrays.weights_BTW)]


def param_shapes(factors, vocab, width, **changes):
    """(factors, unembedding) as shapes on the mesh: gathered along fsdp, as the head hands them to the loss."""
    head = tiny.head_config(**dict(factors=factors, factor_width=3) | changes)
    model = tiny.model_config(vocab_size=vocab, d_model=width)

    def build():
        rngs = nnx.Rngs(jax.random.key(0))
        table = init_weight(rngs, (vocab, width), inputs=1, spec=RULES.unembed_VD)[...]
        return jax.tree.map(gather, (FACTORS[factors](head, model, rngs=rngs), None if factors == "full" else table))

    def place(leaf):
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(build))


def make_params(factors, seed=0):
    """Parameters of numpy's random numbers: compiling an initialisation takes longer than all the rest."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put((rng.standard_normal(leaf.shape) / 2).astype(np.float32), leaf.sharding),
        param_shapes(factors, V, D),
    )


def plain_logits(u_DRWV, x_BTD):
    """Logits in the dtype of the arguments: float64 where they are."""
    return jnp.einsum("btd,drwv->btrwv", x_BTD, u_DRWV)


def identity_logits(_, x_BTD):
    """The hidden states are the logits, so that their gradient is that of the logits."""
    return x_BTD.reshape(*x_BTD.shape[:2], R, W, V)


def reference_loss(logits_fn, gamma, params, x_BTD, log_w_BTR, targets_BTW, weights_BTW):
    """DESIGN 6 as it is written, with all logits at once and no thought for anything but clarity."""
    logp_BTRWV = jax.nn.log_softmax(logits_fn(params, x_BTD), axis=-1)
    hit_BTWV = jax.nn.one_hot(targets_BTW, logp_BTRWV.shape[-1], dtype=logp_BTRWV.dtype)
    joint_BTR, before_BT, nll = log_w_BTR, 0.0, []
    for s in range(logp_BTRWV.shape[3]):
        joint_BTR = joint_BTR + (logp_BTRWV[:, :, :, s] * hit_BTWV[:, :, None, s]).sum(-1)
        after_BT = jax.nn.logsumexp(joint_BTR, axis=2)
        nll.append(-jnp.sum(weights_BTW[..., s] * (after_BT - before_BT)))
        before_BT = after_BT
    return sum(gamma**s * nll_s for s, nll_s in enumerate(nll)), jnp.stack(nll)


def differentiate(loss_fn, logits_fn, params, arrays, gamma=GAMMA, times=1.0):
    """((loss, nll), gradients of params, x and log w) of `times` the loss, compiled afresh."""

    def loss(*args):
        value, nll_W = loss_fn(logits_fn, gamma, *args)
        return times * value, nll_W

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.map(np.asarray, compiled(params, *on_mesh(arrays)))


def assert_close(got, want, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), got, want)


def set_tiles(monkeypatch, name, logits_fn, params, arrays):
    """Set the tile size; make sure that it gives the number of tiles that it is there for."""
    count, size = TILES[name]
    monkeypatch.setattr(mixture, "TILE_BYTES", size)
    tiles = jax.eval_shape(lambda *args: mixture._tiles(logits_fn, *args)[0], params, *on_mesh(arrays)[:2])
    assert tiles.shape == (count, B, -(-T // count), *arrays.x_BTD.shape[2:])


@pytest.fixture(scope="module", params=FACTORS)
def problem(request):
    """Parameters, arrays, and the reference's loss and gradients, in float32."""
    with tiny.mesh():
        params, arrays = make_params(request.param), make_arrays()
        want = differentiate(reference_loss, factor_logits, params, arrays)
        return SimpleNamespace(factors=request.param, params=params, arrays=arrays, want=want)


@pytest.mark.parametrize("tiles", TILES)
def test_loss_and_gradient_are_those_of_plain_autodiff(problem, tiles, monkeypatch):
    set_tiles(monkeypatch, tiles, factor_logits, problem.params, problem.arrays)
    got = differentiate(mixture_loss, factor_logits, problem.params, problem.arrays)
    assert_close(got, problem.want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("tiles", "time"), [(1, T), (2, T), (T, T), (1, 1)])
def test_batch_of_one_sequence(tiles, time, monkeypatch):
    """On one device: a reshape between axes of size 1 must not lose track of which one is the batch."""
    monkeypatch.setattr(mixture, "TILE_BYTES", -(-POSITION // B * time // tiles))
    params, arrays = make_params("full"), SimpleNamespace(**{k: v[:1, :time] for k, v in vars(make_arrays()).items()})
    got = differentiate(mixture_loss, factor_logits, params, arrays)
    assert_close(got, differentiate(reference_loss, factor_logits, params, arrays), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tiles", TILES)
def test_loss_and_gradient_in_float64(tiles, monkeypatch):
    with jax.enable_x64(True):
        arrays = make_arrays(dtype=np.float64)
        u_DRWV = jax.device_put(np.random.default_rng(1).standard_normal((D, R, W, V)), replicated())
        set_tiles(monkeypatch, tiles, plain_logits, u_DRWV, arrays)
        got = differentiate(mixture_loss, plain_logits, u_DRWV, arrays)
        want = differentiate(reference_loss, plain_logits, u_DRWV, arrays)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"float64"}
    assert_close(got, want, rtol=1e-12, atol=1e-14)


def make_logits_problem():
    """Arrays in float64 whose hidden states are the logits."""
    arrays = make_arrays(dtype=np.float64)
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

    with jax.enable_x64(True):
        (loss, nll_W), (_, d_x, d_log_w) = differentiate(mixture_loss, identity_logits, (), arrays)
    marginal_BTW = np.log(np.exp(joint_BTRW).sum(2))
    before_BTW = np.concatenate([np.zeros((B, T, 1)), marginal_BTW[..., :-1]], axis=-1)
    want_W = -(arrays.weights_BTW * (marginal_BTW - before_BTW)).sum((0, 1))
    np.testing.assert_allclose(nll_W, want_W, rtol=1e-12, err_msg="value by offset")
    np.testing.assert_allclose(loss, GAMMA ** np.arange(W) @ want_W, rtol=1e-12, err_msg="value")
    np.testing.assert_allclose(d_x.reshape(d_logits.shape), d_logits, atol=1e-14, err_msg="gradient of logits")
    np.testing.assert_allclose(d_log_w, each_BTRW.sum(-1), atol=1e-14, err_msg="gradient of log w")


def test_gradient_is_the_formula():
    check_formula(make_logits_problem())


true_conditionals, true_untile, true_cumsum = mixture._conditionals, mixture._untile, jnp.cumsum


def one_posterior(logits_BTRWV, log_w_BTR, targets_BTW):
    """The right values, with the gradient that the posterior of the last offset gives to all."""
    hit_BTRWV = jax.nn.one_hot(targets_BTW, V)[:, :, None]
    logp_BTRW = jnp.cumsum((jax.nn.log_softmax(logits_BTRWV) * hit_BTRWV).sum(-1), axis=-1) + log_w_BTR[..., None]
    posterior_BTR = jax.lax.stop_gradient(jax.nn.softmax(logp_BTRW[..., -1], axis=2))
    joint_BTW = (posterior_BTR[..., None] * logp_BTRW).sum(2)
    straight = jnp.diff(joint_BTW, axis=-1, prepend=jnp.zeros_like(joint_BTW[..., :1]))
    return straight + jax.lax.stop_gradient(true_conditionals(logits_BTRWV, log_w_BTR, targets_BTW) - straight)


FAULTS = {
    "one posterior for all offsets": (mixture, "_conditionals", one_posterior, "gradient of logits"),
    "cumsum over components": (jnp, "cumsum", lambda a, axis: true_cumsum(a, axis=2), "value by offset"),
    "gamma forgotten": (mixture, "_weigh", lambda nll_W, gamma: jnp.sum(nll_W), "value"),
    "tiles out of order": (mixture, "_untile", lambda a, time: true_untile(a[::-1], time), "gradient of logits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, monkeypatch):
    """The check above fails on a loss that is wrong in one way, at the place where it is wrong."""
    owner, name, replacement, place = FAULTS[fault]
    monkeypatch.setattr(mixture, "TILE_BYTES", POSITION)
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(AssertionError, match=f"Not equal to tolerance.*\n{place}\n"):
        check_formula(make_logits_problem())


def test_every_factor_gets_a_gradient(problem):
    """Of its own: each rank and each offset."""
    (d_factors, _), *_ = differentiate(mixture_loss, factor_logits, problem.params, problem.arrays)[1]
    d_own = {"full": "u_DRWV", "shared": "map_DRWD", "lowrank": "down_DRWE"}[problem.factors]
    norm_RW = np.sqrt((np.asarray(getattr(d_factors, d_own)[...]) ** 2).sum((0, 3)))
    assert norm_RW.shape == (R, W)
    assert (norm_RW > 1e-3).all()


def test_masked_targets_contribute_nothing(problem, monkeypatch):
    """Their ids change neither loss nor gradient, not even in the last bit."""
    set_tiles(monkeypatch, "padded", factor_logits, problem.params, problem.arrays)
    other = SimpleNamespace(**vars(problem.arrays))
    garbage = np.random.default_rng(9).integers(0, V, other.targets_BTW.shape).astype(np.int32)
    other.targets_BTW = np.where(other.valid_BTW, other.targets_BTW, garbage)
    assert (other.targets_BTW != problem.arrays.targets_BTW).any()
    compiled = jax.jit(
        jax.value_and_grad(functools.partial(mixture_loss, factor_logits, GAMMA), argnums=(0, 1, 2), has_aux=True)
    )
    runs = [compiled(problem.params, *on_mesh(arrays)) for arrays in (problem.arrays, other)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    # A position without any valid target has no gradient.
    masked_BT = ~other.valid_BTW.any(-1)
    assert masked_BT.any()
    assert not np.asarray(runs[0][1][1])[masked_BT].any()


def test_forward_only_is_the_value_that_is_differentiated(problem, monkeypatch):
    """And both are the means, each offset over its own valid targets, of the conditional log-likelihoods."""
    set_tiles(monkeypatch, "padded", factor_logits, problem.params, problem.arrays)
    arrays = on_mesh(problem.arrays)
    forward, likelihood_BTW = jax.tree.map(
        np.asarray,
        jax.jit(
            lambda params, *arrays: (
                mixture_loss(factor_logits, GAMMA, params, *arrays),
                mixture_log_likelihood(factor_logits, params, *arrays[:3]),
            )
        )(problem.params, *arrays),
    )
    differentiated = differentiate(mixture_loss, factor_logits, problem.params, problem.arrays)[0]
    assert_close(forward, differentiated, rtol=1e-6)
    valid_BTW = problem.arrays.valid_BTW
    means_W = [-likelihood_BTW[..., s][valid_BTW[..., s]].mean() for s in range(W)]
    assert len({valid_BTW[..., s].sum() for s in range(W)}) > 1
    np.testing.assert_allclose(forward[1], means_W, rtol=1e-5)


def test_cotangent_scales_the_gradient():
    params, arrays = make_params("full"), make_arrays()
    plain, scaled = (differentiate(mixture_loss, factor_logits, params, arrays, times=times) for times in (1.0, -2.5))
    assert_close(scaled[1], jax.tree.map(lambda g: -2.5 * g, plain[1]), rtol=1e-5, atol=1e-7)


def test_reported_offsets_carry_no_gradient():
    params, arrays = make_params("full"), on_mesh(make_arrays())
    gradient = jax.jit(jax.grad(lambda *args: mixture_loss(factor_logits, GAMMA, *args)[1].sum(), argnums=(0, 1, 2)))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(params, *arrays)))


def test_loss_on_eight_devices_is_that_on_one(monkeypatch):
    """Batch over data and fsdp, vocabulary over tensor, several tiles."""
    monkeypatch.setattr(mixture, "TILE_BYTES", POSITION // 8)
    results = []
    for shape in (1, 1, 1), (2, 2, 2):
        with tiny.mesh(*shape):
            results.append(differentiate(mixture_loss, factor_logits, make_params("lowrank"), make_arrays()))
    assert_close(*results, rtol=2e-5, atol=2e-6)


SHARED_BY = {(1, 1, 1): 4, (2, 1, 1): 2, (1, 2, 1): 2, (1, 1, 2): 2, (2, 2, 1): 1}


@pytest.mark.parametrize(("shape", "tiles"), SHARED_BY.items())
def test_tile_size_is_counted_per_device(shape, tiles, monkeypatch):
    monkeypatch.setattr(mixture, "TILE_BYTES", 2 * POSITION)
    with tiny.mesh(*shape):
        arguments = make_params("full"), on_mesh(make_arrays())[0]
        split = jax.eval_shape(lambda *args: mixture._tiles(factor_logits, *args)[0], *arguments)
    assert split.shape[0] == tiles


def scratch_bytes(factors, time, tile_bytes=None):
    """Scratch memory of loss and gradient for a vocabulary of 32,768, R = 8, W = 4 and D = 256; nothing is run."""

    def loss(*args):
        return mixture_loss(factor_logits, 1.0, *args)[0]

    sizes = (256, jnp.float32), (8, jnp.float32), (4, jnp.int32), (4, jnp.float32)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), RULES.x_BTD)
    arrays = [jax.ShapeDtypeStruct((2, time // 2, size), dtype, sharding=sharding) for size, dtype in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "TILE_BYTES", tile_bytes or mixture.TILE_BYTES)
        params = param_shapes(factors, 32768, 256, rank=8, factor_width=64)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(params, *arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("factors", ["shared", "lowrank"])
def test_memory_is_that_of_a_tile(factors):
    """The logits of 512 positions are 2 GiB; 100 MiB are enough, of which 32 are the table's gradient."""
    assert scratch_bytes(factors, 512) < 100 * 2**20


def test_memory_does_not_grow_with_the_batch():
    assert scratch_bytes("shared", 2048) < 1.1 * scratch_bytes("shared", 512)


def test_memory_of_one_large_tile_is_seen():
    """The measure that the tests above use does see logits that live together."""
    assert scratch_bytes("shared", 512, tile_bytes=2**31) > 2**31


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
