"""A Llama in NumPy, in float64, from its names and shapes at Hugging Face alone: Qwen's biases and norms too."""

from __future__ import annotations

import numpy as np


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def angles(config, time):
    half = config["head_dim"] // 2
    frequency = config["rope_theta"] ** (-np.arange(half) / half)
    scaling = config["rope_scaling"]
    if scaling and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling:
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
        for name in "qk":
            if f"{layer}.self_attn.{name}_norm.weight" in weights:
                heads = norm(q if name == "q" else k, weights[f"{layer}.self_attn.{name}_norm.weight"], eps)
                q, k = (heads, k) if name == "q" else (q, heads)
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
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    return linear(norm(x, weights["model.norm.weight"], eps), tied | weights, "lm_head")
