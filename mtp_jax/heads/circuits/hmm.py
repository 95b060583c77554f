"""Circuit of a chain: the component may change from offset to offset."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from mtp_jax.heads.circuits.transitions import Transitions, down


class HMM(Transitions):
    """A hidden Markov model that changes along the window: before each offset but the first a component moves on.

    q(x_1..x_W) = sum over r_1..r_W of w_{r_1} p_{r_1 1}(x_1) prod_s T_s[r_s, r_{s+1}] p_{r_{s+1}, s+1}(x_{s+1}).
    """

    @staticmethod
    def matrices(offsets: int) -> int:
        """One between neighbouring offsets."""
        return offsets - 1

    @staticmethod
    def start(unfolded: tuple[Array, Array]) -> tuple[Any, Array]:
        """The weights of the first offset; the matrices are carried along."""
        return unfolded, unfolded[0]

    @staticmethod
    def advance(carry: tuple[Array, Array], score_R: Array, offset: int) -> tuple[Any, Array]:
        """Bayes, and a step of the chain, if another offset comes."""
        log_alpha_R, log_T_MRR = carry
        log_alpha_R = jax.nn.log_softmax(log_alpha_R + score_R, axis=-1)
        if offset <= log_T_MRR.shape[-3]:
            log_alpha_R = down(log_alpha_R, log_T_MRR[..., offset - 1, :, :])
        return (log_alpha_R, log_T_MRR), log_alpha_R
