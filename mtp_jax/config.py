"""Every number that a run needs, in frozen dataclasses that check themselves.

Importing this module imports neither JAX nor Flax, so a bad value is refused before anything expensive happens.
Every message names the field, the value found, the value allowed and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, the values and the way out."""


PREEMPTED = 75  # exit status; no unhandled signal gives it


class PreemptedError(RuntimeError):
    """SIGTERM, or a notice that the machine is taken away. What is saved is complete; the command exits with 75."""


def require(ok: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def each(value: Any) -> Sequence[Any]:
    """The values of a field that may have one for each row."""
    return value if hasattr(value, "__len__") else (value,)


# What many fields have in common. Each raises `ConfigError` with the field's name, its value and what is allowed.


def at_least(config: Any, least: float, *names: str) -> None:
    """Refuse a value of these fields that is less."""
    for name in names:
        for value in each(getattr(config, name)):
            require(value >= least, f"{type(config).__name__}.{name} is {value}; it must be at least {least}.")


def choices(config: Any) -> None:
    """Refuse a value that is not among those of a `Literal` field."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, allowed = getattr(config, name), typing.get_args(hint)
        require(
            typing.get_origin(hint) is not Literal or value in allowed,
            f"{type(config).__name__}.{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.",
        )


def positive(config: Any, *names: str) -> None:
    """Refuse a value of these fields that is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} is {value}; it must be positive.")


