"""Does rank pay on text? Heads of rank 1 to 16 on one frozen trunk, which is a model of short stories.

    mtp-jax sweep experiments/rank_text.py          # two CPU cores
    mtp-jax sweep experiments/rank_text.py@gpu      # one GPU, 56 million parameters
    mtp-jax report experiments/results/rank_text-cpu.json --out reports/rank_text

As rank_code.py, on stories in data/stories.txt with <|endoftext|> between them (TinyStories, arXiv 2305.07759, say),
read as bytes, and on a narrower trunk. The results are of 8,578,169 bytes of them.

Cost on two cores: 10 minutes for the trunk, with another run beside it, 4 for the costs of a step and an iteration, and
3 to 7 for each run, with another beside it.
Found (results/rank_text-cpu.json; ranks 1 and 4 with three seeds, 2, 8 and 16 with one; T = 0.7): at equal wall-clock
of training rank 4 has a joint loss lower by 1.06 nats a window than rank 1, 0.28 more tokens per forward than its 1.69,
and 1.002 [0.987, 1.016] times its tokens per second: what `full` factors give is what they cost.
"""

from dataclasses import replace

from rank_code import GRID
from setting import HEADS_CPU, HEADS_GPU, TRUNK_CPU, TRUNK_GPU

from mtp_jax import Sweep, TrainConfig

STORIES = {"source": "data/stories.txt", "files": "data/stories.txt", "separator": "<|endoftext|>"}


def of_stories(config: TrainConfig, **model: int) -> TrainConfig:
    """The same run with other documents."""
    return replace(config, data=replace(config.data, **STORIES), model=replace(config.model, **model))


SMALLER = {"d_model": 384, "d_ff": 1024, "num_heads": 6}

SWEEPS = {
    "cpu": Sweep(
        of_stories(HEADS_CPU, **SMALLER),
        GRID,
        reference={"head.rank": 1},
        first={"trunk": of_stories(TRUNK_CPU, **SMALLER)},
    ),
    "gpu": Sweep(
        of_stories(HEADS_GPU),
        GRID,
        reference={"head.rank": 1},
        first={"trunk": of_stories(TRUNK_GPU)},
    ),
}
