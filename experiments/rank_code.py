"""Does rank pay on code? Heads of rank 1 to 16 on one frozen trunk, which is a model of Python source.

    mtp-jax sweep experiments/rank_code.py          # two CPU cores
    mtp-jax sweep experiments/rank_code.py@gpu      # one GPU, 56 million parameters
    mtp-jax report experiments/results/rank_code-cpu.json --out reports/rank_code

The primary comparison: one target for all ranks. The results were made when acceptance was measured too with drafts
that do not know which token the target chose (`unconditioned`).

Cost on two cores: 17 minutes for the trunk (with other work beside it), 8 for the costs of a step and an iteration, 4
to 7 for each run of the first seed (7 to 9 for those of the others, which had other work beside them). `--only NAME`
does one at a time. That was before acceptance and iterations were measured at every k, which takes longer.
Found (results/rank_code-cpu.json; ranks 1 and 4 with three seeds, ranks 2, 8 and 16 with one; T = 0.7): at equal
wall-clock of training rank 4 has a joint loss lower by 0.79 nats a window than rank 1, 0.17 more tokens per forward
than its 1.72, and 0.84 times its tokens per second: each component of `full` factors adds a table for each offset to
what is read in every iteration. lora_code.py has cheaper ones.
"""

from setting import HEADS_CPU, HEADS_GPU, TRUNK_CPU, TRUNK_GPU

from mtp_jax import Sweep

GRID = {"head.rank": (1, 2, 4, 8, 16), "seed": (0, 1, 2)}

SWEEPS = {
    "cpu": Sweep(HEADS_CPU, GRID, reference={"head.rank": 1}, first={"trunk": TRUNK_CPU}),
    "gpu": Sweep(HEADS_GPU, GRID, reference={"head.rank": 1}, first={"trunk": TRUNK_GPU}),
}
