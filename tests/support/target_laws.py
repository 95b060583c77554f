"""Small problems for losses against the target's law, and these losses as they are written, for plain autodiff."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.heads.circuits import CIRCUITS, Independent
from mtp_jax.heads.factors import FACTORS
from mtp_jax.heads.shortlist import ShortlistForm
from mtp_jax.losses.mixture import Terms, mixture_loss_against
from mtp_jax.losses.target_law import Against, TargetLaw
from support import tiny
from support.mixture_losses import B, D, R, T, V, W, log_softmax, make_params, reference_transitions

IDS = np.array([0, 2, 3, 5, 6, 7, 8, 9])
KNOWN, GAMMA = V - 2, 0.8
ALL = dict(kl=0.7, tv=0.3, acceptance=0.2, lk=0.4)
CASES = {
    "shared": dict(factors="shared"),
    "rank 1": dict(factors="shared", rank=1),
    "lora": dict(factors="lora"),
    "shortlist": dict(factors="lowrank", shortlist=True),
    "encoder": dict(factors="lowrank", before=1),
    "encoder, shortlist": dict(factors="shared", shortlist=True, before=1),
    "encoder, full, rank 1": dict(factors="full", rank=1, before=1),
    "hmm": dict(factors="full", circuit="hmm"),
    "encoder, btree": dict(factors="shared", circuit="btree", before=1),
}


def make(
    factors: str = "shared",
    rank: int = R,
    shortlist: bool = False,
    before: int = 0,
    circuit: str = "cpd",
    nll_weight: float = 0.5,
    temperature: float = 0.7,
    normalised: bool = False,
    **weights: float,
) -> SimpleNamespace:
    """A problem on the mesh in scope: windows end early and at the rows' ends, and two ids are ruled out. The law may
    come `normalised`; it then has no table that its columns do not take."""
    rng = np.random.default_rng(3)
    params = make_params(factors, circuit=circuit)
    table = params.get("unembed_VD", make_params("shared")["unembed_VD"])
    at = {"map_DRWD": 1, "down_DRWE": 1, "u_DRWV": 1}
    if rank < R:
        params = {n: w[(slice(None),) * at[n] + (slice(0, rank),)] if n in at else w for n, w in params.items()}
    form, whole = FACTORS[factors], 1 - before
    columns = ("unembed_VD",)
    if shortlist:
        form, columns = ShortlistForm(form, whole), (*("unembed_VD",) * whole, "short_unembed_VD")
        params["short_unembed_VD"] = params["unembed_VD"].at[IDS].get(out_sharding=params["unembed_VD"].sharding.spec)
        if not whole:
            del params["unembed_VD"]
    ids_BTW = rng.integers(0, KNOWN, (B, T, W)).astype(np.int32)
    valid_BTW = np.arange(W) < rng.integers(0, W + 2, (B, T))[..., None]
    law_valid_BTW = valid_BTW & (np.arange(T)[:, None] + np.arange(W) + before < T)
    weights_BTW, law_weights_BTW = (valid / valid.sum((0, 1)) for valid in (valid_BTW, law_valid_BTW))
    targets_BTW = ids_BTW
    if shortlist:
        ids_BTW[: B // 2] = rng.choice(IDS, ids_BTW[: B // 2].shape)
        column_V = np.full(V, len(IDS))
        column_V[IDS] = np.arange(len(IDS))
        later = column_V[ids_BTW[..., whole:]]
        known = np.concatenate([np.ones((B, T, whole), bool), np.cumprod(later < len(IDS), axis=-1) > 0], axis=-1)
        targets_BTW = np.concatenate([ids_BTW[..., :whole], later], axis=-1).astype(np.int32)
        weights_BTW = weights_BTW * known
        law_weights_BTW[..., 1:] *= known[..., :-1]
    x_BTD, log_w_BTR = rng.standard_normal((B, T, D)), log_softmax(rng.standard_normal((B, T, rank)))
    law_BTD = rng.standard_normal((B, T, D)) if before else x_BTD
    needed = {} if "unembed_VD" in params or (normalised and "unembed_VD" not in columns) else {"unembed_VD": table}
    logits_BTV = law_BTD @ np.asarray(table)[:KNOWN].T / temperature
    terms = Terms(
        CIRCUITS[circuit] if rank > 1 else Independent,
        GAMMA,
        z_weight=0.3 if weights == ALL else 0.0,
        known=KNOWN,
        before=before,
        nll_weight=nll_weight,
        against=Against(**weights, temperature=temperature, columns=columns),
    )
    return SimpleNamespace(
        form=form,
        terms=terms,
        params=params,
        arrays=(x_BTD, log_w_BTR, targets_BTW, weights_BTW),
        tables=needed,
        normaliser_BT=np.log(np.exp(logits_BTV).sum(-1)) if normalised else None,
        table_VD=np.asarray(table),
        law_BTD=law_BTD,
        law_weights_BTW=law_weights_BTW,
        shortlist=shortlist,
        whole=whole,
    )


def differentiate(problem: SimpleNamespace) -> Any:
    """((loss, sums), gradients of params, x and log w), compiled afresh."""
    given = (problem.law_BTD, problem.law_weights_BTW, problem.normaliser_BT)
    law = TargetLaw(problem.tables, *jax.tree.map(tiny.shard, given))
    loss = functools.partial(mixture_loss_against, problem.form, problem.terms)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.map(np.asarray, compiled(problem.params, *map(tiny.shard, problem.arrays), law))


def factor_logits(problem: SimpleNamespace, params: Any, x_BTD: Any) -> list[Any]:
    """Of each offset, `[B, T, R, V]` or `[B, T, R, n]`, one product after the other."""
    found, table_VD = [], params.get("unembed_VD")
    for s in range(W):
        short = problem.shortlist and s >= problem.whole
        rows_VD = params["short_unembed_VD"] if short else table_VD
        if "u_DRWV" in params:
            logits = jnp.einsum("btd,drv->btrv", x_BTD, params["u_DRWV"][:, :, s])
        elif "map_DRWD" in params:
            logits = jnp.einsum("btd,dre,ve->btrv", x_BTD, params["map_DRWD"][:, :, s], rows_VD)
        elif "u_DWV" in params:
            own = jnp.einsum("btd,dre,ev->btrv", x_BTD, params["down_DRWE"][:, :, s], params["up_EV"])
            logits = jnp.einsum("btd,dv->btv", x_BTD, params["u_DWV"][:, s])[:, :, None] + own
        else:
            own = jnp.einsum("btd,dre,ec,vc->btrv", x_BTD, params["down_DRWE"][:, :, s], params["up_ED"], rows_VD)
            logits = jnp.einsum("btd,de,ve->btv", x_BTD, params["map_DWD"][:, s], rows_VD)[:, :, None] + own
        found.append(logits if short else logits[..., :KNOWN])
    return found


def reference(problem: SimpleNamespace, fault: str = "") -> Any:
    """The same as `differentiate`, by plain autodiff of what DESIGN 6 says, one offset and one position at a time."""
    terms, of = problem.terms, problem.terms.against
    x_BTD, log_w_BTR, targets_BTW, weights_BTW = problem.arrays
    logits_BTV = jnp.asarray(problem.law_BTD @ problem.table_VD.T)[..., :KNOWN] / of.temperature
    if fault == "no temperature":
        logits_BTV = logits_BTV * of.temperature
    p_BTV = jax.nn.softmax(logits_BTV, axis=-1)
    shift = 1 if fault == "one position off" else 0

    def loss(params, x_BTD, log_w_BTR):
        joint_BTR, total, sums = log_w_BTR, 0.0, {}
        # What components that change weigh is checked where circuits are (tests/heads/test_circuits.py).
        moving = terms.law.TABLES and terms.law.start((log_w_BTR, reference_transitions(params, x_BTD)))
        for s, logits_BTRV in enumerate(factor_logits(problem, params, x_BTD)):
            lse_BTR = jax.nn.logsumexp(logits_BTRV, axis=-1)
            logp_BTRV = logits_BTRV - lse_BTR[..., None]
            # The gate comes normalised: that is not part of what is differentiated.
            before_BT1 = jax.nn.logsumexp(joint_BTR, axis=-1, keepdims=True) if s and log_w_BTR.shape[-1] > 1 else 0.0
            log_alpha_BTR = moving[1] if moving else joint_BTR - before_BT1
            logq_BTV = jax.nn.logsumexp(log_alpha_BTR[..., None] + logp_BTRV, axis=2)
            hit_BTV = jax.nn.one_hot(targets_BTW[..., s], logp_BTRV.shape[-1], dtype=logp_BTRV.dtype)
            found = {"loss_offset": -jnp.sum(weights_BTW[..., s] * jnp.sum(hit_BTV * logq_BTV, axis=-1))}
            if moving:
                score_BTR = jnp.sum(hit_BTV[:, :, None] * logp_BTRV, axis=-1)
                moving = terms.law.advance(moving[0], score_BTR, s + 1)
            elif log_w_BTR.shape[-1] > 1:  # one component has weight 1 at all offsets, and nothing to say of it
                joint_BTR = joint_BTR + jnp.sum(hit_BTV[:, :, None] * logp_BTRV, axis=-1)
            listed = IDS if problem.shortlist and s >= problem.whole else np.arange(KNOWN)
            each = []
            for t in range(T):
                behind = t + s + terms.before
                if behind >= T:
                    assert not problem.law_weights_BTW[:, t, s].any()
                    continue
                p_BV, q_BV = p_BTV[:, max(behind - shift, 0)][:, listed], jnp.exp(logq_BTV[:, t])
                if fault == "renormalised":
                    p_BV = p_BV / p_BV.sum(-1, keepdims=True)
                kl_B = jnp.sum(p_BV * (jnp.log(p_BV) - logq_BTV[:, t]), axis=-1)
                overlap_B = jnp.sum(jnp.minimum(p_BV, q_BV), axis=-1)
                tv_B = (p_BV.sum(-1) if fault == "misses ignored" else 1) - overlap_B
                mix_B = jnp.exp(-3 * jax.lax.stop_gradient(overlap_B))
                lk_B = mix_B * kl_B + (1 - mix_B) * tv_B
                each.append(
                    problem.law_weights_BTW[None, :, t, s]
                    * jnp.stack([kl_B, tv_B, overlap_B, -jnp.log(overlap_B), lk_B])
                )
            kl, tv, overlap, acceptance, lk = sum(each).sum(-1) if each else jnp.zeros(5)
            found |= {"kl_offset": kl, "overlap_offset": overlap, "acceptance_offset": acceptance, "lk_offset": lk}
            weighted = terms.nll_weight * found["loss_offset"]
            weighted = weighted + of.kl * kl + of.tv * tv + of.acceptance * acceptance + of.lk * lk
            z = jnp.sum(weights_BTW[..., s] * jnp.mean(lse_BTR**2, axis=-1))
            total = total + GAMMA ** (s + terms.before) * weighted + terms.z_weight * z
            for name, value in found.items():
                sums.setdefault(name, []).append(value)
        reported = ("loss_offset", *of.reported)
        return total, {name: jnp.stack(sums[name]) for name in reported}

    params = jax.tree.map(np.asarray, problem.params)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.map(np.asarray, compiled(params, x_BTD, log_w_BTR))
