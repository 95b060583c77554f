"""Does rank pay on code? Heads of rank 1 to 16 on one frozen trunk, which is a model of Python source.

    mtp-jax sweep experiments/rank_code.py          # two CPU cores
    mtp-jax sweep experiments/rank_code.py@gpu      # one GPU, 56 million parameters
    mtp-jax report experiments/results/rank_code-cpu.json --out reports/rank_code

The primary comparison: one target for all ranks. Acceptance is measured too with drafts that do not know which token
the target chose (`unconditioned`).
"""

from setting import HEADS_CPU, HEADS_GPU, TRUNK_CPU, TRUNK_GPU

from mtp_jax import MeasureConfig, Sweep

MEASURE = MeasureConfig(drafts=("joint", "unconditioned"))
GRID = {"head.rank": (1, 2, 4, 8, 16), "seed": (0, 1, 2)}

SWEEPS = {
    "cpu": Sweep(HEADS_CPU, GRID, reference={"head.rank": 1}, first={"trunk": TRUNK_CPU}, measure=MEASURE),
    "gpu": Sweep(HEADS_GPU, GRID, reference={"head.rank": 1}, first={"trunk": TRUNK_GPU}, measure=MEASURE),
}
