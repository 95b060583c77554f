"""What is asked of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from mtp_jax.config import HeadConfig, ModelConfig, at_least, choices, each, fraction, require

T = TypeVar("T")
Rows: TypeAlias = T | Sequence[T]  # one value for all rows of a batch, or one for each


@dataclass(frozen=True)
class DecodeConfig:
    """How prompts are continued. What has a type `Rows[...]` is one value for all rows, or a sequence of one per row.

    `max_new_tokens` is exact, unless one of `stop_tokens` comes first. `temperature` (0 is greedy), `top_k` (0 keeps
    all) and `top_p` are the law that is sampled. Row i samples with `seed[i]`, or `seed + i`; its output is a function
    of that and its prompt alone. `k` is the most drafts per forward, 0..W-1 (default W-1); a forward is as wide as the
    largest of them. A row stops drafting before a token whose law (the head's, given the drafts before it) has no
    probability of `min_confidence` or more. `verifier` names an entry of `mtp_jax.decode.verify.VERIFIERS`.
    Drafts are of the `joint` law, or `ancestral`: of one component, drawn from its posterior, with an R-th of the
    draft's products with the unembedding (`shared`; of `lowrank` and `lora` those of the corrections) and somewhat
    lower acceptance; or `unconditioned`: of the joint law that knows not which token the target chose, to measure what
    knowing it is worth.
    """

    max_new_tokens: Rows[int]
    temperature: Rows[float] = 0.0
    top_k: Rows[int] = 0
    top_p: Rows[float] = 1.0
    seed: Rows[int] = 0
    k: Rows[int] | None = None
    min_confidence: Rows[float] = 0.0
    verifier: str | None = None
    draft: Literal["joint", "ancestral", "unconditioned"] = "joint"
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        choices(self)
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "temperature", "top_k", "seed")
        fraction(self, "min_confidence")
        require(
            not isinstance(self.k, str),
            f"DecodeConfig.k is {self.k!r}; give numbers. Only `generate` has k='adaptive'.",
        )
        for temperature in each(self.temperature):
            require(
                temperature == 0 or temperature >= 1e-6,
                f"DecodeConfig.temperature is {temperature}; it must be 0 (greedy), or at least 1e-06.",
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
        """The verifier's name: by default `greedy` at temperature 0 and `coupled` above."""
        return self.verifier or ("greedy" if self.greedy else "coupled")

    def check(self, model: ModelConfig, head: HeadConfig, prompts: Sequence[Any]) -> None:
        """Refuse what such a model cannot decode. Each of `prompts` is a sequence of token ids."""
        window, vocab, context = head.window, model.vocab_size, model.context_length
        require(len(prompts) > 0, "There are no prompts; give at least one.")
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "k", "min_confidence"):
            value = getattr(self, name)
            require(
                not hasattr(value, "__len__") or len(value) == len(prompts),
                f"{name} has {len(each(value))} values and there are {len(prompts)} prompts; give one for each, or "
                "one value for all.",
            )
        for k in each(self.k) if self.k is not None else []:
            require(0 <= k < window, f"k is {k} and the head's window is {window}; k must lie in 0..{window - 1}.")
        most = 2**32 - (1 if hasattr(self.seed, "__len__") else len(prompts))
        for seed in each(self.seed):
            require(seed <= most, f"seed is {seed}; row i samples with seed + i, so it must lie in 0..{most}.")
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
            low, high = min(prompt), max(prompt)
            require(
                low >= 0 and high < vocab,
                f"Prompt {i} has token ids {low}..{high}; the vocabulary is 0..{vocab - 1}.",
            )
