"""What circuits have in common whose component may change along the window."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.heads.circuits.cpd import CPD
from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import product
from mtp_jax.parameters import init_full, init_weight
from mtp_jax.validate import require

STAY = 0.01
"""How far transitions begin from the identity: (1 - STAY) I + STAY / R."""


class Transitions(CPD):
    """A circuit whose component may change along the window (MTPC, arXiv 2511.11346): the rows of M matrices `[R, R]`
    are laws of the next component, given the last and the hidden state.

    Their logits are one linear map, or behind `circuit_width` features a cheaper one. They begin near the identity,
    and so near CPD; at the identity itself no gradient would say where to go.
    """

    TABLES = ("trans_DMRR", "trans_down_DE", "trans_EMRR")

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(head, model, rngs=rngs)
        shape, width = (self.matrices(head.window), head.rank, head.rank), head.circuit_width
        if width:
            self.trans_down_DE = init_weight(rngs, "trans_down_DE", (model.d_model, width))
            self.trans_EMRR = init_full("trans_EMRR", (width, *shape))
        else:
            self.trans_DMRR = init_full("trans_DMRR", (model.d_model, *shape))

    @classmethod
    def check(cls, head: HeadConfig) -> None:
        """Refuse one component, and one offset."""
        super().check(head)
        require(
            head.rank > 1,
            f"HeadConfig.circuit is {head.circuit} and rank is {head.rank}; its components change along the window. "
            "Set rank to 2 or more, or circuit to independent.",
        )
        require(
            head.window > 1,
            f"HeadConfig.circuit is {head.circuit} and it is over {head.window} offset, along which nothing changes. "
            "Set window to more (behind an encoder a circuit is over the offsets after the first), or circuit to cpd.",
        )

    @staticmethod
    def matrices(offsets: int) -> int:
        """How many matrices (M) such a circuit has over so many offsets."""
        raise NotImplementedError

    @staticmethod
    def unfold(tables: dict[str, Any], latent: Array, x_BTD: Array) -> tuple[Array, Array]:
        """The latent, and the logarithms of the matrices, `[B, T, M, R, R]`."""
        if "trans_DMRR" in tables:
            z_BTMRR = product("btd,dmij->btmij", x_BTD, tables["trans_DMRR"])
        else:
            x_BTE = product("btd,de->bte", x_BTD, tables["trans_down_DE"]).astype(x_BTD.dtype)
            z_BTMRR = product("bte,emij->btmij", x_BTE, tables["trans_EMRR"])
        rank = z_BTMRR.shape[-1]
        near_RR = jnp.log((1 - STAY) * jnp.eye(rank) + STAY / rank)
        return latent, jax.nn.log_softmax(z_BTMRR + near_RR[None, None, None], axis=-1)

    @staticmethod
    def unfolds(tables: dict[str, Any]) -> int:
        """The matrices' entries."""
        return next(math.prod(a.shape[1:]) for name, a in tables.items() if name.endswith("MRR"))

    @classmethod
    def flops(cls, head: HeadConfig, model: ModelConfig) -> int:
        """The products of the gate and the transitions."""
        size, width = cls.matrices(head.window) * head.rank**2, head.circuit_width
        transitions = 2 * width * (model.d_model + size) if width else 2 * model.d_model * size
        return CPD.flops(head, model) + transitions


def down(log_alpha_R: Array, log_T_RR: Array) -> Array:
    """The law of the next component."""
    return jax.nn.logsumexp(log_alpha_R[..., :, None] + log_T_RR, axis=-2)
