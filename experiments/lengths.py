"""Does what rank gives hold as training goes on? One, two and four times as many steps, on a trunk of sizes.py.

    mtp-jax sweep experiments/sizes.py --only trunk-d256     # what the heads are trained on, once (`@gpu`: trunk-d768)
    mtp-jax sweep experiments/lengths.py
    mtp-jax report experiments/results/lengths-cpu.json --out reports/lengths

`@gpu` for one GPU. The learning rate is constant, so the three lengths are three readings of one run.

Cost on two cores: 6 minutes for the trunk, with another run beside it, 2 for the costs of a step and an iteration, and
6 to 13 for two runs at a time.
Found (results/lengths-cpu.json; three seeds, T = 0.7): after 480, 960 and 1,920 steps rank 4 has a joint loss lower by
0.83, 1.00 and 1.11 nats a window than rank 1, and 0.23, 0.27 and 0.30 more tokens per forward. What it gives grows. On
the machine of these runs no number of drafts pays in so small a model: reading 2 to 4 tokens takes 2.4 to 3.1 times
what one does, with rank 1.
"""

from setting import for_steps
from sizes import on

from mtp_jax import MeasureConfig, Sweep, TrainConfig


def longer(heads: TrainConfig) -> Sweep:
    """Rank 1 and 4, four times as long as in sizes.py."""
    return Sweep(
        for_steps(heads, 4 * heads.steps),
        {"head.rank": (1, 4), "seed": (0, 1, 2)},
        reference={"head.rank": 1},
        measure=MeasureConfig(lengths={"quarter": 0.25, "half": 0.5}),
    )


SWEEPS = {"cpu": longer(on("cpu", "trunk-d256")), "gpu": longer(on("gpu", "trunk-d768"))}
