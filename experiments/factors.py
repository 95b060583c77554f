"""Which factors? An unembedding for each component and offset, maps under a shared one, or low-rank corrections.

    mtp-jax tokenizer train --source data/stories.txt --separator '<|endoftext|>' \\
        --vocab-size 4096 --out data/stories-4096.json
    mtp-jax sweep experiments/factors.py
    mtp-jax report experiments/results/factors-cpu.json --out reports/factors

`@gpu` for one GPU. The vocabulary is of 4,096 byte pairs of stories (see rank_text.py): over bytes all three are cheap.
There are no results yet.
"""

from dataclasses import replace

from rank_text import SMALLER, of_stories
from setting import HEADS_CPU, HEADS_GPU, TRUNK_CPU, TRUNK_GPU

from mtp_jax import MeasureConfig, Sweep, TrainConfig

CASES = {
    "full": {"head.factors": "full"},
    "shared": {"head.factors": "shared"},
    "lowrank-64": {"head.factors": "lowrank", "head.factor_width": 64},
}


def in_pairs(config: TrainConfig, **model: int) -> TrainConfig:
    """The run of stories, in byte pairs."""
    config = of_stories(config, vocab_size=4096, **model)
    return replace(config, data=replace(config.data, tokenizer="hf:data/stories-4096.json"))


def sweep(trunk: TrainConfig, heads: TrainConfig) -> Sweep:
    """Rank 1 and 4 with each kind."""
    return Sweep(
        heads,
        {"head.rank": (1, 4), "seed": (0, 1, 2)},
        CASES,
        reference={"head.rank": 1},
        first={"trunk": trunk},
        measure=MeasureConfig(prompt_tokens=32, new_tokens=128, prompts=160),
    )


SWEEPS = {
    "cpu": sweep(in_pairs(TRUNK_CPU, **SMALLER), in_pairs(HEADS_CPU, **SMALLER)),
    "gpu": sweep(in_pairs(TRUNK_GPU), in_pairs(HEADS_GPU)),
}
