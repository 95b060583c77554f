"""Every measurement that wants a GPU, in one run: loss, training step, attention.

    python experiments/gpu_check.py experiments/results/NAME.json      # about 8 minutes on one H100 or H200

Needs the package and nothing else of the project's tools. Each part is written to the file as soon as it is measured,
with the device's name and the versions, so that a run which is cut off keeps what it has; `--only loss,train` chooses
parts. `XLA_FLAGS` are recorded as found.

Expect on an H200 in bfloat16: the loss at most 1.25 times its matrix products at D >= 2048 and 1.8 times at D = 768;
model FLOPs utilisation, head included, of at least 35% for the 85M trunk and 42% for the 1B shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax import DataConfig, HeadConfig, LossBenchConfig, ModelConfig, OptimizerConfig, TrainBenchConfig, TrainConfig
from mtp_jax.bench.loss import bench_loss
from mtp_jax.bench.timing import interleave, ratio, summary
from mtp_jax.bench.train import bench_train
from mtp_jax.checkpoint import versions

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


def measure_loss() -> dict[str, Any]:
    """`mtp-jax bench loss` at the shapes of `LOSS`."""
    return {name: bench_loss(config) for name, config in LOSS.items()}


def measure_train() -> dict[str, Any]:
    """`mtp-jax bench train` for two sizes, with both attentions."""
    found = {}
    for attention in ("xla", "cudnn"):
        bench = TrainBenchConfig(ranks=(1, 4), repetitions=5)
        small = train_config(SMALL, 32, attention=attention)
        found[f"85M, {attention}"] = bench_train(small, bench)
        large = train_config(BILLION, 8, attention=attention, remat="dots")
        found[f"1B, {attention}"] = bench_train(large, bench)
    return found


def measure_peers() -> dict[str, Any]:
    """The next-token loss at 32768 x 4096 x 128256 against a chunked loss with `jax.checkpoint`, and tokamax."""
    rows, width, vocab = 32_768, 4096, 128_256
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
    w = (jax.random.normal(keys[1], (width, vocab)) * width**-0.5).astype(jnp.bfloat16)
    y = jax.random.randint(keys[2], (rows,), 0, vocab)

    def plain(x: Any, w: Any, y: Any) -> Any:
        logits = jnp.dot(x, w, preferred_element_type=jnp.float32)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0])

    def chunked(x: Any, w: Any) -> Any:
        chunks = x.reshape(-1, 2048, width), y.reshape(-1, 2048)
        return jnp.sum(lax.map(lambda chunk: jax.checkpoint(plain)(chunk[0], w, chunk[1]), chunks)) / rows

    def ours(x: Any, w: Any) -> Any:
        from mtp_jax.heads.factors import FullFactors
        from mtp_jax.losses.mixture import Terms, mixture_loss

        tables = {"u_DRWV": w[:, None, None]}
        one = jnp.zeros((1, rows, 1)), y[None, :, None], jnp.full((1, rows, 1), 1 / rows)
        return mixture_loss(FullFactors, Terms(), tables, x[None], *one)[0]

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
        values = {name: float(c(x, w)[0]) for name, c in compiled.items()}
        seconds = interleave({name: functools.partial(c, x, w) for name, c in compiled.items()}, 5)
    return {
        "loss": values,
        "seconds": {name: summary(found) for name, found in seconds.items()},
        "temp_bytes": {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()},
        "peer_over_ours": {name: ratio(seconds, name, "ours") for name in seconds},
    }


PARTS = {"loss": measure_loss, "peers": measure_peers, "train": measure_train}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, of " + ", ".join(PARTS))
    options = parser.parse_args()
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    options.file.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        begun = time.perf_counter()
        try:
            result[name] = PARTS[name]()
        except Exception as error:  # one part that fails must not cost the others
            result[name] = {"error": f"{type(error).__name__}: {error}"}
        result[name]["wall_seconds"] = time.perf_counter() - begun
        options.file.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {result[name]['wall_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
