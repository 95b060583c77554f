"""Pretrained model, as its files give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtp_jax.data.tokenizers import HFTokenizer
from mtp_jax.interop.weights import Read
from mtp_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Pretrained:
    """What an import reads.

    `what`: the source, for messages. `kind`: whose names the tensors have, `hf` or `gguf`. `shapes`: of all tensors.
    `dtype`: of the parameters. `read`: a part of a tensor. `ignored`: tensors that the config says too.
    """

    what: str
    kind: str
    model: ModelConfig
    tokenizer: HFTokenizer
    shapes: Mapping[str, Sequence[int]]
    dtype: str
    read: Read
    ignored: Sequence[str]