def fraction(config: Any, *names: str, closed: bool = True) -> None:
    """Refuse a value of these fields outside [0, 1], or [0, 1) if not `closed`."""
    for name in names:
        for value in each(getattr(config, name)):
            require(
                0 <= value < 1 or (closed and value == 1),
                f"{type(config).__name__}.{name} is {value}; it must lie in [0, 1{']' if closed else ')'}.",
            )


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

    `vocab_size` may exceed the tokenizer's (a multiple of the tensor axis, say); the ids above it are never targets.
    `context_length` is the most tokens that one sequence may hold, in training and in decoding.
    `dtype` is the compute dtype; parameters, logits and log-probabilities are float32 whatever it is.
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
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["xla", "cudnn"] = "xla"

    def __post_init__(self) -> None:
        choices(self)
        at_least(self, 1, "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "context_length")
        positive(self, "rope_theta", "norm_eps")
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
    def head_width(self) -> int:
        """Width of one attention head: `head_dim`, or `d_model / num_heads` where that is not given."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.num_heads


WITH_TABLE = "shared", "lowrank"  # factors that go through the one table of V x D


@dataclass(frozen=True)
class HeadConfig:
    """The distribution over the next `window` tokens (arXiv 2410.17765).

    The defaults are what the sweeps over bytes speak for (README, "Which head"). Where the vocabulary is larger than
    the model's width every table of V x D weighs, and `lowrank` has one for all offsets.

    `kind` names an entry of `mtp_jax.heads.HEADS`: `independent` is rank 1, `cpd` a mixture of `rank` products.
    `factors`: `full` has an unembedding per (rank, offset); `shared` a D x D map per (rank, offset) under one
    unembedding; `lowrank` a D x D map per offset plus a correction of width `factor_width` per rank; `lora` an
    unembedding per offset plus such a correction, for vocabularies below D.
    `target` is the law that decoding preserves: `marginal` is the head's own first-token marginal, `ntp` a separate
    next-token head whose cross-entropy is added with `ntp_weight`.
    Offset s is weighted by `gamma**(s-1)`; `z_weight` is on the mean square of the factors' log-normalisers. `balance`
    keeps components in use, with coefficient `balance_weight`.
    `init_noise` is how far the components differ at the start, relative to what they have in common: with 1 a
    correction of `lora` begins as large as what it corrects; `full` and `shared` ones were measured with 0.02.
    Two ways to train with less work, whose gradients are right on average: `loss_fraction` of the positions, drawn
    anew in every step, have the loss of the offsets; `backward_draws` components, drawn from the posterior for each
    position and offset, go through the backward pass (0: all of them, exactly; needs `shared` factors).
    With a `shortlist` the offsets after the first know those token ids alone. A number n stands for the n most frequent
    ones of the training data, which the run finds and writes down here (without data: the ids 0..n-1); two numbers or
    more are ids. 0: all ids.
    """

    kind: str = "cpd"
    window: int = 4
    rank: int = 8
    factors: Literal["full", "shared", "lowrank", "lora"] = "lora"
    factor_width: int = 16
    target: Literal["marginal", "ntp"] = "marginal"
    ntp_weight: float = 1.0
    gamma: float = 1.0
    z_weight: float = 0.0
    balance: Literal["none", "squared", "switch"] = "squared"
    balance_weight: float = 1.0
    init_noise: float = 1.0
    loss_fraction: float = 1.0
    backward_draws: int = 0
    shortlist: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        choices(self)
        if not isinstance(self.shortlist, int):
            object.__setattr__(self, "shortlist", tuple(self.shortlist))
        at_least(self, 1, "window", "rank", "factor_width")
        at_least(self, 0, "ntp_weight", "z_weight", "balance_weight", "init_noise", "backward_draws")
        require(
            self.kind != "independent" or self.rank == 1,
            f"HeadConfig.kind is independent and rank is {self.rank}; independent offsets have rank 1. "
            "Set rank to 1, or kind to cpd.",
        )
        for name in ("gamma", "loss_fraction"):
            value = getattr(self, name)
            require(0 < value <= 1, f"HeadConfig.{name} is {value}; it must lie in (0, 1].")
        require(
            not self.backward_draws or (self.factors == "shared" and not self.z_weight),
            f"HeadConfig.backward_draws is {self.backward_draws}, factors is {self.factors} and z_weight is "
            f"{self.z_weight}; components are drawn for shared factors without z-loss. Set backward_draws to 0.",
        )
        if self.shortlist:
            require(
                self.factors in WITH_TABLE and self.window > 1 and not self.backward_draws,
                f"HeadConfig.shortlist is given, factors is {self.factors}, window is {self.window} and backward_draws "
                f"is {self.backward_draws}; a shortlist serves the offsets after the first, of shared or lowrank "
                "factors, without draws. Change them, or set shortlist to 0.",
            )
            ids = self.shortlist_ids
            require(
                len(set(ids)) == len(ids) and min(ids, default=-1) >= 0,
                f"HeadConfig.shortlist is {shown(self.shortlist)}; it must be a number of tokens, at least 0, or "
                "different token ids, each at least 0.",
            )

    def adopt_shortlist(self, saved: HeadConfig) -> HeadConfig:
        """The same with the list of `saved`, if this one gives the number from which that was made."""
        return (
            dataclasses.replace(self, shortlist=saved.shortlist) if self.shortlist == len(saved.shortlist_ids) else self
        )

    @property
    def shortlist_ids(self) -> tuple[int, ...]:
        """The listed token ids; none where there is no shortlist."""
        return tuple(range(self.shortlist)) if isinstance(self.shortlist, int) else self.shortlist

    @property
    def has_unembedding(self) -> bool:
        """Whether the head owns one table of V x D (which tied embeddings share)."""
        return self.factors in WITH_TABLE or self.target == "ntp"


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from.

    `source` names an entry of `mtp_jax.data.sources.SOURCES`, or is what is read: a file or a glob, which is `jsonl`,
    `parquet` or `text` by its ending (`.gz` is decompressed). Training also reads what `mtp-jax data prepare` made: a
    directory, or several as a mixture, as in `3:data/stories,1:data/code`, where 3 of 4 sequences are stories.
    """

    source: str = "stdlib"
    """The name of a source, a file or a quoted glob; for training also a prepared directory, or WEIGHT:DIRECTORY,..."""
    files: str = ""
    """The glob, where the source is given by name; for packages their names, with commas between (default: all)."""
    separator: str = ""
    """What lies between the documents of a text file, such as '<|endoftext|>' (default: a file is one document)."""
    field: str = "text"
    """Where the text is: field of a JSON line (dots descend), column of a Parquet file, feature of a TFDS example."""
    dataset: str = ""
    """The TFDS data set: a name such as ag_news_subset:1.0.0, or the directory where it was prepared."""
    split: str = "train"
    """The split of the TFDS data set, such as train[:1000]."""
    valid_fraction: float = 0.05
    """The share of the documents that is held out, by the hash of their content: copies of one lie on one side."""
    cache_dir: str | None = None
    """Where prepared data sets are kept (default: $MTP_JAX_CACHE, else ~/.cache/mtp_jax)."""

    def __post_init__(self) -> None:
        kind = _kind(self.source)
        if kind:
            require(
                self.files in ("", self.source),
                f"DataConfig.source is {self.source!r}, which says what is read, and files is {self.files!r}; "
                "leave one of them out.",
            )
            object.__setattr__(self, "files", self.source)
            object.__setattr__(self, "source", kind)
        require(
            0 < self.valid_fraction < 1,
            f"DataConfig.valid_fraction is {self.valid_fraction}; it must lie in (0, 1).",
        )
        require(
            self.source not in ("text", "jsonl", "parquet", "store", "mixture") or bool(self.files),
            f"DataConfig.source is {self.source} and files is empty; give {_FILES.get(self.source, _GLOB)}.",
        )
        require(
            self.source != "tfds" or bool(self.dataset),
            "DataConfig.source is tfds and dataset is empty; give a name, such as --data.dataset ag_news_subset:1.0.0, "
            "or the directory of a prepared data set.",
        )
        require(
            all(self.field.split(".")),
            f"DataConfig.field is {self.field!r}; it must be a name, or names with dots between.",
        )
        for name, default, sources in (
            ("separator", "", ("text",)),
            ("field", "text", ("jsonl", "parquet", "tfds")),
            ("dataset", "", ("tfds",)),
            ("split", "train", ("tfds",)),
        ):
            value = getattr(self, name)
            require(
                value == default or self.source in sources,
                f"DataConfig.{name} is {value!r} and source is {self.source}; it is for source {' and '.join(sources)} "
                f"alone. Change the source, or leave {name} at {default!r}.",
            )


_GLOB = "a glob, such as --data.source 'stories/*.txt'"
_FILES = {
    "store": "the directory that `mtp-jax data prepare` made, such as --data.source data/stories",
    "mixture": "weights and stores, such as --data.source 3:data/stories,1:data/code",
}
_ENDINGS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}


