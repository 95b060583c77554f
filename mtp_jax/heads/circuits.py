"""Circuits: the law of a mixture's components along the window, written once for the loss and for drafting.

With R factors p_rs at offset s, every circuit has q(x_s | x_<s) = sum_r alpha_sr p_rs(x_s), where the weights alpha_s
depend on the hidden state and on the scores log p_rj(x_j) of the tokens before. A circuit says what alpha_1 is
(`start`), and how it changes with a score (`advance`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.parameters import init_full
from mtp_jax.sharding import gather


class Circuit(nnx.Module):
    """The weights of R components. `start` and `advance` take any axes in front of R."""

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        """Make the parameters, if there are any."""

    def latent(self, x_BTD: Array) -> Any:
        """What the hidden states say of the components: a tree of arrays with B and T in front, in float32."""
        raise NotImplementedError

    @staticmethod
    def start(latent: Any) -> tuple[Any, Array]:
        """(what is carried along the window, log alpha_1 `[.., R]`, normalised): by default the latent is both."""
        return latent, latent

    @staticmethod
    def advance(carry: Any, score_R: Array, offset: int) -> tuple[Any, Array]:
        """The same after the token at `offset` (1 is the first) is known: log p_r of it is `score_R`, `[.., R]`."""
        raise NotImplementedError

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """Forward FLOPs of `latent` for one position."""
        return 0


class Independent(Circuit):
    """One component: offsets know nothing of each other (Gloeckle et al., arXiv 2404.19737)."""

    @staticmethod
    def latent(x_BTD: Array) -> Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Zeros `[B, T, 1]`."""
        return jnp.zeros_like(x_BTD[..., :1], dtype=jnp.float32)

    @staticmethod
    def advance(carry: Array, score_R: Array, offset: int) -> tuple[Array, Array]:
        """The one weight stays 1: a product that only gives the score is then not computed."""
        return carry, carry


class CPD(Circuit):
    """The canonical probability decomposition (Basharin, Chertkov and Oseledets, arXiv 2410.17765).

    One component writes the whole window: q(x_1..x_W) = sum_r w_r prod_s p_rs(x_s), so alpha_s is the posterior.
    """

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        # Components start as near copies, so nothing is known about which to choose: the gate starts uniform.
        self.gate_DR = init_full("gate_DR", (model.d_model, head.rank))

    def latent(self, x_BTD: Array) -> Array:
        """log w_r, `[B, T, R]`: the softmax of a linear layer."""
        z_BTR = jnp.einsum("btd,dr->btr", x_BTD.astype(jnp.float32), gather(self.gate_DR[...]))
        return jax.nn.log_softmax(z_BTR, axis=-1)

    @staticmethod
    def advance(carry: Array, score_R: Array, offset: int) -> tuple[Array, Array]:
        """Bayes: alpha_r is multiplied by p_r(x) and normalised."""
        if score_R.shape[-1] == 1:
            return carry, carry
        log_alpha_R = jax.nn.log_softmax(carry + score_R, axis=-1)
        return log_alpha_R, log_alpha_R

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """The gate's product."""
        return 2 * model.d_model * head.rank


CIRCUITS: dict[str, type[Circuit]] = {
    "independent": Independent,
    "cpd": CPD,
}
