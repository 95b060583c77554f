"""Config of the trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtp_jax.validate import at_least, positive, require, typed


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of rotary embeddings (`rope_type: llama3` in Hugging Face configs).

    A `factor` of 1 changes nothing; Llama 3.1 uses 8.
    """

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "factor", "original_context_length")
        positive(self, "low_freq_factor")
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"RopeScaling.high_freq_factor is {self.high_freq_factor} and low_freq_factor is {self.low_freq_factor}; "
            "the high one must be the larger (Llama 3 uses 4 and 1).",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The trunk: a Llama-style decoder.

    `vocab_size` may exceed the tokenizer's (a multiple of the tensor axis, say). The `num_tokens` lowest ids stand for
    something: those above have no probability, in training and in decoding alike. It is the tokenizer's, and filled in
    where a run begins.
    `context_length` is the most tokens that one sequence may hold, in training and in decoding.
    `dtype` is the compute dtype; logits and log-probabilities are float32 whatever it is. `param_dtype` is that of the
    parameters outside the head, which may be less only where nothing trains them: a pretrained model keeps its own.
    `remat` says what the backward pass recomputes: `none` only what lies between matrix products, `dots` attention too,
    `full` whole blocks.
    `attention` is how training attends: by XLA anywhere, or by cuDNN's flash attention on NVIDIA GPUs in bfloat16.
    """

    vocab_size: int = 264
    d_model: int = 256
    d_ff: int = 704
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    context_length: int = 1024
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["xla", "cudnn"] = "xla"
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "context_length")
        positive(self, "rope_theta", "norm_eps")
        require(
            self.num_tokens is None or 1 <= self.num_tokens <= self.vocab_size,
            f"ModelConfig.num_tokens is {self.num_tokens} and vocab_size is {self.vocab_size}; it is part of the "
            "vocabulary. Leave it out: it is the tokenizer's.",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"ModelConfig.num_heads is {self.num_heads} and num_kv_heads is {self.num_kv_heads}; every key/value head "
            "serves the same number of query heads, so the first must be a multiple of the second.",
        )
        require(
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            f"ModelConfig.d_model is {self.d_model} and num_heads is {self.num_heads}; heads must divide the width. "
            "Change one of them, or set head_dim.",
        )
        require(
            self.head_width % 2 == 0 and self.head_width > 0,
            f"ModelConfig.head_dim is {self.head_width}; rotary embeddings turn pairs: it must be even and positive.",
        )

        fits_cudnn = self.dtype == "bfloat16" and self.head_width % 8 == 0 and self.head_width <= 128
        require(
            self.attention == "xla" or fits_cudnn,
            f"ModelConfig.attention is cudnn, dtype is {self.dtype} and head_dim is {self.head_width}; cuDNN attends "
            "in bfloat16 with heads of a multiple of 8 up to 128. Change them, or set attention to xla.",
        )

    @property
    def known(self) -> int:
        """How many ids have a probability: those below."""
        return self.vocab_size if self.num_tokens is None else self.num_tokens

    @property
    def head_width(self) -> int:
        """Width of one attention head: `head_dim`, or `d_model / num_heads` where that is not given."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.num_heads
