"""How far ahead? Windows of 2, 4 and 8 tokens, rank 1 and cheap components of rank 8, on a frozen trunk of sizes.py.

    mtp-jax sweep experiments/sizes.py --only trunk-d256     # what the heads are trained on, once (`@gpu`: trunk-d768)
    mtp-jax sweep experiments/windows.py
    mtp-jax report experiments/results/windows-cpu.json --out reports/windows

`@gpu` for one GPU. The heads are two of lora_code.py, with as many steps. Joint losses of different windows are of
different texts: compare tokens per forward and tokens per second. There are no results yet; the costs of a step and an
iteration take 8 minutes on two cores, two runs at a time perhaps 6 to 15.
"""

from lora_code import CASES
from setting import for_steps
from sizes import on

from mtp_jax import MeasureConfig, Sweep, TrainConfig


def widths(heads: TrainConfig) -> Sweep:
    """Both heads at each width."""
    return Sweep(
        for_steps(heads, 3 * heads.steps),
        {"head.window": (2, 4, 8), "seed": (0, 1, 2)},
        {name: CASES[name] for name in ("full-1", "lora-8")},
        reference={"case": "full-1"},
        measure=MeasureConfig(),
    )


SWEEPS = {"cpu": widths(on("cpu", "trunk-d256")), "gpu": widths(on("gpu", "trunk-d768"))}
