"""GGUF files of Llama and Qwen models: their config, weights and tokenizer, dequantised."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.data.tokenizers import HFTokenizer
from mtp_jax.data.tokenizers.conventions import Conventions
from mtp_jax.interop.hf import linear_scaling
from mtp_jax.interop.pretrained import Pretrained
from mtp_jax.interop.weights import WEIGHTS, common_dtype
from mtp_jax.model.config import ModelConfig, RopeScaling
from mtp_jax.model.rotary import frequencies
from mtp_jax.validate import ConfigError, require

FAMILIES = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}  # bias of q, k, v; norms of q, k
INTERLEAVED = ("llama",)  # rotary pairs of q and k lie side by side
KEPT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # whatever is quantised becomes float32
FREQUENCIES = "rope_freqs.weight"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5  # types of tokens
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": WORDS % r"\p{N}{1,3}", "qwen2": WORDS % r"\p{N}"}


def open_gguf(path: Path) -> Pretrained:
    """The model of a GGUF file.

    Raises `ConfigError` on what we do not compute, with the field, its value and what is allowed, on a file that is cut
    short, and where the package is missing.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ModuleNotFoundError as error:
        raise ConfigError("A GGUF file needs the package gguf: pip install 'mtp_jax[gguf]'.") from error
    require(path.is_file(), f"There is no file {path}.")
    try:
        reader = GGUFReader(str(path))
        meta: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # whatever its parser stumbles over
        raise ConfigError(f"{path} is damaged or cut short ({error}). Get it again.") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind: Any = meta.get("general.architecture")
    require(
        kind in FAMILIES,
        f"{path}: general.architecture is {kind!r}; what can be imported has one of {', '.join(FAMILIES)}.",
    )
    parts = meta.get("split.count", 1)
    require(
        parts <= 1,
        f"{path}: split.count is {parts}; what can be imported is one file: llama-gguf-split --merge makes it of its "
        "parts.",
    )
    # NumPy's order of axes is that of Hugging Face.
    shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in tensors.items()}
    model = _config(meta, kind, shapes, path)
    if FREQUENCIES in tensors:
        model = _scaled(model, np.asarray(tensors[FREQUENCIES].data, np.float64), path)
    turned = {weight.gguf.partition("{}")[2] for weight in WEIGHTS if weight.pairs}

    @functools.lru_cache(maxsize=1)
    def whole(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = (
            tensor.data if tensor.tensor_type.name in ("F32", "F16") else dequantize(tensor.data, tensor.tensor_type)
        )
        array = np.asarray(array).reshape(shapes[name])
        if kind in INTERLEAVED and name.endswith(tuple(turned)) and not name.endswith("_norm.weight"):
            heads = array.shape[0] // model.head_width
            return array.reshape(heads, model.head_width // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
        return array

    def read(name: str, rows: slice, columns: slice) -> np.ndarray:
        array = whole(name)
        return array[rows, columns] if array.ndim == 2 else array[rows]

    matrices = {
        KEPT.get(tensors[name].tensor_type.name, "float32") for name, shape in shapes.items() if len(shape) == 2
    }
    dtype = common_dtype(matrices, (whole(name) for name in shapes if name.endswith(".bias")))
    tokenizer = _tokenizer(meta, path)
    return Pretrained(
        str(path), "gguf", model, tokenizer, shapes, dtype, read, [FREQUENCIES] * (FREQUENCIES in tensors)
    )


def _value(meta: dict[str, Any], name: str, path: Path, default: Any = None) -> Any:
    value = meta.get(name, default)
    require(value is not None, f"{path} has no {name}. Get the file again, or another one of the model.")
    return value


def _config(meta: dict[str, Any], kind: str, shapes: dict[str, tuple[int, ...]], path: Path) -> ModelConfig:
    def get(name: str, default: Any = None) -> Any:
        return _value(meta, f"{kind}.{name}", path, default)

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    turned = get("rope.dimension_count", head_dim)
    require(
        turned == head_dim,
        f"{path}: {kind}.rope.dimension_count is {turned} and heads are {head_dim} wide; what can be imported turns "
        "all pairs of a head.",
    )

    def exact(value: float) -> float:
        return float(str(np.float32(value)))  # as it was written before it became float32

    for name in ("expert_count", "attention.sliding_window"):
        value = meta.get(f"{kind}.{name}")
        require(not value, f"{path}: {kind}.{name} is {value!r}; what can be imported has none.")
    scaling, kind_of_scaling = RopeScaling(), meta.get(f"{kind}.rope.scaling.type", "none")
    if kind_of_scaling == "linear":
        scaling = linear_scaling(exact(get("rope.scaling.factor")))
    require(
        kind_of_scaling in ("none", "linear"),
        f"{path}: {kind}.rope.scaling.type is {kind_of_scaling!r}; what can be imported has none or linear, or Llama's "
        f"own in the tensor {FREQUENCIES}.",
    )
    qkv_bias, qk_norm = FAMILIES[kind]
    return ModelConfig(
        vocab_size=shapes["token_embd.weight"][0],
        d_model=width,
        d_ff=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=get("context_length"),
        rope_theta=exact(get("rope.freq_base", 10_000.0)),
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie_embeddings="output.weight" not in shapes,
        norm_eps=exact(get("attention.layer_norm_rms_epsilon")),
        dtype="float32",
    )


def _scaled(model: ModelConfig, factors: np.ndarray, path: Path) -> ModelConfig:
    """The model with Llama's scaling, of which the file has what each frequency is divided by."""
    # All of Llama 3.1 to 3.3 have these.
    scaling = RopeScaling(float(np.max(factors)), 1.0, 4.0, 8192)
    found = dataclasses.replace(model, rope_scaling=scaling)
    same = np.allclose(frequencies(model) / frequencies(found), factors, rtol=1e-4)
    require(
        same, f"{path}: {FREQUENCIES} is not Llama 3's scaling by {scaling.factor:g}, which is what can be imported."
    )
    return found


def _tokenizer(meta: dict[str, Any], path: Path) -> HFTokenizer:
    """The tokenizer that the file describes, as one of Hugging Face, with its conventions."""
    from tokenizers import AddedToken, processors

    kind = meta.get("tokenizer.ggml.model")
    require(
        kind in ("gpt2", "llama"),
        f"{path}: tokenizer.ggml.model is {kind!r}; what can be imported has gpt2 or llama (SentencePiece).",
    )
    tokens, types = (list(_value(meta, f"tokenizer.ggml.{name}", path)) for name in ("tokens", "token_type"))
    used = max((i for i, of in enumerate(types) if of != UNUSED), default=0) + 1
    tokens, types = tokens[:used], types[:used]  # without the table's padding, which no tokenizer has
    tok = (_byte_level if kind == "gpt2" else _sentence_piece)(meta, tokens, types, path)
    tok.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, of in zip(tokens, types, strict=True)
            if of in (UNKNOWN, CONTROL)
        ]
    )
    tok.add_tokens([AddedToken(t, normalized=False) for t, of in zip(tokens, types, strict=True) if of == USER])
    ids: dict[str, Any] = {
        name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")
    }
    end = _value(meta, "tokenizer.ggml.eos_token_id", path)
    for name in ("bos", "eos"):
        require(
            ids[name] is None or ids[name] < len(tokens),
            f"{path}: tokenizer.ggml.{name}_token_id is {ids[name]} and there are {len(tokens)} tokens. Get the file "
            "again.",
        )
    ids = {name: i for name, i in ids.items() if i is not None and i < len(tokens)}  # converters write -1 for none
    # llama.cpp: SentencePiece models begin texts with BOS if nothing is said.
    bos = ids.get("bos") if meta.get("tokenizer.ggml.add_bos_token", kind == "llama") else None
    if bos is not None:  # for others who read an export
        text = tokens[bos]
        tok.post_processor = processors.TemplateProcessing(f"{text} $A", f"{text} $A $B", [(text, bos)])
    found = HFTokenizer(tok.to_str().encode(), tokens[end])
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}
    found.conventions = Conventions(
        bos,
        tuple(dict.fromkeys(ids[name] for name in ("eos", "eot") if name in ids)),
        meta.get("tokenizer.chat_template", ""),
        {text: tokens[ids[name]] for name, text in names.items() if name in ids},
    )
    return found


