"""Costs of a run, from its config alone: parameters, FLOPs of trunk and head, bytes per device, known peaks.

A matrix product of m x n by n x p is 2 m n p FLOPs; training is three times the forward pass, less the gradients that a
frozen trunk does without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax

from mtp_jax.config import TrainConfig
from mtp_jax.heads.registry import check_head
from mtp_jax.model.config import ModelConfig

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device, from its vendor's data sheet.

    `kinds`: how JAX's `device_kind` begins. `peak_flops`: dense bf16 FLOP/s. `memory`: bytes, of which the runtime
    keeps a few percent for itself.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    memory: int


ACCELERATORS = {
    "v4": Accelerator(("TPU v4",), 275e12, 32 * GIB),
    "v5e": Accelerator(("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB),
    "v5p": Accelerator(("TPU v5p", "TPU v5"), 459e12, 95 * GIB),
    "v6e": Accelerator(("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB),
    "a100-40gb": Accelerator(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40 * GIB),
    "a100": Accelerator(("NVIDIA A100",), 312e12, 80 * GIB),
    "h100": Accelerator(("NVIDIA H100",), 989e12, 80 * GIB),
    "h200": Accelerator(("NVIDIA H200",), 989e12, 141 * GIB),
    "b200": Accelerator(("NVIDIA B200",), 2250e12, 180 * GIB),
}


@dataclass(frozen=True)
class Costs:
    """Parameters, and training FLOPs per token (forward and backward, without recomputation).

    `plain_flops` are those of the same trunk with one plain next-token head, all of it trained, whatever a
    run trains.
    """

    trunk_params: int
    head_params: int
    embedding_params: int
    trunk_flops: float
    head_flops: float
    plain_flops: float

    @property
    def step_ratio(self) -> float:
        """FLOPs of a step relative to the same trunk with one plain next-token head, all of it trained."""
        return (self.trunk_flops + self.head_flops) / self.plain_flops


def trunk_forward_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of the layers, causal attention counted at its mean length."""
    d, h = model.d_model, model.head_width
    projections = d * h * (2 * model.num_heads + 2 * model.num_kv_heads) + 3 * d * model.d_ff
    attention = 2 * model.num_heads * h * (seq_len + 1) / 2
    return 2 * model.num_layers * (projections + attention)


def training_flops(config: TrainConfig) -> tuple[float, float]:
    """Training FLOPs per token of trunk and head, forward and backward, without recomputation.

    The model's own next-token loss counts to the head, where that is the target. On a base there is none, and no
    gradient goes to the hidden states, nor to the vocabulary table.
    """
    model, head, frozen = config.model, config.head, bool(config.base)
    own = 2 * model.vocab_size * model.d_model if head.target == "ntp" and not frozen else 0
    passes = 1 if frozen else 3
    trunk = passes * trunk_forward_flops(model, config.data.seq_len)
    return trunk, sum(check_head(head).flops(head, model, frozen)) + passes * own


def costs(config: TrainConfig, params: Any, normalised: bool = False) -> Costs:
    """The costs of a run. `params` is the parameter tree, of arrays or of shapes. `normalised`: the data have the
    normaliser of the base's law."""

    def count(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    model = config.model
    trunk, head = training_flops(config)
    return Costs(
        trunk_params=count(params.get("trunk", {})),
        head_params=count(params.get("head", {})),
        embedding_params=count({name: params[name] for name in ("embed_VD", "unembed_VD") if name in params}),
        trunk_flops=trunk if "trunk" in params else 0.0,
        head_flops=head - (_normaliser_flops(config) if normalised else 0),
        plain_flops=3 * trunk_forward_flops(model, config.data.seq_len) + 6 * model.vocab_size * model.d_model,
    )


def _normaliser_flops(config: TrainConfig) -> float:
    """Of the product with the vocabulary table that a token's normaliser takes, where nothing else needs it."""
    head, model = config.head, config.model
    alone = head.against_target and head.shortlist and check_head(head).leaves_first
    return 2 * model.d_model * model.vocab_size if alone else 0


def accelerator(device_kind: str) -> Accelerator | None:
    """The first of `ACCELERATORS` of a kind, or None where there is none."""
    return next((found for found in ACCELERATORS.values() if device_kind.startswith(found.kinds)), None)


def peak_flops(device: Any) -> float | None:
    """The dense bf16 peak of a device in FLOP/s, or None where it is not in `ACCELERATORS`."""
    found = accelerator(device.device_kind)
    return None if found is None else found.peak_flops


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes on the fullest device: sharded arrays count their shard."""

    def of(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))
