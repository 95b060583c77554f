"""Tiny configs, models and batches that the tests share: small shapes, so that they share compiled functions too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from mtp_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.heads.config import HeadConfig
from mtp_jax.language_model import LanguageModel
from mtp_jax.mesh import make_mesh
from mtp_jax.model.config import ModelConfig
from mtp_jax.sharding import BATCH
from mtp_jax.state import build_model

VOCAB, WINDOW, RANK = 32, 4, 3


def model_config(**changes: Any) -> ModelConfig:
    """Two layers, D = 16, V = 32, float32."""
    values = dict(vocab_size=VOCAB, d_model=16, d_ff=32, num_layers=2, num_heads=4, num_kv_heads=2, context_length=128)
    return ModelConfig(**{**values, "dtype": "float32", **changes})


def head_config(**changes: Any) -> HeadConfig:
    """Rank 3, window 4; the components differ from the start, so that they matter."""
    values = dict(window=WINDOW, rank=RANK, factors="full", factor_width=8, balance_weight=0.05, init_noise=1.0)
    return HeadConfig(**{**values, **changes})


def train_config(
    model: ModelConfig | None = None,
    head: HeadConfig | None = None,
    *,
    batch: int = 8,
    seq_len: int = 16,
    **changes: Any,
) -> TrainConfig:
    """A run of 8 x 16 tokens a step."""
    data = DataConfig(batch_size=batch, seq_len=seq_len)
    values = dict(optimizer=OptimizerConfig(warmup_steps=0), steps=8)
    return TrainConfig(model or model_config(), head or head_config(), data, **{**values, **changes})


def text_data(root: Path, documents: int = 40, valid_fraction: float = 0.2) -> DataConfig:
    """Small texts, written to ROOT/corpus; batches of 8 x 16 tokens of them."""
    (root / "corpus").mkdir()
    for i in range(documents):
        (root / "corpus" / f"{i}.txt").write_text(f"The {i}th of {i % 7} small texts.\n" * 6)
    files, cache = f"{root}/corpus/*.txt", f"{root}/cache"
    return DataConfig("text", files, valid_fraction=valid_fraction, batch_size=8, seq_len=16, cache_dir=cache)


def head_on(base: tuple[Path, DataConfig], data: DataConfig | None = None, **changes: Any) -> TrainConfig:
    """A run of 4 steps, evaluated and saved every 2, of a head on the base run in `base[0]`, on its data `base[1]`."""
    head = head_config(target="ntp", encoder="token", factors="lowrank", rank=2, shortlist=64)
    every = dict(steps=4, eval_every=2, eval_batches=1, checkpoint_every=2)
    values = dict(head=head, optimizer=OptimizerConfig(warmup_steps=0), **every)
    return TrainConfig(ModelConfig(), data=data or base[1], base=str(base[0]), **{**values, **changes})


def text_run(data: DataConfig, **changes: Any) -> TrainConfig:
    """A run of 8 steps on `text_data`, with a head of rank 2 and window 3, evaluated and saved every 4."""
    model, head = model_config(vocab_size=258), head_config(window=3, rank=2)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    every = dict(eval_every=4, eval_batches=2, checkpoint_every=4, log_every=1)
    return TrainConfig(model, head, data, **{**dict(optimizer=optimizer, steps=8, **every), **changes})


@contextlib.contextmanager
def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Iterator[jax.sharding.Mesh]:
    """A mesh of the first data x fsdp x tensor simulated devices, in scope."""
    made = make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])
    with jax.set_mesh(made):
        yield made


def make_model(config: TrainConfig, seed: int = 0) -> LanguageModel:
    """The config's model, initialised under the mesh in scope. The same parameters on every mesh."""
    return jax.jit(lambda: build_model(config, jax.random.key(seed)))()


def shard(array: Any) -> jax.Array:
    """An array on the mesh in scope, its first axis over the batch axes."""
    return jax.device_put(np.asarray(array), jax.NamedSharding(jax.sharding.get_mesh(), P(BATCH)))


def make_batch(config: TrainConfig, seed: int = 0, *, masked: bool = True) -> dict[str, jax.Array]:
    """Random tokens in two documents per row, targets masked at document ends, on the mesh in scope."""
    rng = np.random.default_rng(seed)
    batch, time, window = config.data.batch_size, config.data.seq_len, config.head.window
    tokens = rng.integers(0, config.model.vocab_size, (batch, time + window)).astype(np.int32)
    ends = rng.integers(1, time, (batch, 1)) if masked else np.full((batch, 1), time + window)
    segments = (np.arange(time + window)[None] >= ends).astype(np.int32)
    ahead = np.arange(time)[:, None] + np.arange(1, window + 1)[None]
    return {
        "tokens_BT": shard(tokens[:, :time]),
        "targets_BTW": shard(tokens[:, ahead]),
        "valid_BTW": shard(segments[:, ahead] == segments[:, :time, None]),
        "segments_BT": shard(segments[:, :time]),
    }
