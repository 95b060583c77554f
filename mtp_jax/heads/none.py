"""No head: a model that has its own next token alone, as a pretrained one comes. It decodes with k = 0."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax.heads.base import Aux, Head, Seen
from mtp_jax.heads.config import HeadConfig
from mtp_jax.losses.mixture import factor_scores
from mtp_jax.losses.next_token import NextToken
from mtp_jax.model.config import ModelConfig
from mtp_jax.validate import require


class NoHead(Head):
    """Nothing but the model's own law of offset 1."""

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        self.known = model.known

    @classmethod
    def check(cls, config: HeadConfig) -> None:
        """Refuse a window beyond the next token."""
        super().check(config)
        require(
            config.window == 1,
            f"HeadConfig.window is {config.window} and kind is none, which has the next token alone; set window to 1.",
        )

    @classmethod
    def describe(cls, config: HeadConfig) -> str:
        """That there is none."""
        return "none"

    @property
    def reads_table(self) -> bool:
        """Its law is that of the model's table."""
        return True

    def loss(
        self,
        seen: Seen,
        targets_BTW: Array,
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
    ) -> tuple[Array, Aux]:
        """Nothing: the model adds the loss of its own next token."""
        return jnp.zeros(()), {"loss_offset": jnp.zeros(0)}

    def log_likelihood(self, seen: Seen, targets_BTW: Array) -> Array:
        """log p of each next token, `[B, T, 1]`: the model's own."""
        params: dict[str, Array] = {"unembed_VD": seen.unembed_VD}
        logp_BT1W, _ = factor_scores(NextToken(), params, seen.x_BTD, targets_BTW, self.known)
        return logp_BT1W[:, :, 0]

    @classmethod
    def flops(cls, config: HeadConfig, model: ModelConfig, frozen: bool) -> tuple[float, float]:
        """None."""
        return 0.0, 0.0
