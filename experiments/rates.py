"""Is rank 1 a sound baseline? Half, two and four times the recipes' learning rate, on a frozen trunk of sizes.py.

    mtp-jax sweep experiments/sizes.py --only trunk-d256     # what the heads are trained on, once (`@gpu`: trunk-d768)
    mtp-jax sweep experiments/rates.py
    mtp-jax report experiments/results/rates-cpu.json --out reports/rates

`@gpu` for one GPU. The heads are rank 1 and one of lora_code.py, with as many steps. All recipes train all heads at one
rate: if rank 1 had gained by another, what they say of higher ranks would be too good.

Cost on two cores: 8 minutes for the costs of a step and an iteration, 4 to 7 for two runs at a time.
Found (results/rates-cpu.json; one seed, without four times the rate; T = 0.7): by twice the rate rank 1 has a joint
loss lower by 0.032 [0.018, 0.047] nats a window and +0.015 [+0.011, +0.019] tokens per forward, rank 8 one lower by
0.056 [0.033, 0.080] and +0.022 [+0.010, +0.035]; half the rate is worse for both. So between these rates the recipes'
own does not favour rank 8.
"""

from lora_code import CASES
from setting import for_steps
from sizes import on

from mtp_jax import MeasureConfig, Sweep, TrainConfig


def rates(heads: TrainConfig) -> Sweep:
    """Both heads at each rate."""
    own = heads.optimizer.learning_rate
    return Sweep(
        for_steps(heads, 3 * heads.steps),
        {"optimizer.learning_rate": (own / 2, own, 2 * own, 4 * own), "seed": (0,)},
        {name: CASES[name] for name in ("full-1", "lora-8")},
        reference={"optimizer.learning_rate": own},
        measure=MeasureConfig(),
    )


SWEEPS = {"cpu": rates(on("cpu", "trunk-d256")), "gpu": rates(on("gpu", "trunk-d768"))}
