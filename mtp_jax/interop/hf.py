"""Hugging Face directories of Llama, Mistral and Qwen models: their config and safetensors, in and out."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from mtp_jax.interop.weights import Read, common_dtype
from mtp_jax.model.config import ModelConfig, RopeScaling
from mtp_jax.validate import ConfigError, require

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "generation_config.json", "chat_template.jinja")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FAMILIES = {  # model_type: (its class, whether q, k and v have a bias, whether q and k have norms)
    "llama": ("LlamaForCausalLM", False, False),
    "mistral": ("MistralForCausalLM", False, False),
    "qwen2": ("Qwen2ForCausalLM", True, False),
    "qwen3": ("Qwen3ForCausalLM", False, True),
}
SCALINGS = {  # rope_type: what it asks for
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Fields that change what a model computes, with the values of models that are as ours.
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "num_local_experts": (),
    "num_experts": (),
    "logit_scale": (1.0,),
    "partial_rotary_factor": (1.0,),
    "attention_multiplier": (),
    "residual_multiplier": (1.0,),
}


def model_config(values: Mapping[str, Any], what: str) -> ModelConfig:
    """The trunk that a `config.json` of Hugging Face describes, in float32.

    Raises `ConfigError` on what we do not compute, with the field, its value and what is allowed.
    """

    def refuse(field: str, value: Any, allowed: str) -> ConfigError:
        return ConfigError(f"{what}: {field} is {value!r}; what can be imported has {allowed}.")

    def count(field: str) -> int:
        found = values.get(field)
        require(found is not None, f"{what} has no {field}. Get the model's files again.")
        if type(found) is not int or found < 1:
            raise refuse(field, found, "an integer of at least 1")
        return found

    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise refuse("model_type", kind, f"one of {', '.join(FAMILIES)}")
    _, qkv_bias, qk_norm = FAMILIES[kind]
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    for field, allowed in PLAIN.items():
        value = rope.get(field, values.get(field))
        if value is not None and value not in allowed:
            raise refuse(field, value, " or ".join(map(repr, allowed)) or "none")
    # A Mistral has one if nothing is said, and Qwen's configs name one that they do not use.
    window = values.get("sliding_window", 4096 if kind == "mistral" else None)
    context = count("max_position_embeddings")
    if (
        window is not None
        and window < context
        and not (kind.startswith("qwen") and not values.get("use_sliding_window"))
    ):
        raise refuse("sliding_window", window, f"none, or at least max_position_embeddings ({context})")
    for layer in values.get("layer_types") or ():
        if layer != "full_attention":
            raise refuse("layer_types", layer, "full_attention alone")
    heads, width = count("num_attention_heads"), count("hidden_size")
    return ModelConfig(
        vocab_size=count("vocab_size"),
        d_model=width,
        d_ff=count("intermediate_size"),
        num_layers=count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        context_length=context,
        rope_theta=rope.get("rope_theta") or values.get("rope_theta", 10_000.0),
        rope_scaling=_scaling(rope, refuse, what),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie_embeddings=values.get("tie_word_embeddings", False),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        dtype="float32",
    )


def _scaling(rope: Mapping[str, Any], refuse: Any, what: str) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in SCALINGS:
        raise refuse("rope_scaling.rope_type", kind, "default, linear or llama3")
    missing = [name for name in SCALINGS[kind] if name not in rope]
    require(
        not missing, f"{what}: rope_scaling is {kind} and has no {', '.join(missing)}. Get the model's files again."
    )
    values = [rope[name] for name in SCALINGS[kind]]
    return linear_scaling(*values) if kind == "linear" else RopeScaling(*values)


def linear_scaling(factor: float) -> RopeScaling:
    """All frequencies divided by `factor`: no wavelength is as short as the one that Llama's scaling keeps."""
    return RopeScaling(factor, 1.0, 2.0, 1)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a trunk. The inverse of `model_config`, but for the vocabulary's padding."""
    kind = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}.get(
        (config.qkv_bias, config.qk_norm)
    )
    require(
        kind is not None,
        "model.qkv_bias and model.qk_norm are both True; no family of Hugging Face that we know has both.",
    )
    assert kind is not None
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling.factor != 1 and scaling == linear_scaling(scaling.factor):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling.factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return {
        "architectures": [FAMILIES[kind][0]],
        "model_type": kind,
        "vocab_size": config.known,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # for releases before 5
        "rope_scaling": None
        if rope["rope_type"] == "default"
        else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ConfigError` if it is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}). Get the model's files again.") from error
    require(isinstance(values, dict), f"{path} is no JSON object. Get the model's files again.")
    return values


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], str, Read]]:
    """The tensors of a model's safetensors files: shapes by name, their dtype, and a reader of their parts.

    Raises `ConfigError` if there are none, a file of the index is missing or cut short, or tensors are quantised.
    """
    from safetensors import SafetensorError, safe_open

    index = directory / INDEX
    listed: dict[str, str] = read_json(index).get("weight_map", {}) if index.exists() else {}
    files = sorted(set(listed.values())) if index.exists() else [WEIGHTS]
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    hint = f" {pickled[0]} is a pickle, which is not read: it can run code. Convert it." if pickled else ""
    for file in files:
        require((directory / file).is_file(), f"{directory} has no {file}.{hint or ' Get the model again.'}")
    with contextlib.ExitStack() as stack:
        opened: dict[str, Any] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(str(directory / file), framework="np"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{directory / file} is damaged or cut short ({error}). Get it again.") from error
            opened |= dict.fromkeys(handle.keys(), handle)
        gone = sorted(listed.keys() - opened.keys())
        require(
            not gone,
            f"{index} lists {', '.join(map(repr, gone[:1]))}, which is not in its file. Get the model's files again.",
        )
        slices = {name: handle.get_slice(name) for name, handle in opened.items()}
        dtypes = {name: piece.get_dtype() for name, piece in slices.items()}
        for name, dtype in dtypes.items():
            require(
                dtype in DTYPES,
                f"{directory}: {name} is {dtype}; what can be imported is {', '.join(DTYPES)}. A quantised model is "
                "imported from its GGUF file, or from the files that it was made of.",
            )

        def read(name: str, rows: slice, columns: slice) -> np.ndarray:
            piece = slices[name]
            return piece[rows, columns] if len(piece.get_shape()) == 2 else piece[rows]

        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        matrices = {DTYPES[dtypes[name]] for name, shape in shapes.items() if len(shape) == 2}
        every = slice(None)
        biases = (read(name, every, every) for name in shapes if name.endswith(".bias"))
        yield shapes, common_dtype(matrices, biases), read


class Tensor(NamedTuple):
    """A tensor that is to be written, and what makes it."""

    name: str
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def write_tensors(file: epath.Path, dtype: str, tensors: Sequence[Tensor]) -> None:
    """Write a safetensors file. Tensors of `dtype` are made and written one after another: the package wants all."""
    kind, size = next(name for name, ours in DTYPES.items() if ours == dtype), jnp.dtype(dtype).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in tensors:
        begin, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape, fetch in tensors:
            array = fetch()
            assert (array.shape, array.dtype.name) == (shape, dtype), name
            out.write(np.ascontiguousarray(array).view(np.uint8))
            del array  # before the next one is made
