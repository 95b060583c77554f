"""Rotary position embeddings (arXiv 2104.09864), plain and with Llama-3 frequency scaling."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mtp_jax.model.config import ModelConfig


class Rotary(NamedTuple):
    """Cosines and sines of the angles, `[B, T, 1, H/2]` in float32."""

    cos: Array
    sin: Array


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair, `[H/2]`.

    Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    """
    scaling = config.rope_scaling
    frequency = config.rope_theta ** -(np.arange(0, config.head_width, 2) / config.head_width)
    turns = scaling.original_context_length * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (frequency * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rotary(config: ModelConfig, positions_BT: Array) -> Rotary:
    """The rotations at absolute positions."""
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies(config))[None, None, None]
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(x_BTNH: Array, rope: Rotary) -> Array:
    """Turn the pairs (i, i + H/2), the order of the Hugging Face checkpoints. Computed in float32."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
