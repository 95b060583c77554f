"""A pretrained model as others publish it: a Hugging Face directory of random weights, small enough to write."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from mtp_jax.language_model import in_dtype
from mtp_jax.runs.loading import LoadedRun
from support import REPOSITORY

D, F, V, N, K, H, L = 16, 24, 259, 4, 2, 6, 2
CONFIG = dict(
    model_type="llama", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
    num_key_value_heads=K, head_dim=H, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=5e3, rope_scaling=None,
    tie_word_embeddings=False, hidden_act="silu", attention_bias=False, eos_token_id=[256, 257], bos_token_id=258,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
FAMILIES = {
    "llama": {},
    "tied": dict(tie_word_embeddings=True),
    "one key head": dict(num_key_value_heads=1),
    "llama3": dict(rope_scaling={**LLAMA3, "original_max_position_embeddings": 32}),
    "linear": dict(rope_scaling=dict(type="linear", factor=2.0)),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2", use_sliding_window=False, sliding_window=32),
    "qwen3": dict(model_type="qwen3"),
}


def weights_of(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by the names at Hugging Face."""
    rng = np.random.default_rng(seed)
    d, f, v, width = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = {
        "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (kv, d), "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f),
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
    }  # fmt: skip
    if config["model_type"] == "qwen2":
        shapes |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
    if config["model_type"] == "qwen3":
        shapes |= {f"self_attn.{n}_norm.weight": (width,) for n in "qk"}
    named = {f"model.layers.{i}.{n}": shape for i in range(config["num_hidden_layers"]) for n, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    named |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (v, d)}
    return {
        name: (("norm" in name) + 0.4 * rng.standard_normal(shape)).astype("float32") for name, shape in named.items()
    }


def write_tokenizer(directory: Path, *, begins: bool = True) -> None:
    """Bytes, two tokens that end something and one that begins a text, if `begins`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|end|>", "<s>")])
    if begins:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    tok.save(str(directory / "tokenizer.json"))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def in_float32(run: LoadedRun) -> LoadedRun:
    """The same run, computing in float32 whatever its parameters are kept in."""
    return dataclasses.replace(run, model=in_dtype(run.model, "float32"))


def write(
    directory: Path,
    dtype: Any = "float32",
    *,
    embedding: float = 1.0,
    weights: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> tuple[Path, dict[str, Any], dict[str, np.ndarray]]:
    """Write one, of these weights or of random ones, and return it with its config and weights. `embedding` scales what
    tokens embed as.
    """
    from safetensors.numpy import save_file

    config = {**CONFIG, **changes}
    directory.mkdir()
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)
    weights = {name: array.astype(dtype) for name, array in (weights or weights_of(config)).items()}
    weights["model.embed_tokens.weight"] *= np.asarray(embedding, dtype)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    values = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    write_tokenizer(directory)
    return directory, config, weights


def law(run: LoadedRun, tokens_BT: np.ndarray) -> np.ndarray:
    """Log-probabilities `[B, T, V]` of the next token after each, over the ids that stand for something."""
    with jax.set_mesh(run.mesh):
        return np.asarray(jax.jit(lambda model, t: model.target(model.see(t))[0])(run.model, tokens_BT))[..., :V]


def published(variable: str, default: str = "") -> Path:
    """The directory of a model of others: what the environment variable says, or `default` beside the repository. A
    test that asks for one is skipped where it is not.
    """
    named = os.environ.get(variable)
    path = Path(named) if named else REPOSITORY.parent / default
    if not (named or default) or not path.is_dir():
        pytest.skip(f"the model is not here; ${variable} names its directory")
    return path


def stories() -> Path:
    """A Llama of 260,000 parameters that was trained on stories."""
    return published("MTP_JAX_TEST_STORIES", "shared/data/stories260K")
