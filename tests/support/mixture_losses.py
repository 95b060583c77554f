"""Small problems for the loss of a mixture, and the loss as it is written, for plain autodiff."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.heads.circuits import CIRCUITS, CPD
from mtp_jax.heads.circuits.transitions import STAY
from mtp_jax.heads.factors import FACTORS
from mtp_jax.losses import tiles as tiles_module
from mtp_jax.losses.mixture import Terms, mixture_loss
from mtp_jax.parameters import PARAMETERS
from mtp_jax.sharding import RULES
from support import tiny
from support.circuits import prefixes

Params = dict[str, jax.Array]
B, T, W, R, D, V, E = 4, 7, 4, 3, 8, 12, 5
GAMMA, Z = 0.8, 0.3
TERMS = Terms(CPD, GAMMA, Z)
POSITION = R * W * V * 8  # bytes of the logits of one position, in float64
# Tiles of the 28 positions: one; 28 of one position; six of five positions, of which the last two are padding.
TILES = {"whole": (1, 10**9), "positions": (28, POSITION), "padded": (6, int(5.5 * POSITION))}


def log_softmax(z: np.ndarray, axis: int = -1) -> np.ndarray:
    """In numpy, whatever the precision."""
    z = z - z.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


def make_arrays(seed: int = 0) -> SimpleNamespace:
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


def on_mesh(arrays: SimpleNamespace) -> list[jax.Array]:
    """The arguments of a loss, on the mesh in scope."""
    return [tiny.shard(a) for a in (arrays.x_BTD, arrays.log_w_BTR, arrays.targets_BTW, arrays.weights_BTW)]


SHAPES = {
    "full": {"u_DRWV": (D, R, W, V)},
    "shared": {"map_DRWD": (D, R, W, D), "unembed_VD": (V, D)},
    "residual": {"residual_DRWD": (D, R, W, D), "unembed_VD": (V, D)},
    "lowrank": {"map_DWD": (D, W, D), "down_DRWE": (D, R, W, E), "up_ED": (E, D), "unembed_VD": (V, D)},
    "lora": {"u_DWV": (D, W, V), "down_DRWE": (D, R, W, E), "up_EV": (E, V)},
}


PROBLEMS = {name: (name, "cpd") for name in FACTORS} | {
    "hmm": ("full", "hmm"),
    "btree": ("shared", "btree"),
    "narrow hmm": ("lowrank", "narrow hmm"),
}
"""Factors and a circuit."""
TRANSITIONS = {
    "cpd": {},
    "hmm": {"trans_DMRR": (D, W - 1, R, R)},
    "btree": {"trans_DMRR": (D, W - 2, R, R)},
    "narrow hmm": {"trans_down_DE": (D, 2), "trans_EMRR": (2, W - 1, R, R)},
}


def make_params(factors: str, seed: int = 0, circuit: str = "cpd") -> Params:
    """Parameters on the mesh, split as those of a model are."""
    rng = np.random.default_rng(seed)

    def place(name, shape):
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), PARAMETERS[name].spec)
        return jax.device_put(rng.standard_normal(shape) / 2, sharding)

    return {name: place(name, shape) for name, shape in (SHAPES[factors] | TRANSITIONS[circuit]).items()}


class Identity:
    """The form whose hidden states are the logits, so that their gradient is that of the logits."""

    @staticmethod
    def tables(params: Params) -> Params:
        """The parameters, of which there are none."""
        return params

    @staticmethod
    def logits(tables: Params, x_BTD: jax.Array) -> jax.Array:
        """The hidden states, by component and offset."""
        return x_BTD.reshape(*x_BTD.shape[:2], R, W, V)

    @staticmethod
    def rows(rank: int, window: int) -> int:
        """There is no table."""
        return rank * window


def reference_logits(params: Params, x_BTD: jax.Array) -> jax.Array:
    """Each form as it is written, from its parameters."""
    if "u_DRWV" in params:
        return jnp.einsum("btd,drwv->btrwv", x_BTD, params["u_DRWV"])
    if "map_DRWD" in params:
        return jnp.einsum("btd,drwe,ve->btrwv", x_BTD, params["map_DRWD"], params["unembed_VD"])
    if "residual_DRWD" in params:
        added_BTRWD = jax.nn.silu(jnp.einsum("btd,drwe->btrwe", x_BTD, params["residual_DRWD"]))
        return jnp.einsum("btrwd,vd->btrwv", x_BTD[:, :, None, None] + added_BTRWD, params["unembed_VD"])
    if "u_DWV" in params:
        own_BTRWV = jnp.einsum("btd,drwe,ev->btrwv", x_BTD, params["down_DRWE"], params["up_EV"])
        return jnp.einsum("btd,dwv->btwv", x_BTD, params["u_DWV"])[:, :, None] + own_BTRWV
    shared_BTWV = jnp.einsum("btd,dwe,ve->btwv", x_BTD, params["map_DWD"], params["unembed_VD"])
    own = "btd,drwe,ec,vc->btrwv", x_BTD, params["down_DRWE"], params["up_ED"], params["unembed_VD"]
    return shared_BTWV[:, :, None] + jnp.einsum(*own)


def reference_transitions(params: Params, x_BTD: jax.Array) -> jax.Array | None:
    """The logarithms of the transitions of a circuit that has some."""
    if "trans_DMRR" in params:
        z_BTMRR = jnp.einsum("btd,dmij->btmij", x_BTD, params["trans_DMRR"])
    elif "trans_EMRR" in params:
        z_BTMRR = jnp.einsum("btd,de,emij->btmij", x_BTD, params["trans_down_DE"], params["trans_EMRR"])
    else:
        return None
    begin_RR = jnp.log((1 - STAY) * jnp.eye(R) + STAY / R)
    return jax.nn.log_softmax(z_BTMRR + begin_RR[None, None, None], axis=-1)


def reference_loss(
    form: Callable | None,
    terms: Terms,
    params: Params,
    x_BTD: jax.Array,
    log_w_BTR: jax.Array,
    targets_BTW: jax.Array,
    weights_BTW: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """DESIGN 6 as it is written, with all logits at once and no thought for anything but clarity."""
    logits_BTRWV = (form or reference_logits)(params, x_BTD)
    lse_BTRW = jax.nn.logsumexp(logits_BTRWV, axis=-1)
    hit_BTWV = jax.nn.one_hot(targets_BTW, logits_BTRWV.shape[-1], dtype=logits_BTRWV.dtype)
    logp_BTRW = (logits_BTRWV * hit_BTWV[:, :, None]).sum(-1) - lse_BTRW
    circuit = next(name for name, law in CIRCUITS.items() if law is terms.law)
    after_BTW = prefixes(circuit, log_w_BTR, reference_transitions(params, x_BTD), logp_BTRW)
    before_BTW = jnp.concatenate([jnp.zeros_like(after_BTW[..., :1]), after_BTW[..., :-1]], axis=-1)
    nll = [*-jnp.sum(weights_BTW * (after_BTW - before_BTW), axis=(0, 1))]
    z = jnp.sum(weights_BTW * jnp.mean(lse_BTRW**2, axis=2))
    loss = sum(terms.gamma**s * nll_s for s, nll_s in enumerate(nll)) + terms.z_weight * z
    return loss, jnp.stack(nll)


def differentiate(
    loss_fn: Callable,
    form: Any,
    params: Params,
    arrays: SimpleNamespace,
    terms: Terms = TERMS,
    times: float = 1.0,
) -> Any:
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


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of the largest value of its reference."""

    def close(got, want):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())

    jax.tree.map(close, got, want)


def set_tile_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The size of a tile on a CPU."""
    monkeypatch.setitem(tiles_module.TILE_BYTES, "cpu", (size, size))


def set_tiles(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Set the tile size; make sure that it gives the number of tiles that it is there for."""
    count, size = TILES[name]
    set_tile_bytes(monkeypatch, size)
    assert count * -(-B * T // count) >= B * T and -(-B * T // max(1, size // POSITION)) == count


def traced(mesh: Any, sizes: dict[str, int], factors: str, dtype: Any, batch: int, time: int) -> Any:
    """The loss and its gradient, of a problem that is never run."""

    def abstract(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    params = {
        name: abstract(jnp.float32, PARAMETERS[name].spec, *(sizes[letter] for letter in name.split("_")[1]))
        for name in SHAPES[factors]
    }
    kinds = ((sizes["D"], dtype), (sizes["R"], jnp.float32), (sizes["W"], jnp.int32), (sizes["W"], jnp.float32))
    arrays = [abstract(kind, RULES.x_BTD, batch, time, size) for size, kind in kinds]
    loss = functools.partial(mixture_loss, FACTORS[factors], Terms(CPD))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)).trace(params, *arrays)
