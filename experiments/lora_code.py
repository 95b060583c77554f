"""Does rank pay if a component is cheap? Low-rank components against rank 1, on the frozen trunk of rank_code.py.

    mtp-jax sweep experiments/rank_code.py --only trunk      # what the heads are trained on, once
    mtp-jax sweep experiments/lora_code.py
    mtp-jax report experiments/results/lora_code-cpu.json --out reports/lora_code

`@gpu` for one GPU. With `full` factors a component costs as much as a head of rank 1, in training and in every draft:
of bytes, 16 of them weigh more than this trunk. With `lora` they share an unembedding for each offset, and differ by
corrections of width 16. The reference is rank 1 with `full` factors, so rank is not all that differs; there is no
`lora` of rank 1, which would be such a head with a useless correction.

Cost: about an hour on two cores, a third of it for each seed, and 5 minutes for the costs of a step and an iteration.
Found (results/lora_code-cpu.json; T = 0.7, three seeds): at equal steps ranks 4, 8 and 16 give 0.21, 0.31 and 0.38 more
tokens per forward than the 1.78 of rank 1, and at equal wall-clock of training about 1.05 to 1.12 times its tokens per
second; the clock of that machine leaves 0.98 to 1.22 (intervals widened for three comparisons). That was at commit
c3e91f8, on a trunk of 400 steps, of the parameters and not of their average.
"""

from dataclasses import replace

from balance import SWEEPS as ON_TRUNK
from setting import for_steps

from mtp_jax import Sweep

CASES = {"full-1": {"head.factors": "full", "head.rank": 1}} | {
    f"lora-{rank}": {
        "head.factors": "lora",
        "head.rank": rank,
        "head.factor_width": 16,
        "head.init_noise": 1.0,  # a correction begins as large as what it corrects
    }
    for rank in (4, 8, 16)
}


def cheap(sweep: Sweep) -> Sweep:
    """All of them against rank 1."""
    longer = for_steps(sweep.base, 3 * sweep.base.steps)
    return replace(sweep, base=longer, grid={"seed": (0, 1, 2)}, cases=CASES, reference={"case": "full-1"})


SWEEPS = {size: cheap(sweep) for size, sweep in ON_TRUNK.items()}
