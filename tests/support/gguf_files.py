"""GGUF files as the converters of llama.cpp write them, by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.interop.weights import WEIGHTS
from support.pretrained import CONFIG

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
INTERLEAVED = ("attn_q.weight", "attn_k.weight")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a file: `model` is gpt2 (byte-level BPE, cut by `pre`) or llama (SentencePiece)."""

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    model: str = "gpt2"
    pre: str = "smollm"
    ids: Mapping[str, int | bool] = field(default_factory=dict)


def letters(pre: str = "smollm") -> Vocabulary:
    """Bytes, two tokens that end something and one that begins a text: those of `support.pretrained`."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|end|>", "<s>"]
    ids = dict(bos_token_id=258, eos_token_id=257, add_bos_token=True)
    return Vocabulary(tokens, [NORMAL] * 256 + [CONTROL] * 3, pre=pre, ids=ids)


def write_gguf(
    path: Path,
    weights: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] = CONFIG,
    kind: str = "llama",
    vocabulary: Vocabulary | None = None,
    quantised: Any = None,
    blocks: Callable[[np.ndarray, Any], np.ndarray] | None = None,
    template: str = TEMPLATE,
    more: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a file of these weights, named as at Hugging Face; rotary pairs lie side by side for `llama`.

    `quantised`: the type of the matrices, of which `blocks` makes the bytes, by default as the package does. `more`:
    fields in place of, or next to, those of the config; `without`: those that are left out. `tensors`: more of them, by
    their names there.
    """
    import gguf

    vocab = vocabulary or letters()
    values: dict[str, Any] = {
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.key_length": config["head_dim"],
        f"{kind}.rope.dimension_count": config["head_dim"],
        f"{kind}.rope.freq_base": float(config["rope_theta"]),
        f"{kind}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "tokenizer.ggml.model": vocab.model,
        "tokenizer.ggml.pre": vocab.pre if vocab.model == "gpt2" else "default",
        "tokenizer.ggml.tokens": list(vocab.tokens),
        "tokenizer.ggml.token_type": list(vocab.types),
        "tokenizer.ggml.merges": list(vocab.merges),
        "tokenizer.ggml.scores": list(vocab.scores),
        **{f"tokenizer.ggml.{name}": value for name, value in vocab.ids.items()},
        "tokenizer.chat_template": template,
        **(more or {}),
    }
    writer = gguf.GGUFWriter(str(path), kind)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in values.items():
        if name not in without and value not in ([], ""):
            add.get(type(value), writer.add_array)(name, value)
    names = {weight.hf.format(i): weight.gguf.format(i) for weight in WEIGHTS for i in range(99)}
    for name, array in weights.items():
        if kind == "llama" and names[name].endswith(INTERLEAVED):
            heads = array.shape[0] // config["head_dim"]
            array = array.reshape(heads, 2, config["head_dim"] // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if quantised is not None and array.ndim == 2:
            writer.add_tensor(names[name], (blocks or gguf.quants.quantize)(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(names[name], np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
