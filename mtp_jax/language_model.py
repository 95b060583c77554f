"""The language model: trunk, vocabulary table, and the head over the next W tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax import arrays
from mtp_jax.heads.base import Aux, Head, Seen
from mtp_jax.heads.circuits import Independent
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.registry import check_head
from mtp_jax.losses.mixture import Terms, factor_scores, mixture_loss
from mtp_jax.losses.next_token import NextToken
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.transformer import Trunk, UnrolledTrunk
from mtp_jax.parameters import init_weight
from mtp_jax.sharding import RULES, gather
from mtp_jax.validate import ConfigError, require


class LanguageModel(nnx.Module):
    """A decoder-only transformer with a multi-token head. Build it under `jax.set_mesh`.

    `unembed_VD` is the one table from hidden states to tokens: of the model's own next-token law, of factors that go
    through it, and, where embeddings are tied, the input embedding too. None where nothing reads it. `embed_VD` is the
    input embedding, None where that is tied.
    """

    trunk: Trunk | UnrolledTrunk | None

    def __init__(self, config: ModelConfig, head: HeadConfig, *, rngs: nnx.Rngs, trunk: bool = True):
        """`trunk`: whether there is one; without it the model is given the hidden states that its head reads."""
        self.config = config
        shape, tied = (config.vocab_size, config.d_model), config.tie_embeddings
        # Small next to what the layers add, or their output would drown in it until they have grown.
        self.embed_VD = None if tied else init_weight(rngs, "embed_VD", shape)
        made = Trunk(config, rngs=rngs)  # in any case: a head begins alike with and without it
        self.trunk = made if trunk else None
        self.head: Head = check_head(head)(head, config, rngs=rngs)
        outside = [n for n in self.head.taps if not 1 <= n <= config.num_layers]
        require(not outside, f"The head taps the layers {outside} and the model has 1..{config.num_layers}.")
        wanted = tied or head.target == "ntp" or self.head.reads_table
        self.unembed_VD = init_weight(rngs, "unembed_VD", shape) if wanted else None

    def embed(self, tokens_BT: Array) -> Array:
        """Token embeddings `[B, T, D]` in the compute dtype."""
        table_VD = self.unembed_VD if self.embed_VD is None else self.embed_VD
        return gather(table_VD[...]).at[tokens_BT].get(out_sharding=RULES.x_BTD).astype(self.config.dtype)  # type: ignore[index]

    def __call__(self, tokens_BT: Array, segments_BT: Array | None = None) -> Array:
        """The hidden states `[B, T, D]` that the head reads, after the final norm. Arguments as in `see`."""
        return self.see(tokens_BT, segments_BT).x_BTD

    def see(self, tokens_BT: Array, segments_BT: Array | None = None, layers: tuple[int, ...] | None = None) -> Seen:
        """Run the trunk.

        Args:
          tokens_BT: token ids.
          segments_BT: the document of each position; positions see only their own. One document if not given.
          layers: those that are tapped, where they are others than the head's.
        """
        chex.assert_rank(tokens_BT, 2)
        # In a notebook the tokens may come from anywhere; under jit this says where they are already.
        tokens_BT = jax.reshard(jnp.asarray(tokens_BT), RULES.tokens_BT)
        given_BT = jnp.zeros_like(tokens_BT) if segments_BT is None else jnp.asarray(segments_BT)
        chex.assert_equal_shape([tokens_BT, given_BT])
        own_BT = jax.reshard(given_BT, RULES.tokens_BT)
        if not isinstance(self.trunk, Trunk):
            raise ConfigError("This model is laid out for decoding. Load the run without decoding_only=True.")
        x_BTD, taps = self.trunk(self.embed(tokens_BT), own_BT, self.head.taps if layers is None else layers)
        return self.seen(x_BTD, tokens_BT, taps, own_BT)

    def seen(self, x_BTD: Array, tokens_BT: Array, taps: Any = (), segments_BT: Array | None = None) -> Seen:
        """What a head is given: hidden states, and how this model embeds and unembeds."""
        unembed_VD = None if self.unembed_VD is None else self.unembed_VD[...]
        return Seen(x_BTD, tokens_BT, segments_BT, taps, self.embed, unembed_VD)

    def loss(
        self,
        batch: dict[str, Array],
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
        *,
        own: bool = True,
    ) -> tuple[Array, Aux]:
        """The training loss of a batch in nats, and sums to report; `Head.loss` says what the arguments are. With
        hidden states in the batch, `x_BTD`, the trunk is not run. With `normaliser_BT` beside them the target's law is
        normalised.

        With target `ntp` the next-token loss is added with `ntp_weight`, and is `loss_first_token`; not if `own` is
        False, for a model that stays as it is.
        """
        tokens_BT, segments_BT, targets_BTW = (batch[name] for name in ("tokens_BT", "segments_BT", "targets_BTW"))
        if "x_BTD" in batch:  # and the taps behind them, in one array
            x_BTD, *taps = jnp.split(batch["x_BTD"].astype(self.config.dtype), 1 + len(self.head.taps), axis=-1)
            seen = self.seen(x_BTD, tokens_BT, tuple(taps), segments_BT)
            seen = dataclasses.replace(seen, normaliser_BT=batch.get("normaliser_BT"))
        else:
            seen = self.see(tokens_BT, segments_BT)
        loss, aux = self.head.loss(seen, targets_BTW, weights_BTW, key, law_weights_BTW)
        config = self.head.config
        if config.target == "marginal":
            return loss, {**aux, "loss_first_token": aux["loss_offset"][0]}
        if not own:
            return loss, aux
        params, latent_BT1 = {"unembed_VD": seen.unembed_VD}, Independent.latent(seen.x_BTD)
        first = targets_BTW[..., :1], weights_BTW[..., :1]
        first_loss, nll_1 = mixture_loss(
            NextToken(),
            Terms(Independent, 1.0, config.z_weight, self.config.known),
            params,
            seen.x_BTD,
            latent_BT1,
            *first,
        )
        if aux["loss_offset"].shape[0] < config.window:  # the head leaves the first offset to the model
            aux = {**aux, "loss_offset": jnp.concatenate([nll_1, aux["loss_offset"]])}
        return loss + config.ntp_weight * first_loss, {**aux, "loss_first_token": nll_1[0]}

    def normaliser(self, x_BTD: Array, temperature: float) -> Array:
        """That of the model's own law at a temperature, the logarithm of the sum over the vocabulary of exp(logits /
        temperature): `[B, T]` in float32, in tiles of positions."""
        assert self.unembed_VD is not None
        form, params = NextToken(temperature=temperature), {"unembed_VD": self.unembed_VD[...]}
        anything_BT1 = jnp.zeros_like(x_BTD[..., :1], jnp.int32)
        _, lse_BT11 = factor_scores(form, params, x_BTD, anything_BT1, self.config.known)
        return lse_BT11[:, :, 0, 0]

    def next_token(self, x_BTD: Array) -> Array:
        """The model's own law of the next token: log-probabilities `[B, T, V]` in float32."""
        assert self.unembed_VD is not None
        logits_BT11V = NextToken().logits({"unembed_VD": gather(self.unembed_VD[...])}, x_BTD)
        return jax.nn.log_softmax(arrays.rule_out(logits_BT11V[:, :, 0, 0], self.config.known), axis=-1)

    def target(self, seen: Seen) -> tuple[Array, Any]:
        """The law of the next token that decoding preserves: log-probabilities `[B, T, V]` in float32.

        With it what the head has computed on the way, for `Head.extend` and `Head.begin`; None of the model's own law.
        """
        if self.head.config.target == "ntp":
            return self.next_token(seen.x_BTD), None
        return self.head.marginal(seen)


def in_dtype(model: LanguageModel, dtype: Literal["float32", "bfloat16"]) -> LanguageModel:
    """The same parameters in a model that computes in `dtype`."""
    copy = nnx.merge(*nnx.split(model))
    copy.config = dataclasses.replace(model.config, dtype=dtype, attention="xla")
    return copy
