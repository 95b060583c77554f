"""Circuits: the law of a mixture's components along the window, written once for the loss and for drafting.

With R factors p_rs at offset s, every circuit has q(x_s | x_<s) = sum_r alpha_sr p_rs(x_s), where the weights alpha_s
depend on the hidden state and on the scores log p_rj(x_j) of the tokens before. A circuit says what alpha_1 is
(`start`), and how it changes with a score (`advance`).
"""

from __future__ import annotations

from mtp_jax.heads.circuits.base import Circuit
from mtp_jax.heads.circuits.btree import BTree
from mtp_jax.heads.circuits.cpd import CPD
from mtp_jax.heads.circuits.hmm import HMM
from mtp_jax.heads.circuits.independent import Independent

__all__ = ["CIRCUITS", "CPD", "HMM", "BTree", "Circuit", "Independent"]

CIRCUITS: dict[str, type[Circuit]] = {
    "independent": Independent,
    "cpd": CPD,
    "hmm": HMM,
    "btree": BTree,
}
