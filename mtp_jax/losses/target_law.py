"""Losses against the target's law: KL, total variation, acceptance and a blend, of one tile of positions.

A text has one token behind each position; the model has a law p of that token, and knows it at every later position of
the same row. For offset s of position t let q be the head's conditional q(. | x_<s), p the model's law behind position
t + s - 1, and overlap = sum_v min(p, q), the chance that a draft is accepted:

| term | value |
| --- | --- |
| `kl` | sum_v p (log p - log q) |
| `tv` | 1 - overlap |
| `acceptance` | -log overlap |
| `lk` | w kl + (1 - w) tv, with w = exp(-3 overlap) held constant (arXiv 2602.23881) |

Each has the derivative -(a p / q + b [q < p]) in q_v, where a and b are numbers of the offset. p is a constant. Where q
knows some tokens alone, p keeps its whole mass: what is not listed is never drafted, a miss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mtp_jax.losses.tiles import Device
from mtp_jax.model.layers import product
from mtp_jax.sharding import gather_local, vary

LK_DECAY = 3.0
"""How fast `lk` goes from KL to total variation as the overlap grows: the paper's best."""
LEAST = 1e-30
"""The overlap that is taken for none at all, whose logarithm is still a number."""


@dataclass(frozen=True)
class Against:
    """What is static in these losses: a weight for each term, and the temperature of p.

    `columns`: for each array of logits the name of the table, in `TargetLaw.tables` or among the head's parameters,
    whose rows are its columns. `unembed_VD` is the one that p is normalised over, where its normaliser is not known.
    """

    kl: float = 0.0
    tv: float = 0.0
    acceptance: float = 0.0
    lk: float = 0.0
    temperature: float = 1.0
    columns: tuple[str, ...] = ("unembed_VD",)

    def tables(self, normalised: bool) -> tuple[str, ...]:
        """The names of all tables that p takes; where it is `normalised` already, those of its columns alone."""
        return tuple(dict.fromkeys(self.columns if normalised else ("unembed_VD", *self.columns)))

    @property
    def reported(self) -> tuple[str, ...]:
        """The names of what a `Measure` reports."""
        some = (("acceptance_offset", self.acceptance), ("lk_offset", self.lk))
        return "kl_offset", "overlap_offset", *(name for name, weight in some if weight)

    def beside(self, tables: dict[str, Any], normalised: bool) -> int:
        """Columns of the logits of p at one position."""
        return sum(tables[name].shape[0] for name in self.tables(normalised))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TargetLaw:
    """What p is formed from, all of it constant: hidden states of the model and its tables `[V, D]`, by name.

    `tables`: those that the head's own parameters do not have. `weights_BTW`: 0 where a target is masked or position
    t + s - 1 lies outside the row, and elsewhere what the terms at (t, s) count. `normaliser_BT`: the logarithm of the
    sum over the vocabulary of exp(logits / temperature), where it is known; the product with the whole table, which is
    most of the work beside a shortlist, is then not made.
    """

    tables: dict[str, Array]
    x_BTD: Array
    weights_BTW: Array
    normaliser_BT: Array | None = None

    @property
    def normalised(self) -> bool:
        """Whether the normaliser is known."""
        return self.normaliser_BT is not None


