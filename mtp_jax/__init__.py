"""Transformers with a joint multi-token head (CPD, arXiv 2410.17765): sharded training, lossless decoding.

Arrays of rank two and more carry their shape as a suffix, read off one legend:

    B batch        T query time         S key time           L layers
    D model width  F feed-forward width N query heads        K key/value heads  H head width
    V vocabulary   R rank               W window of offsets  E factor width

`x_BTD` is a batch of sequences of D-wide vectors; offset s = 1 is the next token.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "TrainConfig": "mtp_jax.config",
    "ModelConfig": "mtp_jax.model.config",
    "HeadConfig": "mtp_jax.heads.config",
    "DataConfig": "mtp_jax.data.config",
    "DecodeConfig": "mtp_jax.decode.config",
    "OptimizerConfig": "mtp_jax.config",
    "LossBenchConfig": "mtp_jax.bench.config",
    "TrainBenchConfig": "mtp_jax.bench.config",
    "MeshConfig": "mtp_jax.config",
    "MeasureConfig": "mtp_jax.sweep.config",
    "Sweep": "mtp_jax.sweep.config",
    "ConfigError": "mtp_jax.validate",
    "LanguageModel": "mtp_jax.language_model",
    "generate": "mtp_jax.decode.generate",
    "Slots": "mtp_jax.decode.slots",
    "load": "mtp_jax.runs.loading",
    "make_mesh": "mtp_jax.mesh",
}

if TYPE_CHECKING:
    from mtp_jax.bench.config import LossBenchConfig as LossBenchConfig
    from mtp_jax.bench.config import TrainBenchConfig as TrainBenchConfig
    from mtp_jax.config import MeshConfig as MeshConfig
    from mtp_jax.config import OptimizerConfig as OptimizerConfig
    from mtp_jax.config import TrainConfig as TrainConfig
    from mtp_jax.data.config import DataConfig as DataConfig
    from mtp_jax.decode.config import DecodeConfig as DecodeConfig
    from mtp_jax.decode.generate import generate as generate
    from mtp_jax.decode.slots import Slots as Slots
    from mtp_jax.heads.config import HeadConfig as HeadConfig
    from mtp_jax.language_model import LanguageModel as LanguageModel
    from mtp_jax.mesh import make_mesh as make_mesh
    from mtp_jax.model.config import ModelConfig as ModelConfig
    from mtp_jax.runs.loading import load as load
    from mtp_jax.sweep.config import MeasureConfig as MeasureConfig
    from mtp_jax.sweep.config import Sweep as Sweep
    from mtp_jax.validate import ConfigError as ConfigError

__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used: `mtp-jax --help` must not wait for JAX."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mtp_jax' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}.")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
