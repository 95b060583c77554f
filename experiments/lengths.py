"""Does what rank gives hold as training goes on? One, two and four times as many steps, on a trunk of sizes.py.

    mtp-jax sweep experiments/sizes.py --only trunk-d256     # what the heads are trained on, once (`@gpu`: trunk-d768)
    mtp-jax sweep experiments/lengths.py
    mtp-jax report experiments/results/lengths-cpu.json --out reports/lengths

`@gpu` for one GPU. The learning rate is constant, so the three lengths are three readings of one run.
"""

from dataclasses import replace

from setting import for_steps
from sizes import SWEEPS as OF_SIZES

from mtp_jax import Sweep


def longer(size: str, trunk: str) -> Sweep:
    """Rank 1 and 4, four times as long as in sizes.py."""
    sweep = OF_SIZES[size]
    heads = replace(sweep.base, model=sweep.first[trunk].model, init_from=f"runs/sizes/{size}/{trunk}")
    return Sweep(
        for_steps(heads, 4 * heads.steps),
        {"head.rank": (1, 4), "seed": (0, 1, 2)},
        reference={"head.rank": 1},
        measure=replace(sweep.measure, lengths={"quarter": 0.25, "half": 0.5}),
    )


SWEEPS = {"cpu": longer("cpu", "trunk-d256"), "gpu": longer("gpu", "trunk-d768")}
