"""Does rank pay if a component is cheap? Low-rank components against rank 1, on the frozen trunk of rank_code.py.

    mtp-jax sweep experiments/rank_code.py --only trunk      # what the heads are trained on, once
    mtp-jax sweep experiments/lora_code.py
    mtp-jax report experiments/results/lora_code-cpu.json --out reports/lora_code

`@gpu` for one GPU. With `full` factors a component costs as much as a head of rank 1, in training and in every draft:
of bytes, 16 of them weigh more than this trunk. With `lora` they share an unembedding for each offset, and differ by
corrections of width 16. The reference is rank 1 with `full` factors, the cheapest head there is.

Cost: about 45 minutes on two cores, 20 for the costs and the first seed, 12 for each of the others.
Found (results/lora_code-cpu.json, three seeds): at equal wall-clock of training ranks 4, 8 and 16 give 1.06, 1.12 and
1.06 times the tokens per second of rank 1 at T = 0.7; the intervals of the last two, 1.032 to 1.197 and 0.996 to 1.133,
are mostly those of the clock and of the seeds. Tokens per forward: 1.78 for rank 1, and 0.21, 0.27 and 0.34 more.
"""

from dataclasses import replace

from balance import SWEEPS as ON_TRUNK

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
    return replace(sweep, grid={"seed": (0, 1, 2)}, cases=CASES, reference={"case": "full-1"})


SWEEPS = {size: cheap(sweep) for size, sweep in ON_TRUNK.items()}
