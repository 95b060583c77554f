"""Which head? Mixtures and what the field uses, on one frozen base, by the tokens that a forward gives and their cost.

    mtp-jax import HuggingFaceTB/SmolLM2-135M-Instruct --out runs/base
    python experiments/prompts.py prompts.jsonl --count 1400 --base runs/base
    python experiments/prompts.py data/dev.jsonl --count 48 --held-out
    mtp-jax data regenerate --base runs/base --source prompts.jsonl --out data/own --max-new-tokens 256
    mtp-jax data hidden --base runs/base --source data/own --out data/states --seq-len 512
    mtp-jax sweep experiments/heads.py@rates     # the learning rate, of four
    mtp-jax sweep experiments/heads.py
    mtp-jax report experiments/results/heads-cpu.json --out reports/heads

`@gpu` for one GPU; `@bytes` is the same on a byte model of ours, which is trained first. The suite, `data/dev.jsonl`,
has prompts that the data has not, with a `category` each; any other will do. Seeds come one after the other: `--only`
names runs, and `--collect` ends early.

| case | what it is |
| --- | --- |
| medusa | a residual block per offset under the model's table (arXiv 2401.10774) |
| gloeckle | a map per offset, all else alike (arXiv 2404.19737) |
| cpd-R | a mixture of R products (arXiv 2410.17765); -token: told the token that was chosen |
| hmm-R, btree-R | components that change along the window (arXiv 2511.11346), told that token |
| hydra | a module from offset to offset, without attention (arXiv 2402.05109) |
| eagle | the same with attention and a cache (arXiv 2401.15077, 2412.19437) |
| block-R | a mixture behind a block with attention |

On SmolLM2 each has about as many steps as five minutes hold on two cores without AMX, and all are read at the
wall-clock of `medusa`; in `@bytes` all have the same. On SmolLM2 all draft at 0.6 of the text's temperature.

Cost on two cores of an AMD EPYC with AVX2: of `@bytes` (commit 6b3638a) 24 minutes of training the trunk, 17 of timing
steps and iterations, and on one core 7 to 15 for a run, its training and its measuring; on SmolLM2 41 minutes of
timing, and on one core 15 to 18 for a run, a third of it measuring.

Found on bytes (results/heads-bytes.json; W = 8, T = 0.7, k = 7; three seeds of the heads here, one of the others, and
`hydra` and `eagle` were not run): tokens per forward, and the difference to cpd-4-token with intervals of 95%

| head | equal steps | | equal wall-clock | |
| --- | --- | --- | --- | --- |
| medusa | 1.862 | -0.449 [-0.495, -0.403] | 1.862 | -0.317 [-0.370, -0.263] |
| cpd-4-token | 2.311 | | 2.179 | |
| hmm-4-token | 2.356 | +0.044 [-0.050, +0.139] | 2.207 | +0.028 [-0.041, +0.098] |
| btree-4-token | 2.356 | +0.045 [+0.012, +0.079] | 2.240 | +0.061 [+0.012, +0.110] |

So being told the token gains most, and a component that changes in halves adds 2.8% at equal wall-clock. The trunk is
so small that a head takes most of an iteration: with three drafts medusa decodes as fast as they do.

Found (results/heads-cpu.json; SmolLM2, 127,849 tokens of its answers, W = 8, T = 0.7, k = 7, 24 prompts; one seed,
and the other heads were not run; the same machine, commit bc90963 with these steps): expected tokens per forward, and
the difference to medusa with intervals of 95% over the prompts

| head | training step | five minutes | |
| --- | --- | --- | --- |
| medusa | 1 | 1.355 | |
| cpd-4-token | 2.34 | 1.444 | +0.089 [+0.059, +0.119] |
| btree-4-token | 2.33 | 1.442 | +0.087 [+0.058, +0.116] |
| hydra | 3.58 | 1.425 | +0.070 [+0.029, +0.110] |
| eagle | 5.05 | 1.371 | +0.015 [-0.025, +0.055] |
| block-4 | 2.54 | 1.426 | +0.070 [+0.045, +0.096] |

Again being told the token gains, and here circuits do not differ. That is too little for this processor: with k = 3 an
iteration takes 1.4 to 1.7 times one of plain decoding, so at T = 0.7 none of them decodes faster than it after five
minutes; `pretrained.py` trains for longer, and three drafts instead of seven. Of the rates (results/heads-rates.json,
one seed) the middle one was the best of three for cpd-4-token, and as good as the larger for hydra and eagle; medusa
was measured at the middle one alone.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from losses import MEASURE, ON_STATES, for_steps, on_gpu
from setting import HEADS_CPU, TRUNK_CPU

from mtp_jax import MeasureConfig, Sweep, TrainConfig

SEQUENTIAL = {"head.kind": "sequential"}
TOKEN = {"head.encoder": "token"}


def one(factors: str) -> dict[str, Any]:
    """A single component."""
    head = {"circuit": "independent", "rank": 1, "factors": factors, "balance": "none", "encoder": "hidden"}
    return {f"head.{name}": value for name, value in head.items()}


HEADS: dict[str, dict[str, Any]] = {
    "medusa": one("residual"),
    "gloeckle": one("shared"),
    "cpd-4": {"head.rank": 4},
    "cpd-8": {"head.rank": 8},
    "cpd-4-token": {"head.rank": 4, **TOKEN},
    "cpd-8-token": {"head.rank": 8, **TOKEN},
    "hmm-4-token": {"head.rank": 4, "head.circuit": "hmm", **TOKEN},
    "btree-4-token": {"head.rank": 4, "head.circuit": "btree", **TOKEN},
    "hydra": SEQUENTIAL,
    "eagle": {**SEQUENTIAL, "head.attention": True},
    "block-4": {"head.rank": 4, "head.encoder": "block"},
}
# Steps of ten minutes on two cores, on SmolLM2, but for cpd-4 and cpd-8, of which fewer would say nothing: behind no
# encoder a component has the whole vocabulary once.
STEPS = {"medusa": 760, "gloeckle": 760, "cpd-4": 160, "cpd-8": 160, "cpd-8-token": 230, "hydra": 200, "eagle": 150}
KINDS = "medusa", "cpd-4-token", "hydra", "eagle"


def timed(names: Iterable[str], share: float, every: int = 10) -> dict[str, dict[str, Any]]:
    """These heads, each with a share of the steps of ten minutes, in so many at a time."""
    return {name: {**HEADS[name], **for_steps(round(share * STEPS.get(name, 310) / every) * every)} for name in names}


def on(base: TrainConfig, **changes: Any) -> TrainConfig:
    """Runs of W = 8, saved every ten steps."""
    return replace(base, **changes, eval_every=100, eval_batches=1, checkpoint_every=10, keep_checkpoints=48)


ON_SMOLLM2 = on(ON_STATES, head=replace(ON_STATES.head, window=8, encoder="none"))
ON_BYTES = on(
    HEADS_CPU, head=replace(HEADS_CPU.head, window=8, factors="lora", factor_width=16, init_noise=1.0), steps=360
)
ON_GPU = replace(on_gpu(ON_SMOLLM2), checkpoint_every=100)
ON_TEXTS = replace(MEASURE, temperatures=(0.7, 0.0), ks=(3, 5), rounds=3)
SEEDS = {"seed": (0, 1, 2)}
MEDUSA = {"case": "medusa"}
OWN = ON_STATES.optimizer.learning_rate
RATES = {"optimizer.learning_rate": (OWN / 2, OWN, 2 * OWN), "seed": (0,)}
SWEEPS = {
    "cpu": Sweep(ON_SMOLLM2, SEEDS, timed(HEADS, 1 / 2), MEDUSA, measure=ON_TEXTS),
    "gpu": Sweep(ON_GPU, SEEDS, timed(HEADS, 6, 100), MEDUSA, measure=ON_TEXTS),
    "rates": Sweep(ON_SMOLLM2, RATES, timed(KINDS, 1 / 6), {"optimizer.learning_rate": OWN}, measure=ON_TEXTS),
    "bytes": Sweep(
        ON_BYTES,
        SEEDS,
        HEADS,
        MEDUSA,
        first={"trunk": TRUNK_CPU},
        measure=MeasureConfig(prompts=80, new_tokens=128, temperatures=(0.7, 0.0), ks=(3, 5), rounds=5),
    ),
}