def _kind(source: str) -> str | None:
    """What kind of source a file, a glob, a directory or a mixture is; None if `source` is a name."""
    if re.match(r"[\d.]+:", source):
        return "mixture"
    if os.path.exists(os.path.join(os.path.expanduser(source), "manifest.json")):
        return "store"
    if not re.search(r"[./*?\[]", source):
        return None
    return next((kind for ending, kind in _ENDINGS.items() if source.endswith(ending)), "text")


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """What the model reads: batches of `batch_size` sequences of `seq_len` tokens, over all devices and hosts.

    `source` can be documents, which are prepared first; or `store`, with the directory in `files`, where they are; or
    `mixture`, with several of them in `files`.
    `tokenizer` is `bytes`, `hf:PATH` (a `tokenizer.json`) or `sentencepiece:PATH` (a `.model`), and `end_of_document`
    its special token that ends documents, as text (default: its own, where it is plain which one that is).
    """

    tokenizer: str = "bytes"
    end_of_document: str = ""
    seq_len: int = 256
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seq_len", "batch_size")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optax. `muon` updates matrices by orthogonalised momentum and the rest by AdamW (with Nesterov
    momentum), at one learning rate.

    Schedules: `cosine` and `wsd` (constant, then linear decay over the last `decay_fraction` of the steps) end at
    `final_lr_fraction` of the peak; `constant` stays. All begin with a linear warm-up of `warmup_steps`.

    A gradient that is not finite ends the run at the last good step. With a `skip_limit` such steps change nothing and
    are counted (`skipped`), and the run ends after more than `skip_limit` in a row; with a `skip_above` too, so are
    steps whose gradient is longer than `skip_above` times its running mean.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    clip_norm: float = 1.0
    skip_limit: int = 0
    skip_above: float = 0.0

    def __post_init__(self) -> None:
        choices(self)
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "clip_norm", "skip_limit", "skip_above")
        require(
            self.skip_above == 0 or (self.skip_above > 1 and self.skip_limit > 0),
            f"OptimizerConfig.skip_above is {self.skip_above} and skip_limit is {self.skip_limit}; it must be above 1, "
            "with a skip_limit of at least 1, or 0.",
        )
        positive(self, "eps")
        fraction(self, "decay_fraction", "final_lr_fraction")
        fraction(self, "beta1", "beta2", "momentum", closed=False)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis: `data` replicates weights, `fsdp` shards them with the batch, `tensor` splits
    matrices and the vocabulary. At most one may be -1, which takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in to_dict(self).items():
            require(size >= 1 or size == -1, f"MeshConfig.{name} is {size}; it must be at least 1, or -1 for the rest.")
        require(sizes.count(-1) <= 1, f"MeshConfig is {sizes}; only one axis can be -1 (what the others leave).")

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """The (data, fsdp, tensor) mesh on `num_devices` devices. Raises `ConfigError` if it does not fit."""
        sizes = [self.data, self.fsdp, self.tensor]
        fixed = 1
        for size in sizes:
            fixed *= 1 if size == -1 else size
        require(
            num_devices % fixed == 0 and (-1 in sizes or fixed == num_devices),
            f"MeshConfig (data, fsdp, tensor) = {tuple(sizes)} needs {'a multiple of ' if -1 in sizes else ''}"
            f"{fixed} devices and there are {num_devices}; change one axis, or set it to -1.",
        )
        data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, tensor


