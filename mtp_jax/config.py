"""Config of a run: every number that it needs, in frozen dataclasses that check themselves.

Importing this module imports neither JAX nor Flax, so a bad value is refused before anything expensive happens.
Every message names the field, the value found, the value allowed and the way out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from mtp_jax.data.config import DataConfig
from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.validate import at_least, fraction, positive, require, to_dict, typed


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
        typed(self)
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
        typed(self)
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in to_dict(self).items():
            require(size >= 1 or size == -1, f"MeshConfig.{name} is {size}; it must be at least 1, or -1 for the rest.")
        require(sizes.count(-1) <= 1, f"MeshConfig is {sizes}; only one axis can be -1 (what the others leave).")

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """The (data, fsdp, tensor) mesh on `num_devices` devices. Raises `ConfigError` if it does not fit."""
        sizes = [self.data, self.fsdp, self.tensor]
        fixed = math.prod(size for size in sizes if size != -1)
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
        typed(self)
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
    every save, `eval_batches` batches, spread over all that is held out, are evaluated; every `checkpoint_every` steps
    the state is saved, and the newest `keep_checkpoints` stay, and that of the lowest held-out loss.
    With an `ema_decay` above 0, such as 0.999, the run keeps the average of its parameters too: the plain mean over
    its steps up to 1 / (1 - ema_decay), exponential from there on, so that the initial ones have no weight.
    `log_to` names services that are told the metrics too, beside the run directory.
    `init_from` is the directory of a run whose model, as last saved, this one begins with; the head is fresh.
    `base` is the directory of a run, or of an imported model, that stays as it is: this run trains a head on it, and
    saves that alone. What `model` does not say is the base's, and so is the tokenizer. All heads on a base with target
    `ntp` preserve one law, the base's own. Evaluations on a base say too how many tokens a forward is expected to give
    at the `eval_temperatures`, on texts that the base writes once; the best checkpoint is that of the most.
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
    eval_temperatures: tuple[float, ...] = (0.0, 0.7)
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    log_to: tuple[Literal["wandb", "mlflow"], ...] = ()
    ema_decay: float = 0.0
    init_from: str = ""
    base: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        typed(self)
        fraction(self, "ema_decay", closed=False)
        require(
            bool(self.base) or self.head.kind == "none" or self.model.param_dtype == "float32",
            f"model.param_dtype is {self.model.param_dtype} and base is empty; what is trained is float32. Set base to "
            "the directory of a run whose model stays as it is, or param_dtype to float32.",
        )
        require(
            not (self.base and self.init_from),
            f"base is {self.base!r} and init_from is {self.init_from!r}: a head is trained on one, or a whole model "
            "begins with the other. Give one of them.",
        )
        at_least(self, 1, "steps", "grad_accumulation", "eval_every", "eval_batches", "checkpoint_every")
        at_least(self, 1, "keep_checkpoints", "log_every")
        at_least(self, 0, "eval_temperatures")
        batch, parts = self.data.batch_size, self.grad_accumulation
        require(
            batch % parts == 0,
            f"data.batch_size is {batch} and grad_accumulation is {parts}; the parts are equal, so the batch must be a "
            "multiple of it.",
        )
        unknown = self.base and self.model.num_tokens is None  # the context is the base's, which has not been opened
        require(
            bool(unknown) or self.data.seq_len <= self.model.context_length,
            f"data.seq_len is {self.data.seq_len} and model.context_length is {self.model.context_length}; "
            "the context must hold a training sequence.",
        )
        require(
            self.optimizer.warmup_steps <= self.steps,
            f"optimizer.warmup_steps is {self.optimizer.warmup_steps} and steps is {self.steps}; "
            "the warm-up cannot be longer than the run.",
        )

    @property
    def begins_from(self) -> str:
        """The run that must be there before this one begins, if any."""
        return self.base or self.init_from

    def with_tokenizer(self, vocab_size: int) -> TrainConfig:
        """The config with `model.num_tokens`, of a tokenizer of `vocab_size` ids; refuses a smaller vocabulary."""
        require(
            self.model.vocab_size >= vocab_size,
            f"model.vocab_size is {self.model.vocab_size} and the tokenizer {self.data.tokenizer!r} has {vocab_size} "
            f"tokens; set model.vocab_size to {vocab_size} or more.",
        )
        require(
            self.model.num_tokens in (None, vocab_size),
            f"model.num_tokens is {self.model.num_tokens} and the tokenizer {self.data.tokenizer!r} has {vocab_size} "
            "tokens. Leave it out: it is the tokenizer's.",
        )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, num_tokens=vocab_size))

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
            ("head.shortlist", self.head.shortlist, "tensor", tensor),
        ]
        for name, size, axis, devices in divided:
            require(
                size % devices == 0,
                f"{name} is {size} and the mesh axis {axis} has {devices} devices, which must divide it.",
            )
