"""Losses against the target's law: against plain autodiff, on any mesh and at any tile size, and what they take."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.heads.circuits import CPD
from mtp_jax.heads.factors import FACTORS
from mtp_jax.losses.mixture import Terms, mixture_loss, mixture_loss_against
from mtp_jax.losses.target_law import Against, TargetLaw
from mtp_jax.parameters import PARAMETERS
from mtp_jax.sharding import RULES
from support import tiny
from support.mixture_losses import SHAPES, assert_close, set_tile_bytes
from support.target_laws import ALL, CASES, differentiate, make, reference

pytestmark = pytest.mark.usefixtures("mesh", "float64")
SOME = int(2e4)  # bytes that make tiles of a few positions, which rows do not end with


def pairs(first, second):
    """All pairs, of which one for each value of `first` is fast enough for every change."""
    return [
        pytest.param(a, b, marks=() if i % len(second) == j else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in ("rank 1", "encoder") else ()) for case in CASES]
)
def test_values_and_gradients_are_those_of_plain_autodiff(case, monkeypatch):
    set_tile_bytes(monkeypatch, SOME)
    problem = make(**CASES[case], **ALL)
    got = differentiate(problem)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"float64"}
    assert_close(got, reference(problem), 1e-10)


@pytest.mark.parametrize("term, temperature", pairs(list(ALL), [0.5, 1.0, 1.7]))
def test_each_term_alone(term, temperature, monkeypatch):
    set_tile_bytes(monkeypatch, SOME)
    problem = make(nll_weight=0.0, temperature=temperature, **{term: 1.0})
    got = differentiate(problem)
    assert_close(got, reference(problem), 1e-10)
    (loss, sums), (_, d_x, d_log_w) = got
    assert loss > 0.1 and np.abs(d_x).max() > 1e-3 and np.abs(d_log_w).max() > 1e-3
    assert {"kl_offset", "overlap_offset"} <= sums.keys() and ("lk_offset" in sums) == (term == "lk")


@pytest.mark.parametrize(
    "case, shape",
    pairs(["shared", "shortlist", "encoder, shortlist", "encoder, full, rank 1"], [(2, 2, 2), (2, 1, 4), (1, 4, 1)]),
)
def test_eight_devices_have_what_one_has(case, shape, monkeypatch):
    want = reference(make(**CASES[case], **ALL))
    set_tile_bytes(monkeypatch, SOME // 8)
    with tiny.mesh(*shape):
        assert_close(jax.device_get(differentiate(make(**CASES[case], **ALL))), want, 1e-10)


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["shortlist", "encoder, shortlist", "encoder, btree"])
def test_a_normaliser_that_is_known_is_not_formed_again(case, shape, monkeypatch):
    """The same, with no table beside those of the columns; a wrong one is a wrong law."""
    want = reference(make(**CASES[case], **ALL))
    set_tile_bytes(monkeypatch, SOME // 8)
    with tiny.mesh(*shape):
        problem = make(**CASES[case], **ALL, normalised=True)
        assert_close(jax.device_get(differentiate(problem)), want, 1e-10)
        problem.normaliser_BT = problem.normaliser_BT + 0.01
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            assert_close(jax.device_get(differentiate(problem)), want, 1e-3)


@pytest.mark.parametrize("size", [1, SOME // 3, SOME, 10**9])
def test_tiles_of_any_width_have_the_same(size, monkeypatch):
    problem = make(**CASES["shortlist"], **ALL)
    want = differentiate(problem)
    set_tile_bytes(monkeypatch, size)
    assert_close(differentiate(problem), want, 1e-12)


def test_the_law_is_a_constant():
    """No gradient reaches the states and tables that it is formed from; without one the value is the same."""
    problem = make(**CASES["encoder"], **ALL)
    law = TargetLaw(problem.tables, tiny.shard(problem.law_BTD), tiny.shard(problem.law_weights_BTW))
    arrays = [tiny.shard(a) for a in problem.arrays]
    law.tables["unembed_VD"] = law.tables.get("unembed_VD", problem.params["unembed_VD"])

    def loss(x_BTD, tables):
        of = TargetLaw(tables, x_BTD, law.weights_BTW)
        return mixture_loss_against(problem.form, problem.terms, problem.params, *arrays, of)[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(law.x_BTD, law.tables)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(jax.jit(loss)(law.x_BTD, law.tables), reference(problem)[0][0], rtol=1e-12)


def test_what_is_masked_or_outside_the_row_tells_nothing(monkeypatch):
    """The next row's states stand behind a row's last ones: with other rows beside it, a row's gradient is the same."""
    set_tile_bytes(monkeypatch, SOME)
    one, other = make(**CASES["shared"], **ALL), make(**CASES["shared"], **ALL)
    x_BTD = np.array(one.law_BTD)
    x_BTD[1:] = np.random.default_rng(9).standard_normal(x_BTD[1:].shape)
    other.law_BTD, other.arrays = x_BTD, (x_BTD, *other.arrays[1:])
    first, second = (differentiate(problem)[1][1][0] for problem in (one, other))
    np.testing.assert_array_equal(first, second)


