"""Sequential head: a small module that is applied from offset to offset, fed with the token before.

With g_1 = h, the trunk's last hidden state, offset s has the law softmax(U g_s), g_s = f_s(g_{s-1}, e(x_{s-1})), and
offset 1 is the model's own. What others have done are cases of it: without attention Hydra (arXiv 2402.05109), with it
EAGLE (arXiv 2401.15077), the modules of DeepSeek-V3 (arXiv 2412.19437) and FastMTP (arXiv 2509.18362).

With attention a module is a transformer block. The query of position p at offset s sees the entries of offset 2 at the
positions up to p, which are made of hidden states and of tokens that were committed and are kept in a cache, and its
own entries of offsets 3 .. s: in training as in drafting, so what is trained is what drafts.

A head begins as the model's own law at every offset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtp_jax import arrays
from mtp_jax.heads.base import Aux, Head, Seen, with_own_first
from mtp_jax.heads.circuits import Independent
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.encoder import TokenEncoder
from mtp_jax.heads.mixture import against_target, target_law
from mtp_jax.heads.shortlist import SHORT, Shortlist, columns
from mtp_jax.heads.stages import block_flops, silent_block, stacked, stage, unstacked
from mtp_jax.losses.mixture import Terms, factor_scores, mixture_loss, mixture_loss_against
from mtp_jax.losses.next_token import EachToken, NextToken
from mtp_jax.model.attention import attend_chain, cache_mask, causal_mask
from mtp_jax.model.cache import Cache, init_cache, read, write
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.layers import RMSNorm, linear
from mtp_jax.model.rotary import Rotary, rotary
from mtp_jax.parameters import init_full
from mtp_jax.sharding import gather
from mtp_jax.validate import require

Entry = tuple[Array, Array]  # the keys and values of one position, each [B, T, K, H]


class BlockModule(nnx.Module):
    """A transformer block over z = g + J [norm g; norm e(y)], of the model's own shape. It begins as g alone."""

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d = model.d_model
        self.hidden_norm, self.token_norm = RMSNorm(d, model.norm_eps), RMSNorm(d, model.norm_eps)
        self.join_CD = init_full("join_CD", (2 * d, d))
        self.block = silent_block(model, rngs=rngs)

    def join(self, g_BTD: Array, token_BTD: Array) -> Array:
        """z `[B, T, D]`, from what was there and the embeddings of the tokens behind it."""
        both_BTC = jnp.concatenate([self.hidden_norm(g_BTD), self.token_norm(token_BTD)], axis=-1)
        return g_BTD + linear(both_BTC, self.join_CD[...])

    def entry(self, z_BTD: Array, rope: Rotary) -> tuple[Array, Entry]:
        """The queries of z, and its keys and values."""
        q_BTNH, k_BTKH, v_BTKH = self.block.attention.project(self.block.attention_norm(z_BTD), rope)
        return q_BTNH, (k_BTKH, v_BTKH)

    def finish(self, z_BTD: Array, y_BTNH: Array) -> Array:
        """The block's output, given what its queries attended to."""
        z_BTD = z_BTD + linear(y_BTNH, self.block.attention.wo_NHD[...])
        return z_BTD + self.block.feed_forward(self.block.feed_forward_norm(z_BTD))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """A draft of each row, `offset` tokens of which are known: g `[B, T, D]` of the next offset; what modules read of
    each offset from the third on (z), and its keys and values by module."""

    g_BTD: Array
    offset: int = dataclasses.field(metadata={"static": True})
    z: tuple[Array, ...] = ()
    entries: tuple[tuple[Entry, ...], ...] = ()


@dataclass(frozen=True)
class Drafting:
    """A chain in decoding, and what all its steps read: `past` is the cache, of which `mask_B1TS` says what is seen."""

    chain: Chain
    embed: Callable[[Array], Array]
    table_VD: Any
    position_BT: Any
    past: Cache
    mask_B1TS: Any


