"""Does what rank gives hold as training goes on? One, two and four times as many steps, on the trunk of rank_code.py.

    mtp-jax sweep experiments/rank_code.py --only trunk      # what the heads are trained on, once
    mtp-jax sweep experiments/lengths.py
    mtp-jax report experiments/results/lengths-cpu.json --out reports/lengths

`@gpu` for one GPU. The learning rate is constant, so the three lengths are three readings of one run.
"""

from dataclasses import replace

from balance import SWEEPS as ON_TRUNK
from setting import for_steps

from mtp_jax import Sweep


def longer(sweep: Sweep) -> Sweep:
    """Rank 1 and 4, four times as long as in rank_code.py."""
    return replace(
        sweep,
        base=for_steps(sweep.base, 4 * sweep.base.steps),
        grid={"head.rank": (1, 4), "seed": (0, 1, 2)},
        cases={},
        reference={"head.rank": 1},
        measure=replace(sweep.measure, lengths={"quarter": 0.25, "half": 0.5}),
    )


SWEEPS = {size: longer(sweep) for size, sweep in ON_TRUNK.items()}