# Deliberate faults: what is computed is not what they give.

FAULTS = {
    "one position off": "shared",
    "no temperature": "shared",
    "misses ignored": "shortlist",
    "renormalised": "shortlist",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault):
    problem = make(**CASES[FAULTS[fault]], **ALL)
    got, right, wrong = differentiate(problem), reference(problem), reference(problem, fault)
    assert_close(got, right, 1e-10)
    for part in range(2):  # of the value, and of the gradients
        if (fault, part) != ("misses ignored", 1):  # p is a constant, and so is what it misses, but for `lk`
            with pytest.raises(AssertionError, match="Not equal to tolerance"):
                assert_close(got[part], wrong[part], 1e-3)


def test_overlap_and_divergence_are_those_of_laws():
    """Where the head has the law of the model, all overlap is 1 and all divergence 0; the first offset alone here."""
    problem = make(nll_weight=0.0, temperature=1.0, **ALL)
    eye = np.broadcast_to(np.eye(problem.law_BTD.shape[-1])[:, None, None], problem.params["map_DRWD"].shape)
    problem.params["map_DRWD"] = jax.device_put(np.array(eye), problem.params["map_DRWD"].sharding)
    (_, sums), _ = differentiate(problem)
    shares = problem.law_weights_BTW.sum((0, 1))
    np.testing.assert_allclose(sums["overlap_offset"][0], shares[0], rtol=1e-12)
    np.testing.assert_allclose(sums["kl_offset"][0], 0, atol=1e-12)
    assert (sums["overlap_offset"][1:] < 0.99 * shares[1:]).all() and (sums["kl_offset"][1:] > 0.1).all()


# What it takes.


def lower(frozen=False, against=True, shape=(1, 1, 1), factors="shared", batch=2, time=256, rank=2, vocab=32768):
    """The compiled loss and gradient of a problem that is never run, W = 4, D = 256."""
    sizes = {"D": 256, "R": rank, "W": 4, "V": vocab, "E": 64}
    with tiny.mesh(*shape) as mesh, jax.enable_x64(False):

        def abstract(dtype, spec, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

        params = {
            name: abstract(jnp.float32, PARAMETERS[name].spec, *(sizes[letter] for letter in name.split("_")[1]))
            for name in SHAPES[factors]
        }
        table = params.pop("unembed_VD")
        kinds = (256, jnp.float32), (rank, jnp.float32), (4, jnp.int32), (4, jnp.float32), (4, jnp.float32)
        arrays = [abstract(kind, RULES.x_BTD, batch, time, size) for size, kind in kinds]

        def loss(own, table, x_BTD, *rest):
            both, form = {**own, "unembed_VD": table}, FACTORS[factors]
            if not against:
                return mixture_loss(form, Terms(CPD), both, x_BTD, *rest[:-1])
            terms = Terms(CPD, against=Against(**ALL))
            return mixture_loss_against(form, terms, both, x_BTD, *rest[:-1], TargetLaw({}, x_BTD, rest[-1]))

        gradient = jax.value_and_grad(loss, argnums=(0, 2) if frozen else (0, 1, 2), has_aux=True)
        return jax.jit(gradient).lower(params, table, *arrays).compile()


def test_memory_is_that_of_a_tile(small_tiles):
    """The probabilities of 512 positions are 256 MiB for each law, the logits 512 MiB."""
    assert lower().memory_analysis().temp_size_in_bytes < 160 * 2**20


def test_memory_does_not_grow_with_the_batch(small_tiles):
    """Beyond the states and their gradient, of 8 times as many positions."""
    small, large = (lower(batch=batch).memory_analysis().temp_size_in_bytes for batch in (2, 16))
    assert large - small < 3 * 4 * 256 * 256 * 14 + 2**22


def test_memory_of_one_large_tile_is_seen(monkeypatch):
    set_tile_bytes(monkeypatch, 2**40)
    assert lower().memory_analysis().temp_size_in_bytes > 2**30


@pytest.mark.parametrize("factors, against", pairs(["shared", "lowrank"], [False, True]))
def test_the_gradient_of_a_frozen_table_is_never_formed(factors, against, small_tiles):
    """No loop makes anything of its shape, and a third of the products with it is left out."""
    made, flops = {}, {}
    for frozen in (False, True):
        compiled = lower(frozen, against, factors=factors)
        shaped = re.findall(r"= f32\[(?:32768,256|256,32768)\]\S* (\S+?)\(", compiled.as_text())
        made[frozen] = {name for name in shaped if name in ("add", "fusion", "dot", "custom-call")}
        flops[frozen] = compiled.cost_analysis()["flops"]
    assert made[False] and not made[True], made
    assert flops[True] < 0.8 * flops[False]