class SequentialHead(Head):
    """q(x_s | x_<s) = softmax(U g_s): the head of this file."""

    shortlists = True
    learns_law = True
    modular = True
    leaves_first = True

    def __init__(self, config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        make = BlockModule if config.attention else TokenEncoder
        self.count = config.window - 1 if config.per_offset else 1
        self.stages: Any = stacked(lambda rngs: make(config, model, rngs=rngs), self.count, rngs)
        self.shortlist = Shortlist(config.shortlist, model, 0) if config.shortlist else None
        self.model_config, self.known = model, model.known

    @classmethod
    def check(cls, config: HeadConfig) -> None:
        """Refuse a window of the next token alone, a target of the head's own, and what belongs to mixtures."""
        super().check(config)
        require(
            config.window > 1,
            f"HeadConfig.window is {config.window} and kind is sequential, whose first offset is the model's own; set "
            "window to 2 or more.",
        )
        require(
            config.loss_fraction == 1,
            f"HeadConfig.loss_fraction is {config.loss_fraction} and kind is sequential, which has the loss at every "
            "position; set it to 1.",
        )

    @classmethod
    def describe(cls, config: HeadConfig) -> str:
        """Whether it attends, and how many modules there are."""
        what = "blocks with attention" if config.attention else "modules without attention"
        return f"sequential, W = {config.window}, {what}, {'one per offset' if config.per_offset else 'one for all'}"

    @property
    def reads_table(self) -> bool:
        """All its laws go through the model's vocabulary table."""
        return True

    @property
    def has_cache(self) -> bool:
        """Where it attends."""
        return self.config.attention

    def unstack(self, unembed_VD: Any) -> None:
        """Give each module its own arrays, and make the rows of the listed tokens once, for decoding."""
        self.stages = unstacked(self.stages, self.count)
        if self.shortlist:
            self.short_unembed_VD = nnx.Param(self.shortlist.rows(unembed_VD))
            self.shortlist.unstack()

    def _table(self, unembed_VD: Any) -> dict[str, Any]:
        """The table of the drafts, by the name that it has in the loss."""
        if self.shortlist is None:
            return {"unembed_VD": unembed_VD}
        made = self.short_unembed_VD[...] if hasattr(self, f"{SHORT}unembed_VD") else self.shortlist.rows(unembed_VD)
        return {f"{SHORT}unembed_VD": made}

    # The recursion, the same in training and in drafting.

    def _step(self, chain: Chain, token_BTD: Array, position_BT: Any, past: Cache, mask_B1TS: Any) -> Chain:
        """One offset more, given the embeddings of the tokens at the last one."""
        offset = chain.offset + 1
        index = offset - 2 if self.config.per_offset else 0
        module = stage(self.stages, index)
        if not self.config.attention:
            return Chain(module(chain.g_BTD, token_BTD), offset)
        z_BTD = module.join(chain.g_BTD, token_BTD)
        if offset == 2:  # its entry is in the past already
            q_BTNH, _ = module.entry(z_BTD, rotary(self.model_config, position_BT))
            y_BTNH = attend_chain(q_BTNH, past[index], mask_B1TS, ())
            return Chain(module.finish(z_BTD, y_BTNH), offset, (), ((),) * self.count)
        z, own = (*chain.z, z_BTD), list(chain.entries[index])
        q_BTNH: Any = None
        for i in range(len(own), len(z)):
            q_BTNH, entry = module.entry(z[i], rotary(self.model_config, position_BT + 1 + i))
            own.append(entry)
        entries = (*chain.entries[:index], tuple(own), *chain.entries[index + 1 :])
        y_BTNH = attend_chain(q_BTNH, past[index], mask_B1TS, tuple(own))
        return Chain(module.finish(z_BTD, y_BTNH), offset, z, entries)

    def _past(self, seen: Seen, next_BT: Array, position_BT: Array) -> list[Entry]:
        """The entries of offset 2 by module, each `[B, T, K, H]`."""
        token_BTD, rope = seen.embed(next_BT), rotary(self.model_config, position_BT)
        modules = (stage(self.stages, i) for i in range(self.count))
        return [module.entry(module.join(seen.x_BTD, token_BTD), rope)[1] for module in modules]

    # Training.

    def _stream(self, seen: Seen, targets_BTW: Array) -> Iterator[Array]:
        """g of each offset from 2 on, `[B, T, D]`, given the tokens before it."""
        tokens_BT = seen.tokens_BT
        position_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        past: Cache = []
        mask_B1TS = None
        if self.config.attention:
            segments_BT = jnp.zeros_like(tokens_BT) if seen.segments_BT is None else seen.segments_BT
            mask_B1TS = causal_mask(segments_BT)
            entries = self._past(seen, targets_BTW[..., 0], position_BT)
            past = [(jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)) for k_BTKH, v_BTKH in entries]
        chain = Chain(seen.x_BTD, 1)
        for s in range(1, self.config.window):
            # Of each step its arguments are kept, not the scores of its attention.
            step = jax.checkpoint(lambda chain, token: self._step(chain, token, position_BT, past, mask_B1TS))
            chain = step(chain, seen.embed(targets_BTW[..., s - 1]))
            yield chain.g_BTD

    def loss(
        self,
        seen: Seen,
        targets_BTW: Array,
        weights_BTW: Array,
        key: Array | None = None,
        law_weights_BTW: Array | None = None,
    ) -> tuple[Array, Aux]:
        """That of the offsets from 2 on, as a mixture behind an encoder reports it; the next-token loss is the
        model's."""
        config = self.config
        columns_BTL, listed_BTL = columns(self.shortlist, targets_BTW[..., 1:])  # L: the later offsets
        params = self._table(seen.unembed_VD)
        (name,) = params
        weights = jnp.where(listed_BTL, weights_BTW[..., 1:], 0.0)
        against = against_target(config, (name,))
        g_BTLD = jnp.stack([*self._stream(seen, targets_BTW)], axis=2)
        terms = Terms(Independent, config.gamma, config.z_weight, self.known, 1, config.nll_weight, against)
        form: Any = EachToken(name)
        batch = params, g_BTLD, Independent.latent(seen.x_BTD), columns_BTL, weights
        if against:
            later = None if law_weights_BTW is None else law_weights_BTW[..., 1:]
            law = target_law(against, params, seen, listed_BTL, later)
            total, aux = mixture_loss_against(form, terms, *batch, law)
            if self.shortlist:
                aux["listed_before"] = jnp.sum(law.weights_BTW, axis=(0, 1))
        else:
            total, nll_L = mixture_loss(form, terms, *batch)
            aux = {"loss_offset": nll_L}
        if self.shortlist:
            aux["listed"] = jnp.sum(weights, axis=(0, 1))
        return total, with_own_first(aux, weights_BTW, law_weights_BTW)

    def log_likelihood(self, seen: Seen, targets_BTW: Array) -> Array:
        """log q(x_s | x_<s), `[B, T, W]` in nats; the first is the model's own. -inf from the first target on that is
        not listed."""
        columns_BTL, listed_BTL = columns(self.shortlist, targets_BTW[..., 1:])
        params = self._table(seen.unembed_VD)
        (name,) = params
        own = {"unembed_VD": seen.unembed_VD}
        first_BT11, _ = factor_scores(NextToken(), own, seen.x_BTD, targets_BTW[..., :1], self.known)
        g_BTLD = jnp.stack([*self._stream(seen, targets_BTW)], axis=2)
        scores_BT1L, _ = factor_scores(EachToken(name), params, g_BTLD, columns_BTL, self.known)
        later_BTL = jnp.where(listed_BTL, scores_BT1L[:, :, 0], -jnp.inf)
        return jnp.concatenate([first_BT11[:, :, 0], later_BTL], axis=-1)

    # Drafting.

    def init_cache(self, batch: int, slots: int) -> Any:
        """Keys and values of offset 2, of each module."""
        if not self.config.attention:
            return ()
        return init_cache(dataclasses.replace(self.model_config, num_layers=self.count), batch, slots)

    def extend(self, cache: Any, seen: Seen, next_BT: Array, start_B: Array, memo: Any) -> tuple[Any, Any]:
        """Write the entries of offset 2."""
        if not self.config.attention:
            return cache, memo
        position_BT = start_B[:, None] + jnp.arange(next_BT.shape[1], dtype=jnp.int32)[None]
        entries = self._past(seen, next_BT, position_BT)
        old_and_new = zip(cache, entries, strict=True)
        return [(write(k, new_k, start_B), write(v, new_v, start_B)) for (k, v), (new_k, new_v) in old_and_new], memo

    def begin(
        self,
        seen: Seen,
        token_B: Array,
        *,
        window: int,
        cache: Any = (),
        position_B: Array | None = None,
        memo: Any = None,
    ) -> Drafting:
        """The law of offset 2, given the token at the first."""
        position_BT, mask_B1TS = None, None
        if self.config.attention:
            assert position_B is not None
            position_BT = position_B[:, None]
            cache, mask_B1TS = [read(layer) for layer in cache], cache_mask(position_BT, cache[0][0].shape[2])
        (table_VD,) = self._table(seen.unembed_VD).values()
        none = Drafting(Chain(seen.x_BTD, 1), seen.embed, table_VD, position_BT, cache, mask_B1TS)
        return self.condition(none, token_B)

    def next_log_probs(self, draft: Drafting) -> Array:
        """`[B, V]`, through the table."""
        logq_Bn, shortlist = self.next_listed(draft)
        return shortlist.spread(logq_Bn) if shortlist else logq_Bn

    def next_listed(self, draft: Drafting) -> tuple[Array, Shortlist | None]:
        """The same of the listed tokens."""
        tables = {"unembed_VD": jax.tree.map(gather, draft.table_VD)}
        logits_BV = NextToken().logits(tables, draft.chain.g_BTD)[:, 0, 0, 0]
        return jax.nn.log_softmax(arrays.rule_out(logits_BV, self.known), axis=-1), self.shortlist

    def condition(self, draft: Drafting, token_B: Array) -> Drafting:
        """The law of what follows, after one more token is known."""
        if draft.chain.offset >= self.config.window:
            return draft  # nothing follows
        token_BTD = draft.embed(token_B[:, None])
        chain = self._step(draft.chain, token_BTD, draft.position_BT, draft.past, draft.mask_B1TS)
        return dataclasses.replace(draft, chain=chain)

    @classmethod
    def flops(cls, config: HeadConfig, model: ModelConfig, frozen: bool) -> tuple[float, float]:
        """Of W - 1 steps of a module, and of as many products with the table."""
        steps, d = config.window - 1, model.d_model
        block = 4 * d * d + block_flops(model) if config.attention else TokenEncoder.flops(config, model)
        table = 2 * (config.shortlist or model.vocab_size) * d
        law = 2 * d * (model.vocab_size + config.shortlist) if config.against_target else 0  # of a position once
        return steps * (block + table) + law, steps * (2 * block + (1 if frozen else 2) * table)
