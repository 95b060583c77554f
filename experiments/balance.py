"""Is load balancing needed? Off, squared and Switch at three coefficients each, on the frozen trunk of rank_code.py.

    mtp-jax sweep experiments/rank_code.py --only trunk      # what the heads are trained on, once
    mtp-jax sweep experiments/balance.py
    mtp-jax report experiments/results/balance-cpu.json --out reports/balance

`@gpu` for one GPU. The components begin as copies with small noise in all of them.

Cost on two slow cores: 21 minutes for the trunk, 17 for the costs of a step and an iteration of the seven cases, 5 to 9
for two runs at a time.
Found (results/balance-cpu.json; the trunk was trained anew; none, squared-1, switch-0.1 and switch-1 with three seeds;
T = 0.7, equal steps): without balancing 2.23 of 4 components are in effect. squared-1 has 3.68 and +0.069 [+0.021,
+0.116] tokens per forward, switch-1 3.89 and +0.093 [-0.023, +0.209], with joint losses lower by 0.241 [-0.083, 0.565]
and 0.290 [-0.023, 0.603] nats; weights of 0.01, and squared-0.1, bring little or nothing.
"""

from dataclasses import replace

from rank_code import SWEEPS as RANKS
from setting import HEADS_CPU, HEADS_GPU

from mtp_jax import Sweep

CASES = {"none": {"head.balance": "none"}} | {
    f"{kind}-{weight:g}": {"head.balance": kind, "head.balance_weight": weight}
    for kind in ("squared", "switch")
    for weight in (0.01, 0.1, 1.0)
}


def on(trunk: str) -> dict[str, str]:
    """The trunk that a finished sweep of rank_code.py has left."""
    return {"base": f"runs/rank_code/{trunk}/trunk"}


SWEEPS = {
    "cpu": Sweep(
        replace(HEADS_CPU, **on("cpu")),
        {"head.rank": (4,), "seed": (0, 1, 2)},
        CASES,
        reference={"case": "none"},
        measure=RANKS["cpu"].measure,
    ),
    "gpu": Sweep(
        replace(HEADS_GPU, **on("gpu")),
        {"head.rank": (8,), "seed": (0, 1, 2)},
        CASES,
        reference={"case": "none"},
        measure=RANKS["gpu"].measure,
    ),
}
