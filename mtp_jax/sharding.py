"""Where every array lives. All sharding rules of the project are in this file.

The batch is split over `data` and `fsdp`. Weights are split over `fsdp` (and gathered just before they are used:
ZeRO-3) and over `tensor` (attention heads, feed-forward width and vocabulary stay split while they are used).
Rank R and window W are never split. The letters are the legend of `mtp_jax`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")


@dataclass(frozen=True)
class Rules:
    """One partition spec for each kind of array. A stacked parameter has its L axis in front, which is not split."""

    # Parameters: input width over fsdp, the other axis over tensor.
    embed_VD: P = P("tensor", "fsdp")
    w_DNH: P = P("fsdp", "tensor", None)
    w_NHD: P = P("tensor", None, "fsdp")
    b_NH: P = P("tensor", None)
    w_DF: P = P("fsdp", "tensor")
    w_FD: P = P("tensor", "fsdp")
    scale: P = P(None)
    # The head. The D x D maps are not split over tensor: their output meets the vocabulary, which is.
    unembed_VD: P = P("tensor", "fsdp")
    u_DRWV: P = P("fsdp", None, None, "tensor")
    map_DRWD: P = P("fsdp", None, None, None)
    map_DWD: P = P("fsdp", None, None)
    down_DRWE: P = P("fsdp", None, None, None)
    up_ED: P = P(None, "fsdp")
    gate_DR: P = P("fsdp", None)
    # Activations.
    tokens_BT: P = P(BATCH, None)
    x_BTD: P = P(BATCH, None, None)
    qkv_BTNH: P = P(BATCH, None, "tensor", None)
    cache_BKSH: P = P(BATCH, "tensor", None, None)
    h_BTF: P = P(BATCH, None, "tensor")
    logits_BTRWV: P = P(BATCH, None, None, None, "tensor")
    logits_BTV: P = P(BATCH, None, "tensor")


RULES = Rules()


def gather(w: Array) -> Array:
    """`w` whole along `fsdp`, still split along `tensor`. Its transpose scatters the gradient back."""
    spec = jax.typeof(w).sharding.spec
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return w if whole == spec else jax.reshard(w, whole)
