"""Block verification (Sun et al., arXiv 2403.10444): the most accepted tokens of all valid rules for a drafted block.

    rho_0 = 1, rho_i = min(1, rho_{i-1} p_i(x_i) / q_i(x_i)), Z_i = sum_x (rho_i p_{i+1}(x) - q_{i+1}(x))^+
    accept the longest prefix that is kept, where i is kept with chance Z_i / (Z_i + 1 - rho_i); y ~ (rho p - q)^+

By induction from the end a prefix is accepted with probability rho_i, and min(rho p, q) + (rho p - q)^+ = rho p.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from mtp_jax.decode.verify.rejection import Rejection, rest


class BlockRule(Rejection):
    """The whole block is judged before any of it is rejected."""

    def chances(self, log_ratio_Bk: Array, p_BTV: Array, q_BTV: Array) -> tuple[Array, Array]:
        """Z / (Z + 1 - rho), and rho. Behind the last draft q is 0, so Z = rho and the chance is rho."""
        sum_BT = jnp.pad(jnp.cumsum(log_ratio_Bk, axis=1), ((0, 0), (1, 0)))
        log_rho_BT = sum_BT - lax.cummax(sum_BT, axis=1)  # = min(0, previous + log ratio)
        rho_BT = jnp.exp(log_rho_BT)
        z_BT = jnp.sum(rest(p_BTV, q_BTV, rho_BT[:, :, None]), axis=-1)
        whole_BT = z_BT - jnp.expm1(log_rho_BT)
        chance_BT = jnp.where(whole_BT == 0, 1.0, z_BT / jnp.where(whole_BT == 0, 1.0, whole_BT))
        return chance_BT[:, 1:], rho_BT

    def accepted(self, kept_Bk: Array) -> Array:
        """Those up to the last that is kept, whatever came of the ones before it."""
        number_Bk = jnp.arange(1, kept_Bk.shape[1] + 1, dtype=jnp.int32)[None]
        return jnp.max(jnp.where(kept_Bk, number_Bk, 0), axis=1, initial=0)
