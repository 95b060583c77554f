"""Export to Hugging Face: a Llama written here in NumPy, from its names and shapes alone, computes what we compute."""

import numpy as np
import pytest

from mtp_jax.interop import llama
from mtp_jax.model.config import RopeScaling
from mtp_jax.validate import ConfigError
from support import tiny

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
        logp_BTV = made.target(made.see(TOKENS_BT))[0]
        return llama.llama_config(config.model), llama.state_dict(made), np.asarray(logp_BTV)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def angles(config, time):
    half = config["head_dim"] // 2
    frequency = config["rope_theta"] ** (-np.arange(half) / half)
    if scaling := config["rope_scaling"]:
        wavelength = 2 * np.pi / frequency
        length, low, high = (
            scaling[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
        frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    return np.arange(time)[:, None] * frequency


def turn(x_BNTH, angle):
    a, b = np.split(x_BNTH, 2, -1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def reference(config, weights, tokens_BT):
    """Logits of a Llama, in float64."""
    (batch, time), eps, head_dim = tokens_BT.shape, config["rms_norm_eps"], config["head_dim"]
    x = weights["model.embed_tokens.weight"].astype(float)[tokens_BT]
    angle = angles(config, time)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = (
            linear(y, weights, f"{layer}.self_attn.{name}_proj").reshape(batch, time, -1, head_dim).swapaxes(1, 2)
            for name in "qkv"
        )
        groups = config["num_attention_heads"] // config["num_key_value_heads"]
        q, k, v = turn(q, angle), turn(k, angle).repeat(groups, 1), v.repeat(groups, 1)
        scores = np.where(np.tri(time, dtype=bool), q @ k.swapaxes(-1, -2) / np.sqrt(head_dim), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        y = (shares / shares.sum(-1, keepdims=True)) @ v
        x = x + linear(y.swapaxes(1, 2).reshape(batch, time, -1), weights, f"{layer}.self_attn.o_proj")
        y = norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = linear(y, weights, f"{layer}.mlp.gate_proj")
        y = gate / (1 + np.exp(-gate)) * linear(y, weights, f"{layer}.mlp.up_proj")
        x = x + linear(y, weights, f"{layer}.mlp.down_proj")
    return linear(norm(x, weights["model.norm.weight"], eps), weights, "lm_head")


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


def test_tied_embeddings_are_written_twice():
    _, weights, _ = exported(dict(tie_embeddings=True), ONE_TABLE["ntp"])
    np.testing.assert_array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_names_and_shapes_are_those_of_transformers():
    config, weights, _ = exported(TRUNKS["scaled"], ONE_TABLE["full"])
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
    assert config["eos_token_id"] is None, "or texts would end there"


@pytest.mark.parametrize(
    "model, head, words",
    [
        (
            {},
            dict(rank=3),
            r"target is marginal and head\.rank is 3: .* mixture of 3 softmaxes.*target ntp, or .*rank 1",
        ),
        (dict(qk_norm=True), dict(rank=1), r"qk_norm is True, and a Llama has no norms"),
    ],
)
def test_what_is_no_llama_is_refused(model, head, words):
    with pytest.raises(ConfigError, match=words):
        exported(model, head)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_transformers_computes_the_same(trunk):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, weights, logp_BTV = exported(TRUNKS[trunk], ONE_TABLE["ntp"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
    with torch.no_grad():
        found = model(torch.tensor(TOKENS_BT)).logits.log_softmax(-1).numpy()
    np.testing.assert_allclose(found, logp_BTV, atol=1e-4)
