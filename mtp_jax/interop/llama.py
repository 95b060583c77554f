"""Llama of Hugging Face `transformers`: the config and the weights, by name, of a trunk with its target.

Only NumPy is needed here. `transformers` keeps a linear layer as (outputs, inputs), and turns the pairs (i, i + H/2) of
rotary embeddings, as we do, so that no head is permuted.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.heads.config import HeadConfig
from mtp_jax.language_model import LanguageModel
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.transformer import Trunk
from mtp_jax.validate import require


def check_exportable(model: ModelConfig, head: HeadConfig) -> None:
    """Raise `ConfigError` unless the trunk is a Llama and the target's logits are one table times the hidden state."""
    require(
        head.target == "ntp" or head.rank == 1,
        f"head.target is {head.target} and head.rank is {head.rank}: the target is a mixture of {head.rank} softmaxes, "
        "and a Llama has one table. Export a model with head.target ntp, or with head.rank 1.",
    )
    require(
        not model.qk_norm,
        "model.qk_norm is True, and a Llama has no norms of queries and keys. Export a model without them.",
    )


def llama_config(model: ModelConfig) -> dict[str, Any]:
    """The arguments of `transformers.LlamaConfig`. No token ends a text there."""
    scaling = model.rope_scaling
    rope = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if scaling.factor != 1 else None,
        "attention_bias": model.qkv_bias,
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def state_dict(model: LanguageModel) -> dict[str, np.ndarray]:
    """The weights of `transformers.LlamaForCausalLM` by name, in float32. The mesh of `model` is in scope.

    Args:
      model: one as training has it, its layers stacked.

    Raises:
      ConfigError: as `check_exportable`.
    """
    check_exportable(model.config, model.head.config)
    assert isinstance(model.trunk, Trunk), "export the model as it was loaded, not as decoding lays it out"
    config, layers, blocks = model.config, model.config.num_layers, model.trunk.blocks
    attention, feed_forward = blocks.attention, blocks.feed_forward
    matrices = {  # with the number of their inputs
        "self_attn.q_proj": (attention.wq_DNH, config.d_model),
        "self_attn.k_proj": (attention.wk_DKH, config.d_model),
        "self_attn.v_proj": (attention.wv_DKH, config.d_model),
        "self_attn.o_proj": (attention.wo_NHD, config.num_heads * config.head_width),
        "mlp.gate_proj": (feed_forward.w_gate_DF, config.d_model),
        "mlp.up_proj": (feed_forward.w_up_DF, config.d_model),
        "mlp.down_proj": (feed_forward.w_down_FD, config.d_ff),
    }
    stacked: dict[str, np.ndarray] = {
        f"{name}.weight": _host(weight).reshape(layers, inputs, -1).swapaxes(1, 2)
        for name, (weight, inputs) in matrices.items()
    }
    stacked["input_layernorm.weight"] = _host(blocks.attention_norm.scale)
    stacked["post_attention_layernorm.weight"] = _host(blocks.feed_forward_norm.scale)
    if config.qkv_bias:
        for name, bias in {"q": attention.bq_NH, "k": attention.bk_KH, "v": attention.bv_KH}.items():
            stacked[f"self_attn.{name}_proj.bias"] = _host(bias).reshape(layers, -1)
        # The same switch of theirs gives the output a bias.
        stacked["self_attn.o_proj.bias"] = np.zeros((layers, config.d_model), np.float32)
    found = {f"model.layers.{i}.{name}": weight[i] for name, weight in stacked.items() for i in range(layers)}
    found["model.embed_tokens.weight"] = _host(model.unembed_VD if model.embed_VD is None else model.embed_VD)
    return found | {"model.norm.weight": _host(model.trunk.norm.scale), "lm_head.weight": _table(model)}


def _host(weight: Any) -> np.ndarray:
    return np.asarray(weight[...], np.float32)


def _table(model: LanguageModel) -> np.ndarray:
    """The target's table `[V, D]`."""
    if model.head.config.target == "ntp":
        return _host(model.unembed_VD)
    # Whatever the factors are, with one component logits are linear: those of the unit vectors are the table.
    unit_1DD, none_1D = jnp.eye(model.config.d_model)[None], jnp.zeros((1, model.config.d_model), jnp.int32)
    logits = jax.jit(lambda model, *seen: model.head.logits(model.seen(*seen), stop=1)[0])
    return np.asarray(logits(model, unit_1DD, none_1D))[0, :, 0].T  # of [1, D, R, V]
