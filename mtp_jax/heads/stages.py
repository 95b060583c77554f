"""Modules of a head that follow one another: stacked on an L axis, as the trunk's layers are, or a decoder's list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mtp_jax.model.block import Block
from mtp_jax.model.config import ModelConfig
from mtp_jax.parameters import init_full


def stacked(make: Callable[[nnx.Rngs], Any], count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules in one, each made with a key of its own. Its name in its owner is one of `parameters.STACKS`."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def stage(stages: Any, index: int) -> Any:
    """One of the modules."""
    return stages[index] if isinstance(stages, nnx.List) else jax.tree.map(lambda w: w[index], stages)


def unstacked(stages: Any, count: int) -> nnx.List:
    """A list of them, each with arrays of its own: a step of decoding then copies none."""
    return nnx.List([stage(stages, i) for i in range(count)])


def silent_block(model: ModelConfig, *, rngs: nnx.Rngs) -> Block:
    """A transformer block of the model's own shape, which begins as the identity: what it adds is zero at first, and
    so does not hide what the trunk says."""
    block = Block(model, rngs=rngs)
    block.attention.wo_NHD = init_full("wo_NHD", (model.num_heads, model.head_width, model.d_model))
    block.feed_forward.w_down_FD = init_full("w_down_FD", (model.d_ff, model.d_model))
    return block


def block_flops(model: ModelConfig) -> int:
    """Forward FLOPs of such a block at one position, without its attention's scores."""
    heads = model.head_width * (2 * model.num_heads + 2 * model.num_kv_heads)
    return 2 * model.d_model * (heads + 3 * model.d_ff)