class Measure:
    """The terms of every tile on one device: inside `shard_map`.

    Offset s of the logits (0 is the first) is compared with the law `before` + s positions on, and weighed by
    `gamma_W`.
    """

    def __init__(self, against: Against, device: Device, law: TargetLaw, specs: Any, gamma_W: Array, before: int):
        self.against, self.device, self.gamma_W, self.before = against, device, gamma_W, before
        own = {n: gather_local(w, specs[n], law.x_BTD.dtype) for n, w in law.tables.items()}
        self.tables = {**device.whole, **own}
        self.halo = before + gamma_W.shape[0] - 1
        self.names = against.tables(law.normalised)
        given = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (law.x_BTD, law.normaliser_BT))
        end = -given[0].shape[0] % device.width + self.halo
        padded = jax.tree.map(lambda a: vary(jnp.pad(a, ((0, end), *((0, 0),) * (a.ndim - 1)))), given)
        self.x_ND, self.normaliser_N = padded

    def tiles(self, weights_BTW: Array) -> tuple[Array, Array]:
        """What each tile takes: the weights of its positions, and its number."""
        tiles = self.device.tiles(weights_BTW)
        return tiles, jnp.arange(tiles.shape[0], dtype=jnp.int32)

    def __call__(
        self, weights_BTW: Array, number: Array, logits_MV: list[Array], lse_BTRW: Array, log_alpha_BTRW: Array
    ) -> tuple[tuple[Array, dict[str, Array]], Array, list[Array]]:
        """The terms of a tile, from what `tiles` has of it, its logits and the components' weights at every offset.

        Returns:
          (the loss, sums to report `[W]` by name), the gradient of `log_alpha_BTRW`, and u, which is like the logits:
          the derivative in log (alpha_r p_r(v)). Its sum over v is the gradient of log alpha_r, and the gradient of the
          logits is u less p_r(v) times that sum.
        """
        p_logits, lse_P1 = self._target(number)
        kl, overlap, parts, s = [], [], [], 0
        arrays = zip(logits_MV, self.device.offsets, self.against.columns, strict=True)
        for logits, count, name in arrays:
            offsets = slice(s, s + count)
            positions, rank = log_alpha_BTRW.shape[1:3]
            shift_NRW = (log_alpha_BTRW - lse_BTRW)[0, :, :, offsets]
            joint_NRWV = shift_NRW[..., None] + logits.reshape(positions, rank, count, -1)
            logq_NWV = jax.nn.logsumexp(joint_NRWV, axis=1)
            logp_PV = p_logits[name] - lse_P1
            starts = range(self.before + s, self.before + s + count)
            logp_NWV = jnp.stack([logp_PV[first : first + positions] for first in starts], axis=1)
            p_NWV, q_NWV = jnp.exp(logp_NWV), jnp.exp(logq_NWV)
            kl.append(jnp.sum(p_NWV * (logp_NWV - logq_NWV), axis=-1))
            overlap.append(jnp.sum(jnp.minimum(p_NWV, q_NWV), axis=-1))
            parts.append((joint_NRWV, logq_NWV, p_NWV, q_NWV))
            s += count
        kl_NW, overlap_NW = (self.device.total(jnp.concatenate(found, axis=1)) for found in (kl, overlap))
        value, (a_NW, b_NW) = self._terms(kl_NW, overlap_NW, weights_BTW[0])
        d_log_alpha, d_joint, s = [], [], 0
        for joint_NRWV, logq_NWV, p_NWV, q_NWV in parts:
            offsets = slice(s, s := s + p_NWV.shape[1])
            a_NW1, b_NW1 = a_NW[:, offsets, None], b_NW[:, offsets, None]
            # The derivative in q times q, so that nothing is divided by a q that may be 0.
            d_logq_NWV = -(a_NW1 * p_NWV + b_NW1 * jnp.where(q_NWV < p_NWV, q_NWV, 0.0))
            u_NRWV = jnp.exp(joint_NRWV - logq_NWV[:, None]) * d_logq_NWV[:, None]
            d_log_alpha.append(jnp.sum(u_NRWV, axis=-1))
            d_joint.append(u_NRWV.reshape(-1, u_NRWV.shape[-1]))
        return value, self.device.total(jnp.concatenate(d_log_alpha, axis=2))[None], d_joint

    def _target(self, number: Array) -> tuple[dict[str, Array], Array]:
        """Logits of p over the columns of each table, at the positions of the tile and its halo, and the normaliser."""
        width = self.device.width
        here = lambda a: lax.dynamic_slice_in_dim(a, number * width, width + self.halo)  # noqa: E731
        x_1PD = here(self.x_ND)[None]

        def logits_PV(name: str) -> Array:
            logits_PV = product("btd,vd->btv", x_1PD, self.tables[name])[0] / self.against.temperature
            return self.device.rule_out(logits_PV)

        found = {name: logits_PV(name) for name in self.names}
        if self.normaliser_N is not None:
            return found, here(self.normaliser_N)[:, None]
        return found, self.device.normaliser(found["unembed_VD"])

    def _terms(
        self, kl_NW: Array, overlap_NW: Array, weights_NW: Array
    ) -> tuple[tuple[Array, dict[str, Array]], tuple[Array, Array]]:
        """(the loss, what is reported), and the numbers a and b of each offset."""
        of, some_NW = self.against, jnp.maximum(overlap_NW, LEAST)
        mix_NW = jnp.exp(-LK_DECAY * overlap_NW)
        found = {"kl_offset": kl_NW, "overlap_offset": overlap_NW}
        if of.acceptance:
            found["acceptance_offset"] = -jnp.log(some_NW)
        if of.lk:
            found["lk_offset"] = mix_NW * kl_NW + (1 - mix_NW) * (1 - overlap_NW)
        sums = {name: jnp.sum(weights_NW * each_NW, axis=0) for name, each_NW in found.items()}
        loss_W = of.kl * sums["kl_offset"] + of.tv * (jnp.sum(weights_NW, axis=0) - sums["overlap_offset"])
        for name, weight in (("acceptance_offset", of.acceptance), ("lk_offset", of.lk)):
            loss_W = loss_W + (weight * sums[name] if weight else 0.0)
        weights_NW = weights_NW * self.gamma_W[None]
        a_NW = weights_NW * (of.kl + of.lk * mix_NW)
        b_NW = weights_NW * (of.tv + of.acceptance / some_NW + of.lk * (1 - mix_NW))
        return (jnp.sum(self.gamma_W * loss_W), sums), (a_NW, b_NW)
