"""How far ahead? Windows of 2, 4 and 8 tokens, rank 1 and 4, on the frozen trunk of rank_code.py.

    mtp-jax sweep experiments/rank_code.py --only trunk      # what the heads are trained on, once
    mtp-jax sweep experiments/windows.py
    mtp-jax report experiments/results/windows-cpu.json --out reports/windows

`@gpu` for one GPU. Joint losses of different windows are of different texts: compare tokens per forward.
"""

from dataclasses import replace

from balance import SWEEPS as ON_TRUNK

from mtp_jax import Sweep


def widths(sweep: Sweep) -> Sweep:
    """Both ranks at each width."""
    grid = {"head.window": (2, 4, 8), "head.rank": (1, 4), "seed": (0, 1, 2)}
    return replace(sweep, grid=grid, cases={}, reference={"head.rank": 1})


SWEEPS = {size: widths(sweep) for size, sweep in ON_TRUNK.items()}
