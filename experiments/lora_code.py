"""Does rank pay if a component is cheap? Low-rank components against rank 1, on a frozen trunk as of rank_code.py.

    mtp-jax sweep experiments/rank_code.py --only trunk      # what the heads are trained on, once
    mtp-jax sweep experiments/lora_code.py
    mtp-jax report experiments/results/lora_code-cpu.json --out reports/lora_code

`@gpu` for one GPU. With `full` factors a component costs as much as a head of rank 1, in training and in every draft:
of bytes, 16 of them weigh more than this trunk. With `lora` they share an unembedding for each offset, and differ by
corrections of width 16. The reference is rank 1 with `full` factors, so rank is not all that differs; there is no
`lora` of rank 1, which would be such a head with a useless correction. Heads have three times the steps of
rank_code.py: rank 1 has learnt most of what it can by then (a held-out joint loss of 9.96 after a third of them and of
9.90 at the end, seed 0), and higher ranks go on.

Cost on two cores: 6 minutes for the costs of a step and an iteration, 4 to 6 for each run of the first seed, and 11 for
two of the others at a time.
Found (results/lora_code-cpu.json; ranks 8 and 16, three seeds, T = 0.7; the trunk was trained anew): at equal steps
they give 0.40 and 0.53 more tokens per forward than the 1.80 of rank 1, and at equal wall-clock of training 1.135
[1.102, 1.167] and 1.172 [1.151, 1.194] times its tokens per second, each at its best k, which is 3.
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
    """All of them against rank 1, for three times the steps."""
    longer = for_steps(sweep.base, 3 * sweep.base.steps)
    return replace(sweep, base=longer, grid={"seed": (0, 1, 2)}, cases=CASES, reference={"case": "full-1"})


SWEEPS = {size: cheap(sweep) for size, sweep in ON_TRUNK.items()}
