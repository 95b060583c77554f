"""Head behind an encoder: the first offset is the model's own, and a mixture over the others reads what was chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.heads.base import Aux, Head, Seen, with_own_first
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.encoder import ENCODERS
from mtp_jax.heads.mixture import Joint, MixtureHead
from mtp_jax.heads.shortlist import Shortlist
from mtp_jax.losses.mixture import factor_scores
from mtp_jax.losses.next_token import NextToken
from mtp_jax.model.config import ModelConfig
from mtp_jax.registry import lookup
from mtp_jax.validate import require


class EncodedHead(Head):
    """q(x_1 | h) = p(x_1 | h), the model's own; q(x_2 .. x_W | h, x_1) is a mixture that reads encoder(h, x_1)."""

    shortlists = True
    learns_law = True
    leaves_first = True

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        self.encoder = lookup(ENCODERS, config.encoder, "HeadConfig.encoder")(config, model, rngs=rngs)
        self.mixture = MixtureHead(_later(config), model, rngs=rngs)
        self.known = model.known

    @classmethod
    def check(cls, config: HeadConfig) -> None:
        """Refuse names that no registry has, another family than mixtures, and a target of the head's own."""
        lookup(ENCODERS, config.encoder, "HeadConfig.encoder")
        require(
            config.kind == "mixture",
            f"HeadConfig.encoder is {config.encoder} and kind is {config.kind}; encoders are of mixtures. Set it to "
            "none.",
        )
        require(
            config.target == "ntp",
            f"HeadConfig.encoder is {config.encoder} and target is {config.target}; the first offset is then the "
            "model's own law. Set target to ntp.",
        )
        require(
            config.window > 1,
            f"HeadConfig.encoder is {config.encoder} and window is {config.window}; it serves the offsets after the "
            "first. Set window to 2 or more, or encoder to none.",
        )
        MixtureHead.check(_later(config))

    @classmethod
    def describe(cls, config: HeadConfig) -> str:
        """Those of the mixture, the whole window, and the encoder."""
        layers = f" of {config.encoder_layers}, taps {config.taps or 'none'}" if config.encoder == "block" else ""
        return f"{MixtureHead.describe(config)}, encoder {config.encoder}{layers}"

    @property
    def reads_table(self) -> bool:
        """The law of the first offset goes through the model's vocabulary table."""
        return True

    @property
    def taps(self) -> tuple[int, ...]:
        """Those of the encoder."""
        return self.encoder.taps

    @property
    def has_cache(self) -> bool:
        """Where the encoder has one."""
        return self.encoder.has_cache

    def unstack(self, unembed_VD: Any) -> None:
        """As mixtures do, and the encoder."""
        self.mixture.unstack(unembed_VD)
        self.encoder.unstack()

    def loss(
        self,
        seen: Seen,
        targets_BTW: Array,
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
    ) -> tuple[Array, Aux]:
        """That of the mixture over the offsets from 2 on; what it reports is of these, and the next-token loss is the
        model's."""
        x_BTD = self._encoded(seen, targets_BTW[..., 0]).x_BTD
        later = None if law_weights_BTW is None else law_weights_BTW[..., 1:]
        loss, aux = self.mixture.loss_reading(x_BTD, seen, targets_BTW[..., 1:], weights_BTW[..., 1:], key, later)
        return loss, with_own_first(aux, weights_BTW, law_weights_BTW)

    def gate(self, seen: Seen, next_BT: Array) -> Array:
        """That of the mixture, given the next tokens."""
        return self.mixture.gate(self._encoded(seen, next_BT), next_BT)

    def log_likelihood(self, seen: Seen, targets_BTW: Array) -> Array:
        """log q(x_s | x_<s), `[B, T, W]` in nats; the first is the model's own."""
        table = {"unembed_VD": seen.unembed_VD}
        first_BT11, _ = factor_scores(NextToken(), table, seen.x_BTD, targets_BTW[..., :1], self.known)
        later = self.mixture.log_likelihood(self._encoded(seen, targets_BTW[..., 0]), targets_BTW[..., 1:])
        return jnp.concatenate([first_BT11[:, :, 0], later], axis=-1)

    def init_cache(self, batch: int, slots: int) -> Any:
        """That of the encoder."""
        return self.encoder.init_cache(batch, slots)

    def extend(self, cache: Any, seen: Seen, next_BT: Array, start_B: Array, memo: Any) -> tuple[Any, Any]:
        """Write what the encoder keeps; with it comes what it says of these positions."""
        return self.encoder.extend(cache, seen, next_BT, start_B) if self.has_cache else (cache, memo)

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
        """The joint law of the offsets from 2 on, given the token at the first."""
        if not self.has_cache:
            seen = self._encoded(seen, token_B[:, None])
        elif memo is not None:
            seen = dataclasses.replace(seen, x_BTD=memo[:, None])
        else:
            assert position_B is not None
            seen = dataclasses.replace(seen, x_BTD=self.encoder.again(cache, seen, token_B, position_B))
        return self.mixture.joint(seen, window - 1)

    def next_log_probs(self, draft: Joint) -> Array:
        """As mixtures do."""
        return self.mixture.next_log_probs(draft)

    def next_listed(self, draft: Joint) -> tuple[Array, Shortlist | None]:
        """As mixtures do."""
        return self.mixture.next_listed(draft)

    def condition(self, draft: Joint, token_B: Array) -> Joint:
        """As mixtures do."""
        return self.mixture.condition(draft, token_B)

    def _encoded(self, seen: Seen, next_BT: Array) -> Seen:
        return dataclasses.replace(seen, x_BTD=self.encoder.encode(seen, next_BT))

    @classmethod
    def flops(cls, config: HeadConfig, model: ModelConfig, frozen: bool) -> tuple[float, float]:
        """Those of the mixture and of the encoder."""
        own = lookup(ENCODERS, config.encoder, "HeadConfig.encoder").flops(config, model)
        forward, backward = MixtureHead.flops(_later(config), model, frozen)
        return forward + own, backward + 2 * own


def _later(config: HeadConfig) -> HeadConfig:
    """The mixture over the offsets from 2 on, as if they began at 1."""
    return dataclasses.replace(config, window=config.window - 1)
