"""Config of the head over the next W tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtp_jax.validate import at_least, positive, require, typed

AGAINST_TARGET = ("kl_weight", "tv_weight", "acceptance_weight", "lk_weight")
"""The fields of `HeadConfig` that weigh losses against the target's law."""


@dataclass(frozen=True)
class HeadConfig:
    """The distribution over the next `window` tokens (arXiv 2410.17765).

    The defaults are what the sweeps over bytes speak for (`docs/concepts/joint-heads.md`, "The default"). Where the
    vocabulary is larger than the model's width every table of V x D weighs, and `lowrank` has one for all offsets.

    `kind` names a family of `mtp_jax.heads.registry.HEADS`. A `mixture` has `rank` components: `circuit` names how they
    hang together (`mtp_jax.heads.circuits.CIRCUITS`): `independent` is rank 1, `cpd` a mixture of products; in `hmm`
    the component changes from offset to offset, in `btree` from half to half of the window. Their transitions are a
    linear map of the hidden state, of rank `circuit_width` (0: full), which is cheaper where the model is wide.
    `factors` names what they are made of (`mtp_jax.heads.factors.FACTORS`): `full` has an unembedding per (rank,
    offset); `shared` a D x D map per (rank, offset) under the model's table; `residual` a residual block in its place
    (one component of which is Medusa); `lowrank` a D x D map per offset plus a
    correction of width `factor_width` per rank, under that table; `lora` an unembedding per offset plus such a
    correction, for vocabularies below D.
    `target` is the law that decoding preserves: `marginal` is the head's own first-token marginal, `ntp` the model's
    next-token law, whose cross-entropy is added with `ntp_weight`.
    Offset s is weighted by `gamma**(s-1)`; `z_weight` is on the mean square of the factors' log-normalisers. `balance`
    keeps components in use, with coefficient `balance_weight`.
    `init_noise` is how far the components differ at the start, relative to what they have in common: with 1 a
    correction of `lora` begins as large as what it corrects; `full` and `shared` ones were measured with 0.02.
    With a `loss_fraction` so many of the positions, drawn anew in every step, have the loss of the offsets: less work,
    with gradients that are right on average.
    `encoder` is what a mixture reads: `none` is the last hidden state; `token` is that and the token that the target
    just chose; `block` is the same through `encoder_layers` transformer blocks with a cache of their own, over these
    and over the outputs of the trunk's layers `taps`, counted from 1. The mixture is then over the offsets after the
    chosen token, the first one is the model's own, and `target` is `ntp`. With `hidden` that is so too, and it reads
    the last hidden state alone: less work for `independent`, to which the first token says nothing.
    With a `shortlist` n the offsets after the first know n token ids alone: the most frequent ones of the training
    data, which the run finds, or without data the ids 0..n-1. 0: all ids. The ids are an array among the parameters.
    What a mixture learns is a weighted sum: `nll_weight` is on the log-likelihood of the text, and the others, which
    need target `ntp`, on losses against the model's own law p of each next token, all of them on q(. | x_<s):
    `kl_weight` on KL(p || q), `tv_weight` on total variation, `acceptance_weight` on -log sum min(p, q), `lk_weight` on
    a blend of KL and total variation (`mtp_jax.losses.target_law`). They are means over the positions whose p lies in
    their row.
    A `sequential` head has a module that is applied from offset to offset, fed with the token before: one for all, or
    with `per_offset` one for each; with `attention` it is a transformer block with a cache of its own.
    `temperature` is that of the law that the head learns: p is taken at it, and a text that the model wrote for the
    log-likelihood should have been sampled at it.
    Drafts are sampled at a share of the text's temperature, `draft_temperature`: 1 is the head's law at that of the
    text, 0 drafts the likeliest tokens. What a head that knows less than its base drafts a little colder is accepted
    more often (`docs/concepts/losses.md`); the text's law is the same.
    """

    kind: str = "mixture"
    window: int = 4
    circuit: str = "cpd"
    rank: int = 8
    circuit_width: int = 0
    factors: str = "lora"
    factor_width: int = 16
    target: Literal["marginal", "ntp"] = "marginal"
    ntp_weight: float = 1.0
    gamma: float = 1.0
    z_weight: float = 0.0
    balance: Literal["none", "squared", "switch"] = "squared"
    balance_weight: float = 1.0
    init_noise: float = 1.0
    loss_fraction: float = 1.0
    shortlist: int = 0
    encoder: str = "none"
    nll_weight: float = 1.0
    kl_weight: float = 0.0
    tv_weight: float = 0.0
    acceptance_weight: float = 0.0
    lk_weight: float = 0.0
    temperature: float = 1.0
    draft_temperature: float = 1.0
    attention: bool = False
    per_offset: bool = False
    encoder_layers: int = 1
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "window", "rank", "factor_width", "encoder_layers", "taps")
        require(
            self.encoder == "block" or (not self.taps and self.encoder_layers == 1),
            f"HeadConfig.taps is {self.taps}, encoder_layers is {self.encoder_layers} and encoder is {self.encoder}, "
            "which has no layers and reads no taps. Set taps to () and encoder_layers to 1, or encoder to block.",
        )
        require(
            len(set(self.taps)) == len(self.taps),
            f"HeadConfig.taps is {self.taps}, with a layer twice; name each once.",
        )
        at_least(self, 0, "ntp_weight", "z_weight", "balance_weight", "init_noise", "shortlist", "circuit_width")
        at_least(self, 0, "nll_weight", "draft_temperature", *AGAINST_TARGET)
        positive(self, "temperature")
        require(
            self.nll_weight > 0 or bool(self.against_target),
            f"HeadConfig.nll_weight is 0 and so are {', '.join(AGAINST_TARGET)}; nothing would be learnt. Set one of "
            "them above 0.",
        )
        require(
            self.circuit != "independent" or self.rank == 1,
            f"HeadConfig.circuit is independent and rank is {self.rank}; independent offsets have rank 1. "
            "Set rank to 1, or circuit to cpd.",
        )
        for name in ("gamma", "loss_fraction"):
            value = getattr(self, name)
            require(0 < value <= 1, f"HeadConfig.{name} is {value}; it must lie in (0, 1].")
        require(
            not self.shortlist or self.window > 1 or self.encoder != "none",
            f"HeadConfig.shortlist is {self.shortlist} and window is {self.window}; a shortlist serves the offsets "
            "after the first. Set shortlist to 0.",
        )
        require(
            self.loss_fraction == 1 or not self.against_target,
            f"HeadConfig.loss_fraction is {self.loss_fraction} and {self.weights_against}; these losses read the "
            f"model's law at all positions. Set loss_fraction to 1, or {' and '.join(self.against_target)} to 0.",
        )

    @property
    def against_target(self) -> dict[str, float]:
        """The weights of losses against the target's law that are above 0, by field."""
        return {name: getattr(self, name) for name in AGAINST_TARGET if getattr(self, name) > 0}

    @property
    def weights_against(self) -> str:
        """The same as a message says them."""
        return " and ".join(f"{name} is {weight}" for name, weight in self.against_target.items())
