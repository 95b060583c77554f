"""The protocol of all heads, so that training, decoding and the benchmark never ask which head they hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.config import HeadConfig, ModelConfig
from mtp_jax.heads.factors import FACTORS, NextToken
from mtp_jax.losses.balance import balance_loss
from mtp_jax.losses.mixture import Terms, mixture_log_likelihood, mixture_loss
from mtp_jax.losses.subsample import subsample
from mtp_jax.model.layers import init_weight
from mtp_jax.sharding import RULES, gather

Aux = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftState:
    """The joint law of the next tokens of each row, given those it was conditioned on.

    `log_alpha_BR`: log posterior of the components, normalised. `logp_BRWV`: log-probabilities of every factor.
    `offset`: the next offset, counted from 0.
    """

    log_alpha_BR: Array
    logp_BRWV: Array
    offset: int = dataclasses.field(metadata={"static": True})


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
          `gate_entropy` nats, `gate_share` [R].
        """
        chex.assert_rank([x_BTD, targets_BTW, weights_BTW], 3)
        chex.assert_equal_shape([targets_BTW, weights_BTW])
        log_w_BTR = self.log_weights(x_BTD)
        config, params = self.config, self.factors.params(self._table())
        terms = Terms(config.gamma, config.z_weight, config.backward_draws if key is not None else 0)
        arrays = x_BTD, log_w_BTR, targets_BTW, weights_BTW
        if key is not None and config.loss_fraction < 1:
            arrays = subsample(jax.random.fold_in(key, 1), config.loss_fraction, *arrays)
        loss, nll_W = mixture_loss(type(self.factors), terms, params, *arrays, key)
        aux = {"loss_offset": nll_W, "loss_first_token": nll_W[0], **self._gate_aux(log_w_BTR, weights_BTW)}
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
        """log q(x_s | x_<s, h), `[B, T, W]` in nats: their sum over offsets is the joint. Forward only, in tiles."""
        params = self.factors.params(self._table())
        return mixture_log_likelihood(type(self.factors), params, x_BTD, self.log_weights(x_BTD), targets_BTW)

    def logits(self, x_BTD: Array, offsets: slice = slice(None)) -> Array:
        """The logits `[B, T, R, W, V]` of a slice of the offsets 0..W-1 (all by default), in float32."""
        params = jax.tree.map(gather, self.factors.params(self._table(), offsets))
        return self.factors.logits(self.factors.tables(params), x_BTD)

    def target_log_probs(self, x_BTD: Array) -> Array:
        """The law of the next token that verification preserves: log-probabilities `[B, T, V]` in float32."""
        if self.config.target == "ntp":
            logits_BTRWV = NextToken.logits({"unembed_VD": gather(self.unembed_VD[...])}, x_BTD)
            return jax.nn.log_softmax(logits_BTRWV[:, :, 0, 0], axis=-1)
        logp_BTRV = jax.nn.log_softmax(self.logits(x_BTD, slice(0, 1))[:, :, :, 0], axis=-1)
        return jax.nn.logsumexp(self.log_weights(x_BTD)[..., None] + logp_BTRV, axis=2)

    def draft_state(self, x_BD: Array, window: int | None = None) -> DraftState:
        """The joint law of the next `window` tokens (default W) after each row's hidden state."""
        x_B1D = x_BD[:, None]
        logits_BRWV = self.logits(x_B1D, slice(0, window))[:, 0]
        return DraftState(self.log_weights(x_B1D)[:, 0], jax.nn.log_softmax(logits_BRWV, axis=-1), 0)

    def next_log_probs(self, state: DraftState) -> Array:
        """log q(x_s | x_<s): `[B, V]`, exact and normalised. Raises `IndexError` past the window."""
        _within(state)
        return jax.nn.logsumexp(state.log_alpha_BR[:, :, None] + state.logp_BRWV[:, :, state.offset], axis=1)

    def condition(self, state: DraftState, token_B: Array) -> DraftState:
        """The law after token x_s is known: alpha_r is multiplied by p_rs(x_s) and normalised."""
        _within(state)
        logp_BRV = state.logp_BRWV[:, :, state.offset]
        hit_BV = jax.lax.broadcasted_iota(jnp.int32, (1, logp_BRV.shape[-1]), 1) == token_B[:, None]
        log_alpha_BR = state.log_alpha_BR + jnp.sum(jnp.where(hit_BV[:, None], logp_BRV, 0.0), axis=-1)
        log_alpha_BR = jax.nn.log_softmax(log_alpha_BR, axis=-1)
        return DraftState(log_alpha_BR, state.logp_BRWV, state.offset + 1)

    def _table(self) -> Array | None:
        """The unembedding that the factors share, where they do."""
        return None if self.config.factors == "full" else self.unembed_VD[...]

    def _gate_aux(self, log_w_BTR: Array, weights_BTW: Array) -> Aux:
        w_BTR, weight_BT1 = jnp.exp(log_w_BTR), weights_BTW[..., :1]
        return {
            "gate_share": jnp.sum(weight_BT1 * w_BTR, axis=(0, 1)),
            "gate_entropy": -jnp.sum(weight_BT1 * w_BTR * log_w_BTR),
        }


def _within(state: DraftState) -> None:
    window = state.logp_BRWV.shape[2]
    if state.offset >= window:
        raise IndexError(f"The draft state holds {window} offsets and {state.offset} of them are known; none is left.")