def _byte_level(meta: dict[str, Any], tokens: list[str], types: list[int], path: Path) -> Any:
    """GPT-2's kind: BPE over bytes, of words that `tokenizer.ggml.pre` says."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre, known = meta.get("tokenizer.ggml.pre"), (*SPLITS, "smollm")
    require(pre in known, f"{path}: tokenizer.ggml.pre is {pre!r}; what can be imported has one of {', '.join(known)}.")
    merges = [tuple(merge.split(" ")) for merge in meta.get("tokenizer.ggml.merges", ())]
    vocab = {token: i for i, token in enumerate(tokens)}
    tok: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    first = pre_tokenizers.Digits(individual_digits=True)
    if pre in SPLITS:
        first = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Sequence([first, level]), decoders.ByteLevel()
    if pre == "qwen2":
        tok.normalizer = normalizers.NFC()
    return tok


def _sentence_piece(meta: dict[str, Any], tokens: list[str], types: list[int], path: Path) -> Any:
    """SentencePiece's BPE, whose merges are found again from the scores of its pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((tokens[i] for i, of in enumerate(types) if of == UNKNOWN), None)
    scores = _value(meta, "tokenizer.ggml.scores", path)
    merges = _merges({token: i for token, i in vocab.items() if types[i] in (NORMAL, USER)}, scores)
    tok: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Prepend("\u2581")] * bool(prefix) + [normalizers.Replace(" ", "\u2581")]
    tok.normalizer = normalizers.Sequence(spaces)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * bool(prefix))
    return tok


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every way to put one of `vocab` together, the likeliest pieces first."""
    found = []
    for piece, index in vocab.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = sorted((p for p in pairs if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]]))
        found += [(-scores[index], pair) for pair in known]
    return [pair for _, pair in sorted(found, key=lambda one: one[0])]
