"""Mixture head: a circuit over R components, whose inputs are factors p_rs (arXiv 2410.17765 and its kin)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax import arrays
from mtp_jax.heads.base import Aux, Head, Seen
from mtp_jax.heads.circuits import CIRCUITS
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.factors import FACTORS, Factors, Flops, Tables
from mtp_jax.heads.shortlist import SHORT, Shortlist, ShortlistForm, behind_listed, columns, split
from mtp_jax.losses.balance import balance_loss
from mtp_jax.losses.mixture import Terms, conditionals, factor_scores, mixture_loss, mixture_loss_against
from mtp_jax.losses.subsample import subsample
from mtp_jax.losses.target_law import Against, TargetLaw
from mtp_jax.model.config import ModelConfig
from mtp_jax.registry import lookup
from mtp_jax.sharding import gather
from mtp_jax.validate import require


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joint:
    """The joint law of the next tokens of each row, given those it was conditioned on.

    `carry`: the circuit's. `log_alpha_BR`: log weights of the components at the next offset, normalised. `logp_BRV`:
    for each offset the log-probabilities of its factors. `offset`: how many tokens are known.
    """

    carry: Any
    log_alpha_BR: Array
    logp_BRV: tuple[Array, ...]
    offset: int = dataclasses.field(metadata={"static": True})


class MixtureHead(Head):
    """q(x_s | x_<s, h) = sum_r alpha_sr p_rs(x_s | h): the circuit says what alpha is, the factors what p is."""

    shortlists = True
    learns_law = True

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        self.factors = _factors(config)(config, model, rngs=rngs)
        self.circuit = lookup(CIRCUITS, config.circuit, "HeadConfig.circuit")(config, model, rngs=rngs)
        self.shortlist = Shortlist(config.shortlist, model, self.whole) if config.shortlist else None
        self.known = model.known

    @classmethod
    def check(cls, config: HeadConfig) -> None:
        """Refuse names that no registry has, and a shortlist where factors have no table to take its rows from."""
        super().check(config)
        lookup(CIRCUITS, config.circuit, "HeadConfig.circuit").check(config)
        factors = _factors(config)
        through = [name for name, found in FACTORS.items() if found.THROUGH_TABLE]
        require(
            not config.shortlist or factors.THROUGH_TABLE,
            f"HeadConfig.shortlist is {config.shortlist} and factors is {config.factors}; a shortlist serves factors "
            f"that go through the model's vocabulary table: {', '.join(through)}. Change them, or set shortlist to 0.",
        )

    @classmethod
    def describe(cls, config: HeadConfig) -> str:
        """Circuit, rank, window and factors."""
        return f"{config.circuit}, R = {config.rank}, W = {config.window}, {config.factors} factors"

    @property
    def reads_table(self) -> bool:
        """Whether the factors go through the model's vocabulary table."""
        return self.factors.THROUGH_TABLE

    @property
    def whole(self) -> int:
        """How many offsets in front a shortlist leaves whole: none behind an encoder, where all are drafts."""
        return _whole(self.config)

    @property
    def form(self) -> Any:
        """How logits come from `params`: a `losses.tiles.Form`."""
        return ShortlistForm(type(self.factors), self.whole) if self.shortlist else type(self.factors)

    def params(self, unembed_VD: Any) -> Tables:
        """What the logits are computed from, by name. `unembed_VD`: the model's table."""
        found = self.factors.params()
        if self.reads_table and (self.whole or not self.shortlist):
            found["unembed_VD"] = unembed_VD
        if self.shortlist:
            name = f"{SHORT}unembed_VD"
            found[name] = getattr(self, name)[...] if hasattr(self, name) else self.shortlist.rows(unembed_VD)
        return found

    def unstack(self, unembed_VD: Any) -> None:
        """Give offsets arrays of their own, and make once what is made of the vocabulary table."""
        tables = {name: value for name, value in self.params(unembed_VD).items() if name.endswith("unembed_VD")}
        self.factors.unstack(tables)
        if self.shortlist:
            name = f"{SHORT}unembed_VD"
            setattr(self, name, nnx.Param(tables[name]))
            self.shortlist.unstack()

    def gate(self, seen: Seen, next_BT: Array) -> Array:
        """`log_weights` of what was seen."""
        return self.log_weights(seen.x_BTD)

    def log_weights(self, x_BTD: Array) -> Array:
        """log w_r(h), the weights of the circuit's first component: `[B, T, R]` in float32, normalised."""
        return self.circuit.latent(x_BTD)

    def loss(
        self,
        seen: Seen,
        targets_BTW: Array,
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
    ) -> tuple[Array, Aux]:
        """sum_s gamma^(s-1) * mean loss at offset s, plus the z and balance terms that the config asks for.

        What is reported beside `loss_offset`: `gate_entropy` nats, `gate_share` `[R]`, and with a shortlist `listed`
        `[W]`, the fraction of targets that it has. What it has not, and what comes after that in its window, counts as
        a loss of 0 in these means. With losses against the target's law what `mixture_loss_against` says, and with a
        shortlist `listed_before` `[W]`, the fraction of their targets whose window it has up to them, the others
        counting as 0.
        """
        return self.loss_reading(seen.x_BTD, seen, targets_BTW, weights_BTW, key, law_weights_BTW)

    def loss_reading(
        self,
        x_BTD: Array,
        seen: Seen,
        targets_BTW: Array,
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
    ) -> tuple[Array, Aux]:
        """`loss` of a mixture that reads `x_BTD` where the trunk saw `seen`."""
        config = self.config
        chex.assert_rank([x_BTD, targets_BTW, weights_BTW], 3)
        chex.assert_equal_shape([targets_BTW, weights_BTW])
        log_w_BTR = self.log_weights(x_BTD)
        columns_BTW, listed_BTW = columns(self.shortlist, targets_BTW)
        params, terms = {**self.params(seen.unembed_VD), **self.circuit.tables()}, self._terms()
        batch = x_BTD, log_w_BTR, columns_BTW, jnp.where(listed_BTW, weights_BTW, 0.0)
        if key is not None and config.loss_fraction < 1:
            batch = subsample(jax.random.fold_in(key, 1), config.loss_fraction, *batch)
        if terms.against:
            law = target_law(terms.against, params, seen, listed_BTW, law_weights_BTW)
            loss, sums = mixture_loss_against(self.form, terms, params, *batch, law)
            if self.shortlist:
                sums["listed_before"] = jnp.sum(law.weights_BTW, axis=(0, 1))
        else:
            loss, nll_W = mixture_loss(self.form, terms, params, *batch)
            sums = {"loss_offset": nll_W}
        w_BTR, weight_BT1 = jnp.exp(log_w_BTR), weights_BTW[..., :1]
        share_R = jnp.sum(weight_BT1 * w_BTR, axis=(0, 1))
        aux = {**sums, "gate_share": share_R, "gate_entropy": -jnp.sum(weight_BT1 * w_BTR * log_w_BTR)}
        if self.shortlist:
            aux["listed"] = jnp.sum(batch[-1], axis=(0, 1))
        if config.balance != "none" and config.balance_weight > 0:
            loss = loss + config.balance_weight * balance_loss(config.balance, log_w_BTR, weights_BTW[..., 0])
        return loss, aux

    def _terms(self) -> Terms:
        """What is static in the loss."""
        config = self.config
        names = ("unembed_VD",)
        if self.shortlist:
            names = *("unembed_VD",) * self.whole, f"{SHORT}unembed_VD"
        against = against_target(config, names)
        before = 1 - self.whole
        return Terms(type(self.circuit), config.gamma, config.z_weight, self.known, before, config.nll_weight, against)

    def log_likelihood(self, seen: Seen, targets_BTW: Array) -> Array:
        """log q(x_s | x_<s, h), `[B, T, W]` in nats, in tiles; -inf from the first target on that is not listed."""
        columns_BTW, listed_BTW = columns(self.shortlist, targets_BTW)
        logp_BTRW, _ = factor_scores(self.form, self.params(seen.unembed_VD), seen.x_BTD, columns_BTW, self.known)
        found_BTW = conditionals(type(self.circuit), self._unfolded(seen.x_BTD), logp_BTRW)
        return jnp.where(listed_BTW, found_BTW, -jnp.inf)

    def logits(self, seen: Seen, start: int = 0, stop: int | None = None) -> tuple[Array, ...]:
        """The logits of each of the offsets start .. stop - 1 (default: all W), `[B, T, R, V]` in float32.

        V is the whole vocabulary, or, after the first offset, the shortlist if there is one.
        """
        params = jax.tree.map(gather, self.params(seen.unembed_VD))

        def at(start: int, stop: int, params: Tables) -> list[Array]:
            if start >= stop:
                return []
            tables = self.factors.tables(self.factors.at(params, slice(start, stop)))
            logits_BTRWV = arrays.rule_out(self.factors.logits(tables, seen.x_BTD), self.known)
            return [logits_BTRWV[:, :, :, s] for s in range(stop - start)]

        stop = self.config.window if stop is None else stop
        if self.shortlist is None:
            return tuple(at(start, stop, params))
        whole, short = split(params)
        return tuple(at(start, min(stop, self.whole), whole) + at(max(start, self.whole), stop, short))

    def marginal(self, seen: Seen) -> tuple[Array, Array]:
        """The law of the first token, and log p_r1 `[B, T, R, V]`, which `begin` needs again."""
        first_BTRV = jax.nn.log_softmax(self.logits(seen, stop=1)[0], axis=-1)
        log_alpha_BTR = self.circuit.start(self._unfolded(seen.x_BTD))[1]
        return jax.nn.logsumexp(log_alpha_BTR[..., None] + first_BTRV, axis=2), first_BTRV

    def joint(self, seen: Seen, window: int, first_BRV: Array | None = None) -> Joint:
        """The joint law of the next `window` tokens after one position of each row; `first_BRV`: log p_r1 if known."""
        carry, log_alpha_B1R = self.circuit.start(self._unfolded(seen.x_BTD))
        known = () if first_BRV is None else (first_BRV,)
        logits = self.logits(seen, len(known), window)
        logp_BRV = tuple(jax.nn.log_softmax(logits_B1RV[:, 0], axis=-1) for logits_B1RV in logits)
        return Joint(jax.tree.map(lambda a: a[:, 0], carry), log_alpha_B1R[:, 0], known + logp_BRV, 0)

    def begin(
        self,
        seen: Seen,
        token_B: Array,
        *,
        window: int,
        cache: Any = (),
        position_B: Array | None = None,
        memo: Any = None,
    ) -> Joint:
        """The joint law given its first token."""
        return self.condition(self.joint(seen, window, memo), token_B)

    def next_log_probs(self, draft: Joint) -> Array:
        """log q(x_s | x_<s): `[B, V]`, exact and normalised. Raises `IndexError` past the window."""
        logq_Bn, shortlist = self.next_listed(draft)
        return shortlist.spread(logq_Bn) if shortlist else logq_Bn

    def next_listed(self, draft: Joint) -> tuple[Array, Shortlist | None]:
        """The same of the listed tokens, behind the first offset."""
        _within(draft)
        logq_Bn = jax.nn.logsumexp(draft.log_alpha_BR[:, :, None] + draft.logp_BRV[draft.offset], axis=1)
        return logq_Bn, self.shortlist if draft.offset >= self.whole else None

    def condition(self, draft: Joint, token_B: Array) -> Joint:
        """The law after token x_s is known. One that a shortlist has not is never drafted; it tells nothing."""
        _within(draft)
        logp_BRV = draft.logp_BRV[draft.offset]
        if self.shortlist and draft.offset >= self.whole:
            token_B = self.shortlist.columns(token_B)
        hit_BV = jax.lax.broadcasted_iota(jnp.int32, (1, logp_BRV.shape[-1]), 1) == token_B[:, None]
        score_BR = jnp.sum(jnp.where(hit_BV[:, None], logp_BRV, 0.0), axis=-1)
        carry, log_alpha_BR = self.circuit.advance(draft.carry, score_BR, draft.offset + 1)
        return Joint(carry, log_alpha_BR, draft.logp_BRV, draft.offset + 1)

    def _unfolded(self, x_BTD: Array) -> Any:
        """What the circuit starts from."""
        return self.circuit.unfold(jax.tree.map(gather, self.circuit.tables()), self.circuit.latent(x_BTD), x_BTD)

    @classmethod
    def flops(cls, config: HeadConfig, model: ModelConfig, frozen: bool) -> tuple[float, float]:
        """Of factors at `loss_fraction` of the positions, and of the circuit at all of them.

        Losses against the target's law form its logits once more, without a gradient.
        """
        circuit, part = (
            lookup(CIRCUITS, config.circuit, "HeadConfig.circuit").flops(config, model),
            config.loss_fraction,
        )
        law = 2 * model.d_model * (model.vocab_size + config.shortlist) if config.against_target else 0
        forward, states, table = _factor_flops(config, model)
        # An encoder learns through the hidden states.
        behind = frozen and config.encoder in ("none", "hidden")
        backward = 2 * forward - (table if frozen else 0) - (states if behind else 0)
        return part * forward + circuit + law, part * backward + (1 if behind else 2) * circuit


