"""Decoding options."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.validate import ConfigError, at_least, each, from_dict, require, typed

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Rows: TypeAlias = T | Sequence[T]  # one value for all rows of a batch, or one for each
BY_ROW = "max_new_tokens", "temperature", "top_k", "top_p", "seed", "k"  # the options that have this type


@dataclass(frozen=True)
class DecodeConfig:
    """How prompts are continued. What has a type `Rows[...]` is one value for all rows, or a sequence of one per row.

    `max_new_tokens` is exact, unless one of `stop_tokens` comes first. `temperature` (0 is greedy), `top_k` (0 keeps
    all) and `top_p` are the law that is sampled. Row i samples with `seed[i]`; with one seed (default 0) for all,
    row i has the key of (seed, `row` + i), which no row of another seed has. Its output is a function of that and its
    prompt alone. `k` is the most drafts per forward, 0..W-1 (default W-1); a forward is as
    wide as the largest of them. "auto" is the k that is fastest for this model on this device: it is measured once,
    before the first request of its kind, and remembered. `verifier` names an entry of
    `mtp_jax.decode.verify.VERIFIERS`; of `token` and `block` the output depends on k too. None is the default of
    whatever has one.
    """

    max_new_tokens: Rows[int]
    temperature: Rows[float] = 0.0
    top_k: Rows[int] = 0
    top_p: Rows[float] = 1.0
    seed: Rows[int] | None = None
    row: int = 0
    k: Rows[int] | Literal["auto"] | None = None
    verifier: str | None = None
    stop_tokens: Sequence[int] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any], **defaults: Any) -> DecodeConfig:
        """The options of a function, over its defaults for what is not given, or None. Errors as in `from_dict`."""
        given = {name: value for name, value in options.items() if value is not None}
        return from_dict(cls, {"max_new_tokens": None, **defaults, **given})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.default is not dataclasses.MISSING:
                object.__setattr__(self, field.name, field.default)
        typed(self)
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "temperature", "top_k", "row", *(() if self.seed is None else ("seed",)))
        require(self.row < 2**31, f"DecodeConfig.row is {self.row}; it must lie in 0..{2**31 - 1}.")
        require(
            self.row == 0 or not hasattr(self.seed, "__len__"),
            f"DecodeConfig.row is {self.row} and each row has a seed of its own; give one seed, or leave row out.",
        )
        for temperature in each(self.temperature):
            # Hotter still, ids that are ruled out would have a probability.
            require(
                temperature == 0 or 1e-6 <= temperature <= 1e6,
                f"DecodeConfig.temperature is {temperature}; it must be 0 (greedy), or at least 1e-06, at most 1e06.",
            )
        for top_p in each(self.top_p):
            require(0 < top_p <= 1, f"DecodeConfig.top_p is {top_p}; it must lie in (0, 1].")
        require(
            self.verifier != "greedy" or self.greedy,
            f"DecodeConfig.verifier is greedy and temperature is {self.temperature}; greedy decoding has temperature "
            "0. Use coupled.",
        )

    @property
    def greedy(self) -> bool:
        """Whether every row has temperature 0."""
        return max(each(self.temperature), default=0) == 0

    @property
    def rule(self) -> str:
        """The verifier's name, by default `greedy` at temperature 0 and `coupled` above."""
        return self.verifier or ("greedy" if self.greedy else "coupled")

    @property
    def seeds(self) -> Rows[int]:
        """`seed`, or 0 where none was given."""
        return 0 if self.seed is None else self.seed

    def check(self, model: ModelConfig, head: HeadConfig, prompts: Sequence[Any]) -> list[np.ndarray]:
        """Refuse what such a model cannot decode. Returns what `prompt_ids` makes of the prompts."""
        prompts = prompt_ids(prompts)
        window, known, context = head.window, model.known, model.context_length
        require(len(prompts) > 0, "There are no prompts; give at least one.")
        for name in BY_ROW:
            value = getattr(self, name)
            require(
                isinstance(value, str) or not hasattr(value, "__len__") or len(value) == len(prompts),
                f"{name} has {len(each(value))} values and there are {len(prompts)} prompts; give one for each, or "
                "one value for all.",
            )
        for k in [] if self.k is None or isinstance(self.k, str) else each(self.k):
            require(0 <= k < window, f"k is {k} and the head's window is {window}; k must lie in 0..{window - 1}.")
        for seed in each(self.seeds):
            require(seed < 2**32, f"seed is {seed}; it must lie in 0..{2**32 - 1}.")
        for token in self.stop_tokens:
            require(
                -1 <= token < model.vocab_size,
                f"stop_tokens has {token}; the vocabulary is 0..{known - 1}, and -1 is a token that never comes.",
            )
        new = each(self.max_new_tokens)
        for i, prompt in enumerate(prompts):
            require(len(prompt) > 0, f"Prompt {i} is empty; it needs at least one token to continue from.")
            limit = new[i % len(new)]
            total = len(prompt) + limit
            require(
                total <= context,
                f"Prompt {i} has {len(prompt)} tokens and max_new_tokens is {limit}, {total} together; "
                f"the model's context_length is {context}. Shorten one of them.",
            )
            low, high = prompt.min(), prompt.max()
            require(
                low >= 0 and high < known,
                f"Prompt {i} has token ids {low}..{high}; the vocabulary is 0..{known - 1}.",
            )
        return prompts


def prompt_ids(prompts: Any) -> list[np.ndarray]:
    """Prompts as int64 arrays `[T]`: sequences, generators, and arrays of any integer type, of NumPy or JAX.

    Raises `ConfigError` on text, on one flat sequence, and on what is no integer.
    """
    import numpy as np  # configs need it nowhere else

    name, given, found = "prompts", prompts, []
    try:
        for i, prompt in enumerate([prompts] if isinstance(prompts, str | bytes | Mapping) else prompts):
            name, given = f"Prompt {i}", prompt
            ids = np.asarray(prompt if hasattr(prompt, "__len__") else list(prompt))
            if (
                isinstance(prompt, Mapping)
                or ids.ndim != 1
                or ids.dtype.kind not in "iuf"
                or not np.array_equal(ids, np.trunc(ids))
            ):
                raise ValueError
            found.append(ids.astype(np.int64))
    except (TypeError, ValueError):
        raise ConfigError(
            f"{name} is {reprlib.repr(given)}; a prompt is a sequence of token ids, and prompts are several of them, "
            "such as [[5, 1, 9]]. Text is continued by the `generate` of a loaded run."
        ) from None
    return found
