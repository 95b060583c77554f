"""Which target? The head's own first-token marginal against a next-token head of its own, trained from scratch.

    mtp-jax sweep experiments/targets.py
    mtp-jax report experiments/results/targets-cpu.json --out reports/targets

`@gpu` for one GPU. There are no results yet; on two cores it should take as long as half of scratch_code.py, an hour or
so.
"""

from dataclasses import replace

from scratch_code import SWEEPS as SCRATCH

from mtp_jax import Sweep

CASES = {"marginal": {"head.target": "marginal"}, "ntp": {"head.target": "ntp", "head.ntp_weight": 1.0}}


def both(sweep: Sweep) -> Sweep:
    """Rank 1 and 4 with both targets."""
    return replace(sweep, grid={"head.rank": (1, 4), "seed": (0, 1, 2)}, cases=CASES, reference={"case": "marginal"})


SWEEPS = {size: both(sweep) for size, sweep in SCRATCH.items()}