def against_target(config: HeadConfig, columns: tuple[str, ...]) -> Against | None:
    """The losses against the target's law that a config weighs, if there are any; `columns` as `Against` has them."""
    weights = config.kl_weight, config.tv_weight, config.acceptance_weight, config.lk_weight
    return Against(*weights, config.temperature, columns) if config.against_target else None


def target_law(
    against: Against, params: Tables, seen: Seen, listed_BTW: Array, law_weights_BTW: Array | None
) -> TargetLaw:
    """The target's law of what was seen. Where a token before is not listed, the head has no law to compare."""
    if law_weights_BTW is None:
        raise ValueError("A loss against the target's law has weights of its own; give law_weights_BTW.")
    wanted = against.tables(normalised=seen.normaliser_BT is not None)
    tables = {"unembed_VD": seen.unembed_VD} if "unembed_VD" in wanted and "unembed_VD" not in params else {}
    return TargetLaw(tables, seen.x_BTD, behind_listed(listed_BTW, law_weights_BTW), seen.normaliser_BT)


def _factors(config: HeadConfig) -> type[Factors]:
    return lookup(FACTORS, config.factors, "HeadConfig.factors")


def _whole(config: HeadConfig) -> int:
    return int(config.encoder == "none")


def _factor_flops(head: HeadConfig, model: ModelConfig) -> Flops:
    """`Factors.flops` of all offsets; with a shortlist, those after the first have another vocabulary."""
    flops = _factors(head).flops
    if not head.shortlist:
        return flops(head, model)
    short, whole = dataclasses.replace(model, vocab_size=head.shortlist, num_tokens=None), _whole(head)
    parts = ((whole, model), (head.window - whole, short))
    found = [flops(dataclasses.replace(head, window=w, shortlist=0), of) for w, of in parts if w]
    return Flops(*map(sum, zip(*found, strict=True)))


def _within(draft: Joint) -> None:
    window = len(draft.logp_BRV)
    if draft.offset >= window:
        raise IndexError(f"The draft holds {window} offsets and {draft.offset} of them are known; none is left.")
