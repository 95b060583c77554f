"""Benchmark of the loss of a CPD head against its own matrix products, and against all logits at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from mtp_jax.arrays import random_key
from mtp_jax.bench.config import LossBenchConfig
from mtp_jax.bench.timing import interleave, ratio, summary
from mtp_jax.config import MeshConfig
from mtp_jax.heads.circuits import CIRCUITS, CPD, Circuit
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.language_model import LanguageModel
from mtp_jax.losses.mixture import Terms, conditionals, mixture_loss
from mtp_jax.losses.tiles import Device, Form, tile_positions
from mtp_jax.mesh import make_mesh
from mtp_jax.model.config import ModelConfig
from mtp_jax.runs.layout import versions
from mtp_jax.sharding import RULES

CPD_TOO = {"circuit": "cpd", "circuit_width": 0}
Arrays = tuple[dict[str, Array], Array, Array, Array, Array]


def bench_loss(config: LossBenchConfig, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure loss and gradient on one device and return figures by method.

    `ours` is `mixture_loss`; `matmuls` a loop over tiles with all matrix products of the exact loss over the whole
    vocabulary and nothing else; `naive` plain autodiff with the logits of all positions at once in float32, left out
    where it does not fit in memory. `cpd` is `mixture_loss` of the same factors under that circuit, where the config
    has another.
    `grad_errors` are the relative errors of each gradient (in the Frobenius norm) against float64, `grad_error` the
    largest of them.
    """
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        form, arrays = _problem(config, config.tokens)
        exact = dataclasses.replace(config, shortlist=0, **CPD_TOO)
        whole_form, whole = _problem(exact, config.tokens) if config.shortlist else (form, arrays)
        ours, cpd = (_gradient(functools.partial(_ours, form, law)) for law in (_law(config), CPD))
        matmuls = jax.jit(functools.partial(_matmuls, whole_form))
        progress("compiling")
        compiled = {"ours": ours.lower(*arrays).compile(), "matmuls": matmuls.lower(*whole).compile()}
        inputs = {"ours": arrays, "matmuls": whole}
        if _law(config) is not CPD:
            inputs["cpd"] = _problem(dataclasses.replace(config, **CPD_TOO), config.tokens)[1]
            compiled["cpd"] = cpd.lower(*inputs["cpd"]).compile()
    # Plain arrays without a mesh: XLA does as it likes best.
    inputs["naive"] = jax.device_put(jax.device_get(arrays), jax.devices()[0])
    naive = _gradient(functools.partial(_naive, form, _law(config)))
    room = free_bytes()
    # Autodiff keeps two arrays of logits at the least. Compiling may run trials, so that is asked first.
    scratch = {"naive": 8 * config.tokens * _logits(config)}
    fits = room is None or scratch["naive"] < 0.8 * room
    if fits:
        compiled["naive"] = naive.lower(*inputs["naive"]).compile()
    scratch |= {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}  # type: ignore[union-attr]
    fits = room is None or scratch["naive"] < 0.8 * room
    if not fits:
        compiled.pop("naive", None)
    progress("measuring")
    runs = {name: functools.partial(c, *inputs[name]) for name, c in compiled.items()}
    seconds = interleave(runs, config.repetitions)
    progress("comparing gradients with float64")
    errors = _errors(config, mesh)
    rows = form.rows(config.rank, 1 if config.shortlist else config.window)  # through the largest table
    return {
        "config": vars(config),
        "tile_positions": tile_positions(config.tokens, 4 * _logits(config), rows),
        "seconds": {name: summary(found) for name, found in seconds.items()},
        "time_ratio_to_matmuls": ratio(seconds, "ours", "matmuls"),
        "time_ratio_to_naive": ratio(seconds, "ours", "naive") if fits else None,
        "time_ratio_to_cpd": ratio(seconds, "ours", "cpd") if "cpd" in runs else None,
        "temp_bytes": scratch["ours"],
        "naive_temp_bytes": scratch["naive"],
        "matmuls_temp_bytes": scratch["matmuls"],
        "naive_fits": fits,
        "free_bytes": room,
        **errors,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def free_bytes() -> int | None:
    """Memory that the first device has left, or None where it cannot be told."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if jax.devices()[0].platform != "cpu" or not meminfo.exists():
        return None
    (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _problem(config: LossBenchConfig, tokens: int) -> tuple[Form, Arrays]:
    """A head's form and parameters, and random hidden states, gate and targets."""
    head, model = (
        config.head(),
        ModelConfig(vocab_size=config.v, d_model=config.d, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2),
    )
    made = jax.jit(lambda: LanguageModel(model, head, rngs=nnx.Rngs(random_key(0))))()
    mixture, table = made.head, made.unembed_VD
    assert isinstance(mixture, MixtureHead)
    # Numbers that all dtypes here have.
    found = mixture.params(None if table is None else table[...])  # pyright: ignore[reportIndexIssue]
    found |= mixture.circuit.tables()
    params = jax.tree.map(lambda w: w.astype(config.dtype).astype(jnp.float32), found)
    keys, shape, spec = jax.random.split(random_key(1), 3), (1, tokens), RULES.x_BTD
    x_BTD = jax.random.normal(keys[0], (*shape, config.d), jnp.float32, out_sharding=spec).astype(config.dtype)
    log_w_BTR = jax.nn.log_softmax(jax.random.normal(keys[1], (*shape, config.rank), jnp.float32, out_sharding=spec))
    targets_BTW = jax.random.randint(
        keys[2], (*shape, config.window), 0, config.shortlist or config.v, out_sharding=spec
    )
    return mixture.form, (
        params,
        x_BTD,
        log_w_BTR,
        targets_BTW,
        jnp.full_like(targets_BTW, 1 / tokens, dtype=jnp.float32),
    )


def _law(config: LossBenchConfig) -> type[Circuit]:
    return CIRCUITS[config.circuit]


def _gradient(loss: Callable[..., Array]) -> Any:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def _ours(form: Form, law: type[Circuit], params: Any, x: Array, log_w: Array, targets: Array, weights: Array) -> Array:
    return mixture_loss(form, Terms(law), params, x, log_w, targets, weights)[0]


def _naive(
    form: Form, law: type[Circuit], params: Any, x: Array, log_w: Array, targets: Array, weights: Array
) -> Array:
    """All logits at once, in float32 from operands in x's dtype."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    whole = jax.tree.map(lambda w: w.astype(x.dtype).astype(wide), params)
    found, offset = [], 0
    for logits_BTRWV in jax.tree.leaves(form.logits(form.tables(whole), x.astype(wide))):
        own_BT1W1 = targets[:, :, None, offset : (offset := offset + logits_BTRWV.shape[3]), None]
        found.append(jnp.take_along_axis(jax.nn.log_softmax(logits_BTRWV, axis=-1), own_BT1W1, axis=-1)[..., 0])
    unfolded = law.unfold(whole, log_w, x.astype(wide))
    return -jnp.sum(weights * conditionals(law, unfolded, jnp.concatenate(found, axis=-1)))


def _matmuls(form: Form, params: Any, x: Array, log_w: Array, targets: Array, weights: Array) -> Any:
    """The tiles of a `mixture_loss` of `form`, with the products of logits, rows and tables, and nothing else."""
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, params)

    @functools.partial(jax.shard_map, out_specs=(specs, RULES.x_BTD))
    def local(params: Any, x: Array, targets: Array) -> Any:
        device = Device(form, params, specs, x, None)

        def tile(d_tables: Any, x: Array) -> Any:
            logits, pull = device.logits(x)
            new, d_x = pull(logits)
            return jax.tree.map(jnp.add, d_tables, new), d_x

        d_tables, d_x = lax.scan(tile, device.zeros(), device.tiles(x))
        return device.d_params(d_tables), lax.psum(device.untile(d_x, x), "tensor")

    return local(params, x, targets)


def _logits(config: LossBenchConfig) -> int:
    """Logits of one position."""
    return config.rank * (config.v + (config.window - 1) * (config.shortlist or config.v))


def _errors(config: LossBenchConfig, mesh: Mesh) -> dict[str, Any]:
    """Gradient errors of both methods against float64, at as many positions as a gigabyte of its logits holds."""
    with jax.set_mesh(mesh):
        form, arrays = _problem(config, max(1, min(config.tokens, 2**30 // (8 * _logits(config)))))
        losses = (functools.partial(loss, form, _law(config)) for loss in (_ours, _naive))
        ours, naive = (jax.jit(jax.grad(loss, argnums=(0, 1, 2))) for loss in losses)
        found = jax.device_get(ours(*arrays))
    plain = jax.device_get(arrays)
    with jax.default_matmul_precision("highest"):
        found_naive = jax.device_get(naive(*plain))
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        double = lambda a: np.asarray(a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else None)  # noqa: E731
        truth = jax.device_get(naive(*jax.tree.map(double, plain)))

    def errors(gradients: Any) -> dict[str, float]:
        params, x, log_w = jax.tree.map(
            lambda a, b: float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)), gradients, truth
        )
        return params | {"x_BTD": x, "log_w_BTR": log_w}

    mine, others = errors(found), errors(found_naive)
    return {
        "grad_error": max(mine.values()),
        "naive_grad_error": max(others.values()),
        "grad_errors": mine,
        "naive_grad_errors": others,
    }
