"""Every measurement that wants a GPU, in one run: the loss, its peers, and the training step with both attentions.

    python experiments/gpu_check.py experiments/results/NAME.json      # about 8 minutes on one H100 or H200

Needs the package and nothing else of the project's tools. Each part is written to the file as soon as it is measured,
with the device's name and the versions, so that a run which is cut off keeps what it has; `--only loss,train` chooses
parts by the beginning of their names. `XLA_FLAGS` are recorded as found. It has not run on a GPU yet.

Expect on an H200 in bfloat16: the loss at most 1.25 times its matrix products at D >= 2048 and 1.8 times at D = 768;
model FLOPs utilisation, head included, of at least 35% for the 85M trunk and 42% for the 1B shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax import DataConfig, HeadConfig, LossBenchConfig, ModelConfig, OptimizerConfig, TrainBenchConfig, TrainConfig
from mtp_jax.bench.loss import bench_loss
from mtp_jax.bench.timing import interleave, ratio, summary
from mtp_jax.bench.train import bench_train
from mtp_jax.commands import use_compilation_cache
from mtp_jax.runs.layout import versions

LOSS = {
    "1B-shaped": LossBenchConfig(d=2048, v=128_256, rank=4, tokens=4096, dtype="bfloat16", repetitions=5),
    "85M trunk": LossBenchConfig(d=768, v=50_304, rank=8, tokens=8192, dtype="bfloat16", repetitions=5),
    "85M trunk, lowrank": LossBenchConfig(
        d=768, v=50_304, rank=8, tokens=8192, dtype="bfloat16", factors="lowrank", repetitions=5
    ),
    "next token, 4096 x 128256": LossBenchConfig(
        d=4096, v=128_256, rank=1, window=1, tokens=32_768, dtype="bfloat16", factors="full", repetitions=5
    ),
}

SMALL = ModelConfig(
    vocab_size=50_304, d_model=768, d_ff=2048, num_layers=12, num_heads=12, num_kv_heads=12, context_length=1024
)
BILLION = ModelConfig(
    vocab_size=128_256, d_model=2048, d_ff=8192, num_layers=16, num_heads=32, num_kv_heads=8, context_length=2048
)


def train_config(model: ModelConfig, batch: int, **changes: Any) -> TrainConfig:
    """A training step of `model` with low-rank factors."""
    model = dataclasses.replace(model, **changes)
    data = DataConfig(seq_len=model.context_length, batch_size=batch)
    head = HeadConfig(window=4, rank=4, factors="lowrank", factor_width=256)
    return TrainConfig(model, head, data, OptimizerConfig(warmup_steps=0), steps=10)


def loss_parts() -> dict[str, Callable[[], Any]]:
    """`mtp-jax bench loss` at the shapes of `LOSS`."""
    return {f"loss {name}": functools.partial(bench_loss, config) for name, config in LOSS.items()}


def train_parts() -> dict[str, Callable[[], Any]]:
    """`mtp-jax bench train` for two sizes, with both attentions; two states at a time are all that memory holds."""
    bench = TrainBenchConfig(ranks=(4,), repetitions=5)
    parts: dict[str, Callable[[], Any]] = {}
    for attention in ("cudnn", "xla"):
        small, large = (
            train_config(SMALL, 32, attention=attention),
            train_config(BILLION, 4, attention=attention, remat="dots"),
        )
        parts[f"train 85M {attention}"] = functools.partial(bench_train, small, bench)
        parts[f"train 1B {attention}"] = functools.partial(bench_train, large, bench)
    return parts


def measure_peers(rows: int = 32_768, width: int = 4096, vocab: int = 128_256, chunk: int = 2048) -> dict[str, Any]:
    """The next-token loss against a chunked loss with `jax.checkpoint`, and tokamax where it is installed."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
    w = (jax.random.normal(keys[1], (width, vocab)) * width**-0.5).astype(jnp.bfloat16)
    y = jax.random.randint(keys[2], (rows,), 0, vocab)

    def plain(x: Any, w: Any, y: Any) -> Any:
        logits = jnp.dot(x, w, preferred_element_type=jnp.float32)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0])

    def chunked(x: Any, w: Any) -> Any:
        chunks = x.reshape(-1, chunk, width), y.reshape(-1, chunk)
        return jnp.sum(lax.map(lambda chunk: jax.checkpoint(plain)(chunk[0], w, chunk[1]), chunks)) / rows

    def ours(x: Any, w: Any) -> Any:
        from mtp_jax.heads.circuits import CPD
        from mtp_jax.heads.factors import FullFactors
        from mtp_jax.losses.mixture import Terms, mixture_loss

        tables = {"u_DRWV": w[:, None, None]}
        one = jnp.zeros((1, rows, 1)), y[None, :, None], jnp.full((1, rows, 1), 1 / rows)
        return mixture_loss(FullFactors, Terms(CPD), tables, x[None], *one)[0]

    losses = {"ours": ours, "checkpoint": chunked}
    try:
        import tokamax

        losses["tokamax"] = lambda x, w: tokamax.linear_softmax_cross_entropy_loss(
            x, y, w, reduction="mean", implementation="xla"
        )
    except ImportError:
        pass
    from mtp_jax.mesh import make_mesh

    with jax.set_mesh(make_mesh(None, jax.devices()[:1])):
        compiled = {
            name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w).compile()
            for name, loss in losses.items()
        }
        found = {name: c(x, w) for name, c in compiled.items()}
        values = {name: float(loss) for name, (loss, _) in found.items()}
        differences = {name: _difference(gradients, found["ours"][1]) for name, (_, gradients) in found.items()}
        del found
        seconds = interleave({name: functools.partial(c, x, w) for name, c in compiled.items()}, 5)
    return {
        "loss": values,
        "gradients_off_ours": differences,
        "seconds": {name: summary(found) for name, found in seconds.items()},
        "temp_bytes": {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()},
        "peer_over_ours": {name: ratio(seconds, name, "ours") for name in seconds},
    }


def _difference(gradients: Any, ours: Any) -> list[float]:
    """The norms of differences from our gradients, in units of those."""
    pairs = zip(gradients, ours, strict=True)
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
    return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in wide]


PARTS: dict[str, Callable[[], Any]] = {**loss_parts(), "peers": measure_peers, **train_parts()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--only", default="", help="parts to measure, by the beginning of their names: loss,peers,train"
    )
    parser.add_argument("--budget-seconds", type=float, default=480, help="no part begins after so long")
    options = parser.parse_args()
    use_compilation_cache()
    device, begun = jax.devices()[0], time.perf_counter()
    result: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "parts": {},
    }
    options.file.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, part in PARTS.items():
        if not name.startswith(tuple(options.only.split(","))) or time.perf_counter() - begun > options.budget_seconds:
            continue
        start = time.perf_counter()
        try:
            found = {"figures": part()}
        except Exception:  # one part that fails must not cost the others
            found, failed = {"error": traceback.format_exc()}, True
        result["parts"][name] = {**found, "wall_seconds": time.perf_counter() - start}
        options.file.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {'failed, ' if 'error' in found else ''}{time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
