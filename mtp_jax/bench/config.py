"""Benchmark options: what each of them measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtp_jax.heads.config import HeadConfig
from mtp_jax.validate import at_least, require, typed


@dataclass(frozen=True)
class BenchConfig:
    """What `mtp-jax bench decode` measures: every batch size x temperature x verifier x k.

    k is each of 0..W-1, or those of them that `ks` names; 0 is what all are compared with.

    `prompts` documents are chosen by `seed`, among those held out or, given the glob `files`, among its files; each
    gives its first `prompt_tokens` tokens and is continued by `new_tokens`, or up to a stop token. They are decoded in
    batches of each of `batch_sizes`. `verifiers` are for temperatures above 0; without any, the default there. For each
    batch of prompts all that is measured follows one another, so that a machine whose speed drifts slows all of them.
    `repetitions` of the whole; a rate is the total of tokens over the median of the repetitions' total times.
    A `suite` takes the place of documents: JSON lines, plain or compressed, each with a `prompt`, with `messages` that
    end with the user's, or with `turns`, a list of the user's messages of which the first is asked; the latter two go
    through the run's chat template. Of each `category`, where records have one, `prompts` at most are chosen by `seed`,
    whole, so many that they fill batches; each is measured for itself too.
    `auto`: the k that k="auto" stands for too, in rows of its own; it is chosen before anything is timed.
    `compare` hf: greedy decoding by Hugging Face `transformers` too, of the same weights, plain and with its prompt
    lookup, one prompt at a time, and neither ends at stop tokens.
    """

    prompts: int = 24
    prompt_tokens: int = 96
    new_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.7)
    batch_sizes: tuple[int, ...] = (1,)
    verifiers: tuple[str, ...] = ()
    ks: tuple[int, ...] = ()
    files: str = ""
    suite: str = ""
    auto: bool = False
    compare: Literal["none", "hf"] = "none"
    repetitions: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "prompts", "prompt_tokens", "repetitions")
        at_least(self, 2, "new_tokens")
        at_least(self, 0, "seed")
        require(
            not (self.suite and self.files),
            f"BenchConfig.suite is {self.suite!r} and files is {self.files!r}; give one of them.",
        )
        require(
            min(self.temperatures, default=-1.0) >= 0,
            f"BenchConfig.temperatures is {self.temperatures}; give one or more, each at least 0.",
        )
        require(
            not self.ks or (0 in self.ks and min(self.ks) >= 0),
            f"BenchConfig.ks is {self.ks}; give numbers of drafts, 0 among them, or none for all.",
        )
        require(
            min(self.batch_sizes, default=0) >= 1 and all(self.prompts % size == 0 for size in self.batch_sizes),
            f"BenchConfig.batch_sizes is {self.batch_sizes} and prompts is {self.prompts}; give one or more that "
            "divide the prompts, so that every size decodes all of them.",
        )
        require(
            not self.verifiers or ("greedy" not in self.verifiers and max(self.temperatures) > 0),
            f"BenchConfig.verifiers is {self.verifiers} and temperatures is {self.temperatures}; temperature 0 always "
            "has greedy, and what is named here verifies at those above. Leave it out, or add a temperature.",
        )


@dataclass(frozen=True)
class LossBenchConfig:
    """What `mtp-jax bench loss` measures: loss and gradient of a head of `rank` x `window` factors over a vocabulary of
    `v`, on `tokens` positions of width `d`, on one device. `factor_width` is that of `lowrank` and `lora`, `shortlist`
    the number of tokens that the offsets after the first know. Another `circuit` than cpd is compared with that too."""

    d: int = 256
    v: int = 32768
    window: int = 4
    rank: int = 8
    tokens: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    factors: str = "shared"
    factor_width: int = 64
    shortlist: int = 0
    circuit: str = "cpd"
    circuit_width: int = 0
    repetitions: int = 5

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "d", "v", "window", "rank", "tokens", "factor_width", "repetitions")
        require(
            0 <= self.shortlist <= self.v,
            f"LossBenchConfig.shortlist is {self.shortlist} and v is {self.v}; a shortlist is part of the vocabulary.",
        )
        self.head()  # which refuses what does not go together

    def head(self) -> HeadConfig:
        """The head whose loss is measured; its components differ."""
        return HeadConfig(
            window=self.window,
            rank=self.rank,
            factors=self.factors,
            factor_width=self.factor_width,
            shortlist=self.shortlist,
            circuit=self.circuit,
            circuit_width=self.circuit_width,
            init_noise=1.0,
        )


@dataclass(frozen=True)
class TrainBenchConfig:
    """What `mtp-jax bench train` measures: steps of an experiment's model with a CPD head of each of `ranks`, against
    the same trunk with one plain next-token head, on random tokens."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    repetitions: int = 5

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "repetitions")
        low = min(self.ranks, default=0)
        require(low >= 1, f"TrainBenchConfig.ranks is {self.ranks}; give one or more, each at least 1.")
