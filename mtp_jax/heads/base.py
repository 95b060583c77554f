"""The protocol of all heads, so that training, decoding and the benchmark never ask which head they hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.config import WITH_TABLE, HeadConfig, ModelConfig
from mtp_jax.heads.factors import FACTORS, NextToken, Tables
from mtp_jax.heads.shortlist import SHORT, Shortlist, ShortlistForm, split
from mtp_jax.losses.balance import balance_loss
from mtp_jax.losses.mixture import Terms, conditionals, factor_scores, mixture_loss
from mtp_jax.losses.subsample import subsample
from mtp_jax.model.layers import init_weight
from mtp_jax.sharding import RULES, gather

Aux = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftState:
    """The joint law of the next tokens of each row, given those it was conditioned on.

    `log_alpha_BR`: log posterior of the components, normalised. `logp_BRV`: for each offset the log-probabilities of
    its factors. `offset`: the next offset, counted from 0.
    """

    log_alpha_BR: Array
    logp_BRV: tuple[Array, ...]
    offset: int = dataclasses.field(metadata={"static": True})

    def skip(self) -> DraftState:
        """The law of the later offsets where the next token stays unknown: its factors sum to 1."""
        return dataclasses.replace(self, offset=self.offset + 1)


class Head(nnx.Module):
    """q(x_1..x_W | h) = sum_r w_r(h) prod_s p_rs(x_s | h). Subclasses say what w_r is.

    `unembed_VD` exists where `HeadConfig.has_unembedding`: it is the table of shared and low-rank factors, the
    next-token head of target `ntp`, and the input embedding where that is tied.
    """

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.has_unembedding:
            shape = (model.vocab_size, model.d_model)
            scale = (model.vocab_size / model.d_model) ** 0.5
            self.unembed_VD = init_weight(rngs, shape, inputs=1, spec=RULES.unembed_VD, scale=scale)
        self.factors = FACTORS[config.factors](config, model, rngs=rngs)
        self.shortlist = Shortlist(config.shortlist_ids, model.vocab_size) if config.shortlist else None

    @property
    def form(self) -> Any:
        """How logits come from `params` (see `losses.tiles.Form`)."""
        return ShortlistForm(type(self.factors)) if self.shortlist else type(self.factors)

    def params(self) -> Tables:
        """What the logits are computed from, by name."""
        found = self.factors.params()
        if self.config.factors in WITH_TABLE:
            found["unembed_VD"] = self.unembed_VD[...]
        if self.shortlist:
            name = f"{SHORT}unembed_VD"
            found[name] = getattr(self, name)[...] if hasattr(self, name) else self.shortlist.rows(found["unembed_VD"])
        return found

    def unstack(self) -> None:
        """Lay parameters out for decoding, so that a step copies none of them."""
        tables = {name: value for name, value in self.params().items() if name.endswith("unembed_VD")}
        self.factors.unstack(tables)
        if self.shortlist:
            name = f"{SHORT}unembed_VD"
            setattr(self, name, nnx.Param(tables[name]))

    def log_weights(self, x_BTD: Array) -> Array:
        """log w_r(h): `[B, T, R]` in float32, normalised over R."""
        raise TypeError(f"{type(self).__name__} does not define log_weights.")

    @staticmethod
    def gate_flops(config: HeadConfig, model: ModelConfig) -> int:
        """Forward FLOPs of `log_weights` for one position."""
        return 0

    def loss(self, x_BTD: Array, targets_BTW: Array, weights_BTW: Array, key: Array | None = None) -> tuple[Array, Aux]:
        """The training loss in nats, and what to report of it.

        Args:
          x_BTD: hidden states.
          targets_BTW: the next W tokens of each position.
          weights_BTW: 0 where a target is masked, else 1 / (valid targets of that offset in the whole optimizer batch).
          key: for what the config draws at random in training; without one the loss is exact.

        Returns:
          sum_s gamma^(s-1) * mean loss at offset s, plus the next-token, z and balance terms that the config asks for,
          and sums that add up over micro-batches: `loss_offset` [W] nats, `loss_first_token` nats (of the target),
          `gate_entropy` nats, `gate_share` [R], and with a shortlist `listed` [W], the fraction of targets that it has.
          What it has not, and what comes after that in its window, counts as a loss of 0 in these means.
        """
        chex.assert_rank([x_BTD, targets_BTW, weights_BTW], 3)
        chex.assert_equal_shape([targets_BTW, weights_BTW])
        log_w_BTR = self.log_weights(x_BTD)
        config = self.config
        columns_BTW, listed_BTW = self._columns(targets_BTW)
        terms = Terms(config.gamma, config.z_weight, config.backward_draws if key is not None else 0)
        arrays = x_BTD, log_w_BTR, columns_BTW, weights_BTW * listed_BTW
        if key is not None and config.loss_fraction < 1:
            arrays = subsample(jax.random.fold_in(key, 1), config.loss_fraction, *arrays)
        loss, nll_W = mixture_loss(self.form, terms, self.params(), *arrays, key)
        aux = {"loss_offset": nll_W, "loss_first_token": nll_W[0], **self._gate_aux(log_w_BTR, weights_BTW)}
        if self.shortlist:
            aux["listed"] = jnp.sum(arrays[-1], axis=(0, 1))
        if self.config.target == "ntp":
            params, alone_BT1 = {"unembed_VD": self.unembed_VD[...]}, jnp.zeros_like(log_w_BTR[..., :1])
            first = targets_BTW[..., :1], weights_BTW[..., :1]
            ntp_loss, nll_1 = mixture_loss(NextToken, Terms(1.0, terms.z_weight), params, x_BTD, alone_BT1, *first)
            loss, aux["loss_first_token"] = loss + self.config.ntp_weight * ntp_loss, nll_1[0]
        if self.config.balance != "none" and self.config.balance_weight > 0:
            balance = balance_loss(self.config.balance, log_w_BTR, weights_BTW[..., 0])
            loss = loss + self.config.balance_weight * balance
        return loss, aux

    def log_likelihood(self, x_BTD: Array, targets_BTW: Array) -> Array:
        """log q(x_s | x_<s, h), `[B, T, W]` in nats: their sum over offsets is the joint. Forward only, in tiles.

        -inf from the first target on that a shortlist has not.
        """
        listed_BTW = self._columns(targets_BTW)[1]
        found_BTW = conditionals(self.factor_log_probs(x_BTD, targets_BTW), self.log_weights(x_BTD))
        return jnp.where(listed_BTW, found_BTW, -jnp.inf)

    def factor_log_probs(self, x_BTD: Array, targets_BTW: Array) -> Array:
        """log p_rs(x_s | h), `[B, T, R, W]`: what each component alone says of the targets. Forward only, in tiles.

        Of a target that a shortlist has not it is any number.
        """
        return factor_scores(self.form, self.params(), x_BTD, self._columns(targets_BTW)[0])[0]

    def logits(
        self, x_BTD: Array, start: int = 0, stop: int | None = None, component_B: Array | None = None
    ) -> tuple[Array, ...]:
        """The logits of each of the offsets start .. stop - 1 (default: all W), `[B, T, R, V]` in float32.

        V is the whole vocabulary, or, after the first offset, the shortlist if there is one. With `component_B` (and
        T = 1) they are those of one component of each row, and R is 1.
        """
        params = jax.tree.map(gather, self.params())

        def at(start: int, stop: int, params: Tables) -> list[Array]:
            if start >= stop:
                return []
            tables = self.factors.tables(self.factors.at(params, slice(start, stop)))
            if component_B is None:
                logits_BTRWV = self.factors.logits(tables, x_BTD)
            else:
                logits_BTRWV = self.factors.of_component(tables, x_BTD, component_B)
            return [logits_BTRWV[:, :, :, s] for s in range(stop - start)]

        stop = self.config.window if stop is None else stop
        if self.shortlist is None:
            return tuple(at(start, stop, params))
        whole, short = split(params)
        return tuple(at(start, min(stop, 1), whole) + at(max(start, 1), stop, short))

    def target_log_probs(self, x_BTD: Array) -> Array:
        """The law of the next token that verification preserves: log-probabilities `[B, T, V]` in float32."""
        return self.target_state(x_BTD)[0]

    def target_state(self, x_BTD: Array) -> tuple[Array, Array | None]:
        """`target_log_probs`, and log p_r1 `[B, T, R, V]` if it comes from those: `draft_state` takes them up."""
        if self.config.target == "ntp":
            logits_BTRWV = NextToken.logits({"unembed_VD": gather(self.unembed_VD[...])}, x_BTD)
            return jax.nn.log_softmax(logits_BTRWV[:, :, 0, 0], axis=-1), None
        first_BTRV = jax.nn.log_softmax(self.logits(x_BTD, stop=1)[0], axis=-1)
        return jax.nn.logsumexp(self.log_weights(x_BTD)[..., None] + first_BTRV, axis=2), first_BTRV

    def draft_state(self, x_BD: Array, window: int | None = None, first_BRV: Array | None = None) -> DraftState:
        """The joint law of the next `window` tokens (default W) after each row's hidden state.

        `first_BRV`: log p_r1, where it is known (see `target_state`).
        """
        x_B1D, known = x_BD[:, None], () if first_BRV is None else (first_BRV,)
        return DraftState(self.log_weights(x_B1D)[:, 0], known + self._logp(x_B1D, len(known), window), 0)

    def component_state(self, state: DraftState, x_BD: Array, component_B: Array, window: int) -> DraftState:
        """The law of the offsets from that of `state` on, up to `window`, by one component of each row (ancestral).

        Given the component, the tokens are independent. One drawn from the posterior and then a token of its law
        together have the law of the joint, with a product per offset in place of R of them.
        """
        logp_B1V = self._logp(x_BD[:, None], state.offset, window, component_B)
        alone_B1 = jnp.zeros_like(state.log_alpha_BR[:, :1])
        return DraftState(alone_B1, state.logp_BRV[: state.offset] + logp_B1V, state.offset)

    def _logp(self, x_B1D: Array, *which: Any) -> tuple[Array, ...]:
        return tuple(jax.nn.log_softmax(logits[:, 0], axis=-1) for logits in self.logits(x_B1D, *which))

    def next_log_probs(self, state: DraftState) -> Array:
        """log q(x_s | x_<s): `[B, V]`, exact and normalised. Raises `IndexError` past the window."""
        _within(state)
        logq_BV = jax.nn.logsumexp(state.log_alpha_BR[:, :, None] + state.logp_BRV[state.offset], axis=1)
        return self.shortlist.spread(logq_BV) if self.shortlist and state.offset else logq_BV

    def condition(self, state: DraftState, token_B: Array) -> DraftState:
        """The law after token x_s is known: alpha_r is multiplied by p_rs(x_s) and normalised.

        A token that a shortlist has not is never drafted; it tells nothing.
        """
        _within(state)
        if state.log_alpha_BR.shape[-1] == 1:
            return state.skip()  # it tells nothing; a product of this offset's own is then not computed
        logp_BRV = state.logp_BRV[state.offset]
        if self.shortlist and state.offset:
            token_B = self.shortlist.columns(token_B)
        hit_BV = jax.lax.broadcasted_iota(jnp.int32, (1, logp_BRV.shape[-1]), 1) == token_B[:, None]
        log_alpha_BR = state.log_alpha_BR + jnp.sum(jnp.where(hit_BV[:, None], logp_BRV, 0.0), axis=-1)
        log_alpha_BR = jax.nn.log_softmax(log_alpha_BR, axis=-1)
        return DraftState(log_alpha_BR, state.logp_BRV, state.offset + 1)

    def _columns(self, targets_BTW: Array) -> tuple[Array, Array]:
        """Where each target is in the logits of its offset, and whether it has any (see `Shortlist.targets`)."""
        if self.shortlist is None:
            return targets_BTW, jnp.ones_like(targets_BTW, bool)
        return self.shortlist.targets(targets_BTW)

    def _gate_aux(self, log_w_BTR: Array, weights_BTW: Array) -> Aux:
        w_BTR, weight_BT1 = jnp.exp(log_w_BTR), weights_BTW[..., :1]
        return {
            "gate_share": jnp.sum(weight_BT1 * w_BTR, axis=(0, 1)),
            "gate_entropy": -jnp.sum(weight_BT1 * w_BTR * log_w_BTR),
        }


def _within(state: DraftState) -> None:
    window = len(state.logp_BRV)
    if state.offset >= window:
        raise IndexError(f"The draft state holds {window} offsets and {state.offset} of them are known; none is left.")