@dataclass(frozen=True)
class ProfileConfig:
    """What is recorded for a look at where the time goes: `steps` as BEGIN:END (END is not in it), by JAX's profiler,
    into `profile/` of the run directory, for TensorBoard or Perfetto."""

    steps: str = ""

    def __post_init__(self) -> None:
        begin, end = self.range
        require(
            not self.steps or 0 <= begin < end,
            f"ProfileConfig.steps is {self.steps!r}; it must be BEGIN:END, such as 10:13, or empty.",
        )

    @property
    def range(self) -> tuple[int, int]:
        """The first step and the one after the last, counted from 0; both -1 if there is none."""
        found = re.fullmatch(r"(\d+):(\d+)", self.steps)
        return (int(found[1]), int(found[2])) if found else (-1, -1)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. Experiments are Python files with a module-level `CONFIG` of this type.

    A step reads `data.batch_size` sequences in `grad_accumulation` equal parts. Every `eval_every` steps, and before
    every save, the first `eval_batches` held-out batches are evaluated; every `checkpoint_every` steps the state is
    saved, and the newest `keep_checkpoints` stay, and that of the lowest held-out loss.
    With an `ema_decay` above 0, such as 0.999, the run keeps the average of its parameters too: the plain mean over
    its steps up to 1 / (1 - ema_decay), exponential from there on, so that the initial ones have no weight.
    `init_from` is the directory of a run whose trunk and unembedding, as last saved, this one begins with; factors and
    gate are fresh. With `freeze` trunk all that is taken stays as it is, without gradient or optimizer state, and the
    head alone is trained: of it the unembedding stays too if it is the target (`ntp`), so that all heads that are
    trained so preserve one law.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    steps: int = 1000
    grad_accumulation: int = 1
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    ema_decay: float = 0.0
    init_from: str = ""
    freeze: Literal["none", "trunk"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        choices(self)
        fraction(self, "ema_decay", closed=False)
        require(
            self.freeze == "none" or bool(self.init_from),
            f"freeze is {self.freeze} and init_from is empty: a trunk that nothing has trained would be frozen. Set "
            "init_from to the directory of a run.",
        )
        at_least(self, 1, "steps", "grad_accumulation", "eval_every", "eval_batches", "checkpoint_every")
        at_least(self, 1, "keep_checkpoints", "log_every")
        batch, parts = self.data.batch_size, self.grad_accumulation
        require(
            batch % parts == 0,
            f"data.batch_size is {batch} and grad_accumulation is {parts}; the parts are equal, so the batch must be a "
            "multiple of it.",
        )
        require(
            self.data.seq_len <= self.model.context_length,
            f"data.seq_len is {self.data.seq_len} and model.context_length is {self.model.context_length}; "
            "the context must hold a training sequence.",
        )
        require(
            self.optimizer.warmup_steps <= self.steps,
            f"optimizer.warmup_steps is {self.optimizer.warmup_steps} and steps is {self.steps}; "
            "the warm-up cannot be longer than the run.",
        )
        require(
            not self.model.tie_embeddings or self.head.has_unembedding,
            f"model.tie_embeddings is True and head.factors is {self.head.factors} with target marginal, which has no "
            "single unembedding to tie. Set head.factors to shared or lowrank, head.target to ntp, or untie.",
        )

        listed = self.head.shortlist_ids
        require(
            max(listed, default=-1) < self.model.vocab_size,
            f"head.shortlist has {len(listed)} ids up to {max(listed, default=0)} and model.vocab_size is "
            f"{self.model.vocab_size}; a shortlist is part of the vocabulary.",
        )

    def check_tokenizer(self, vocab_size: int) -> None:
        """Refuse a model whose vocabulary is smaller than the tokenizer's `vocab_size`."""
        require(
            self.model.vocab_size >= vocab_size,
            f"model.vocab_size is {self.model.vocab_size} and the tokenizer {self.data.tokenizer!r} has {vocab_size} "
            f"tokens; set model.vocab_size to {vocab_size} or more.",
        )

    def check_mesh(self, shape: tuple[int, int, int]) -> None:
        """Refuse a batch or a width that the mesh `(data, fsdp, tensor)` does not divide."""
        data, fsdp, _ = shape
        part = self.data.batch_size // self.grad_accumulation
        require(
            part % (data * fsdp) == 0,
            f"A step's part is {part} sequences (data.batch_size {self.data.batch_size} / grad_accumulation "
            f"{self.grad_accumulation}) and the mesh has {data} x {fsdp} = {data * fsdp} data x fsdp devices; "
            "the devices must divide the part.",
        )
        self.check_widths(shape)

    def check_widths(self, shape: tuple[int, int, int]) -> None:
        """Refuse a width of model or head that the mesh `(data, fsdp, tensor)` does not divide."""
        _, fsdp, tensor = shape
        divided = [
            ("model.d_model", self.model.d_model, "fsdp", fsdp),
            ("model.vocab_size", self.model.vocab_size, "tensor", tensor),
            ("model.num_kv_heads", self.model.num_kv_heads, "tensor", tensor),
            ("model.d_ff", self.model.d_ff, "tensor", tensor),
            ("The length of head.shortlist", len(self.head.shortlist_ids), "tensor", tensor),
        ]
        for name, size, axis, devices in divided:
            require(
                size % devices == 0,
                f"{name} is {size} and the mesh axis {axis} has {devices} devices, which must divide it.",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def shown(value: Any) -> str:
    """A value of a field for a message: a long list of token ids as its length."""
    return f"a list of {len(value)} ids" if isinstance(value, tuple) and len(value) > 8 else repr(value)


def differences(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in `a`, value in `b`) of every field in which two configs of one type differ."""
    for name in (f.name for f in dataclasses.fields(a)):
        here, there = getattr(a, name), getattr(b, name)
        if dataclasses.is_dataclass(here) and type(here) is type(there):
            yield from differences(here, there, f"{prefix}{name}.")
        elif here != there:
            yield f"{prefix}{name}", here, there


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`. Raises `ConfigError` on a field that `cls` does not have, with the nearest name."""
    hints = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(hints)}."
        require(name in hints, f"{cls.__name__} has no field {name!r}{hint}")
        nested = dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
        kwargs[name] = from_dict(hints[name], value) if nested else tuple(value) if isinstance(value, list) else value
    return cls(**kwargs)
