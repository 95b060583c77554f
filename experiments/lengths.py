"""Does what rank gives hold as training goes on? One, two and four times as many steps, on a trunk of sizes.py.

    mtp-jax sweep experiments/sizes.py --only trunk-d256     # what the heads are trained on, once (`@gpu`: trunk-d768)
    mtp-jax sweep experiments/lengths.py
    mtp-jax report experiments/results/lengths-cpu.json --out reports/lengths

`@gpu` for one GPU. The learning rate is constant, so the three lengths are three readings of one run.
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
