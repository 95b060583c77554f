"""Export to Hugging Face: a Llama written here in NumPy, from its names and shapes alone, computes what we compute."""

import numpy as np
import pytest

from mtp_jax.interop.exporting import exported_config, state_dict
from mtp_jax.interop.hf import linear_scaling
from mtp_jax.model.config import RopeScaling
from mtp_jax.validate import ConfigError
from support import tiny
from support.llama import reference

TOKENS_BT = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 12))
ONE_TABLE = {
    "ntp": dict(target="ntp"),
    "full": dict(rank=1),
    "independent": dict(rank=1, circuit="independent"),
    "shared": dict(rank=1, factors="shared"),
    "lowrank": dict(rank=1, factors="lowrank"),
    "lora": dict(rank=1, factors="lora"),
}
TRUNKS = {
    "plain": {},
    "biased": dict(qkv_bias=True),
    "normed": dict(qk_norm=True),
    "linear": dict(rope_scaling=linear_scaling(3.0)),
    "scaled": dict(rope_scaling=RopeScaling(8.0, original_context_length=32), head_dim=6),
}


def exported(model=None, head=None):
    """(config, weights, our log-probabilities) of a random model, its vectors too."""
    config = tiny.train_config(tiny.model_config(**(model or {})), tiny.head_config(**(head or {})))
    with tiny.mesh():
        made = tiny.make_model(config)
        attention, noise = made.trunk.blocks.attention, np.random.default_rng(1)
        blocks = made.trunk.blocks
        vectors = [made.trunk.norm.scale, blocks.attention_norm.scale, blocks.feed_forward_norm.scale]
        if config.model.qkv_bias:
            vectors += [attention.bq_NH, attention.bk_KH, attention.bv_KH]
        for vector in vectors:
            vector[...] = vector[...] + 0.3 * noise.standard_normal(vector.shape).astype(np.float32)
        if config.model.qk_norm:
            for vector in (attention.q_norm.scale, attention.k_norm.scale):
                vector[...] = vector[...] + 0.3 * noise.standard_normal(vector.shape).astype(np.float32)
        logp_BTV = made.target(made.see(TOKENS_BT))[0]
        return exported_config(config.model, config.head), dict(state_dict(made)), np.asarray(logp_BTV)


@pytest.mark.parametrize("head", ONE_TABLE)
def test_every_target_of_one_table_is_that_of_the_llama(head):
    config, weights, logp_BTV = exported(head=ONE_TABLE[head])
    logits_BTV = reference(config, weights, TOKENS_BT)
    logits_BTV -= np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    np.testing.assert_allclose(logits_BTV, logp_BTV, atol=2e-5)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_is_the_llama(trunk):
    config, weights, logp_BTV = exported(TRUNKS[trunk], ONE_TABLE["ntp"])
    logits_BTV = reference(config, weights, TOKENS_BT)
    logits_BTV -= np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    np.testing.assert_allclose(logits_BTV, logp_BTV, atol=2e-5)


def test_tied_embeddings_are_written_once():
    config, weights, logp_BTV = exported(dict(tie_embeddings=True), ONE_TABLE["ntp"])
    assert config["tie_word_embeddings"] and "lm_head.weight" not in weights
    logits_BTV = reference(config, weights, TOKENS_BT)
    logits_BTV -= np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    np.testing.assert_allclose(logits_BTV, logp_BTV, atol=2e-5)


def test_names_and_shapes_are_those_of_transformers():
    _, weights, _ = exported(TRUNKS["scaled"], ONE_TABLE["full"])
    d, f, v, q, kv = 16, 32, tiny.VOCAB, 4 * 6, 2 * 6
    layer = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    assert {name: weight.shape for name, weight in weights.items()} == expected
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "model, head, words",
    [
        (
            {},
            dict(rank=3),
            r"target is marginal and head\.rank is 3: .* mixture of 3 softmaxes.*target ntp, or .*rank 1",
        ),
        (dict(qk_norm=True, qkv_bias=True), dict(rank=1), r"qkv_bias and model\.qk_norm are both True"),
    ],
)
def test_what_is_no_llama_is_refused(model, head, words):
    with pytest.raises(ConfigError, match=words):
        exported(model, head)
