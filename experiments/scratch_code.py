"""From scratch: whole models of code whose joint head is their own target, rank 1 to 8.

    mtp-jax sweep experiments/scratch_code.py
    mtp-jax report experiments/results/scratch_code-cpu.json --out reports/scratch_code --looks 2

`@gpu` for one GPU. Each rank is a model of its own here, with a law of its own, so this comparison comes second to
rank_code.py: a higher acceptance may be one of a model that is easier to predict.

Cost on two cores: 6 minutes for the costs of a step and an iteration, 9 to 13 for two runs at a time.
Found (results/scratch_code-cpu.json; six seeds of ranks 1 and 4 and one of 8, T = 0.7, equal steps): rank 4 has a joint
loss lower by 0.933 [0.846, 1.019] nats a window and +0.167 [-0.029, +0.363] tokens per forward, and its first token's
loss differs by +0.004 [-0.010, +0.018]. After three seeds the last two were undecided, so three more were run; these
intervals are for both looks together, and both are undecided still (that of the first token, which must lie within
0.02 of none, when widened for two ranks). At equal wall-clock the model of rank 4 is the worse one: its first token's
loss is higher by 0.162 [0.127, 0.197].
"""

from dataclasses import replace

from setting import HEADS_CPU, HEADS_GPU, MODEL_CPU, PLAIN, TRUNK_CPU, TRUNK_GPU, for_steps

from mtp_jax import MeasureConfig, Sweep

# What models from scratch accept differs much between seeds: three decided nothing.
GRID = {"head.rank": (1, 2, 4, 8), "seed": (0, 1, 2, 3, 4, 5)}
FRESH = {"head": PLAIN, "base": ""}

SWEEPS = {
    "cpu": Sweep(
        for_steps(
            replace(
                HEADS_CPU,
                **FRESH,
                model=replace(MODEL_CPU, d_model=256, d_ff=512, num_heads=4),
                optimizer=replace(TRUNK_CPU.optimizer, schedule="constant"),
            ),
            360,
        ),
        GRID,
        reference={"head.rank": 1},
        measure=MeasureConfig(),
    ),
    "gpu": Sweep(
        for_steps(replace(HEADS_GPU, **FRESH, optimizer=replace(TRUNK_GPU.optimizer, schedule="constant")), 6000),
        {**GRID, "head.rank": (1, 2, 4, 8, 16)},
        reference={"head.rank": 1},
        measure=MeasureConfig(),
    ),
}
