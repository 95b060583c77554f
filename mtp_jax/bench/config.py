"""Benchmark options: what each of them measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtp_jax.heads.config import HeadConfig
from mtp_jax.validate import at_least, require, typed


@dataclass(frozen=True)
class BenchConfig:
    """What `mtp-jax bench decode` measures: every batch size x temperature x verifier x k, beside k = 0.

    For each batch of prompts all that is measured follows one another, so that a machine whose speed drifts slows all
    of it. A rate is the total of tokens over the median of the repetitions' total times. The records of a suite may be
    compressed. Their messages end with the user's, and of turns the first is asked; both go through the run's chat
    template. They are chosen whole, so many that they fill batches.
    """

    prompts: int = 24
    """How many documents; of a suite, of each `category` at most."""
    prompt_tokens: int = 96
    """How many tokens of each document are its prompt; prompts of a suite are whole."""
    new_tokens: int = 256
    """How many tokens follow, or as many as come before a stop token."""
    temperatures: tuple[float, ...] = (0.0, 0.7)
    """0 is greedy."""
    batch_sizes: tuple[int, ...] = (1,)
    """Rows at a time; each must divide the prompts."""
    verifiers: tuple[str, ...] = ()
    """For temperatures above 0: coupled, token, block; without any, coupled."""
    ks: tuple[int, ...] = ()
    """Numbers of drafts, 0 among them; without any, each of 0 to W-1."""
    files: str = ""
    """A glob of text files, in place of held-out documents."""
    suite: str = ""
    """JSON lines in place of documents, with prompt, messages or turns; each category is measured for itself too."""
    auto: bool = False
    """Rows for k = auto too. What it stands for is chosen before anything is timed."""
    compare: Literal["none", "hf"] = "none"
    """hf: transformers too, greedily, plain and with its prompt lookup; nothing then ends at stop tokens."""
    repetitions: int = 3
    """How often the whole is measured."""
    seed: int = 0
    """Of the choice of prompts."""

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
    """What `mtp-jax bench loss` measures: loss and gradient of a head on one device."""

    d: int = 256
    """Width of the hidden states."""
    v: int = 32768
    """Tokens of the vocabulary."""
    window: int = 4
    """W, the tokens that the head looks ahead."""
    rank: int = 8
    """R, its components."""
    tokens: int = 512
    """Positions."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which is computed."""
    factors: str = "shared"
    """As head.factors."""
    factor_width: int = 64
    """That of lowrank and lora."""
    shortlist: int = 0
    """How many tokens the offsets after the first know; 0 for all."""
    circuit: str = "cpd"
    """As head.circuit; another one is compared with cpd too."""
    circuit_width: int = 0
    """As head.circuit_width."""
    repetitions: int = 5
    """How often each is timed."""

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
    """What `mtp-jax bench train` measures: steps of an experiment's model with a CPD head, on random tokens, against
    the same trunk with one plain next-token head."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Of the heads."""
    repetitions: int = 5
    """How often each step is timed."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "repetitions")
        low = min(self.ranks, default=0)
        require(low >= 1, f"TrainBenchConfig.ranks is {self.ranks}; give one or more, each at least 1.")
