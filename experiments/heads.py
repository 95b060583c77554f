"""Which head? Mixtures and what the field uses, on one frozen base, by the tokens that a forward gives and their cost.

    mtp-jax import HuggingFaceTB/SmolLM2-135M-Instruct --out runs/base
    mtp-jax data regenerate --base runs/base --source prompts.jsonl --out data/own --max-new-tokens 256
    mtp-jax data hidden --base runs/base --source data/own --out data/states --seq-len 512
    mtp-jax sweep experiments/heads.py@rates     # the learning rate, of one of each kind
    mtp-jax sweep experiments/heads.py
    mtp-jax report experiments/results/heads-cpu.json --out reports/heads

`@gpu` for one GPU; `@bytes` is the same on a byte model of ours, which is trained first. The suite, `data/dev.jsonl`,
has prompts that the data has not, with a `category` each. Seeds come one after the other: `--only` names runs, and
`--collect` ends early.

| case | what it is |
| --- | --- |
| medusa | a residual block per offset under the model's table (arXiv 2401.10774) |
| gloeckle | a map per offset, all else alike (arXiv 2404.19737) |
| cpd-R | a mixture of R products (arXiv 2410.17765); -token: told the token that was chosen |
| hmm-R, btree-R | components that change along the window (arXiv 2511.11346), told that token |
| hydra | a module from offset to offset, without attention (arXiv 2402.05109) |
| eagle | the same with attention and a cache (arXiv 2401.15077, 2412.19437) |
| block-R | a mixture behind a block with attention |

Those that are cheap have more steps than `cpd-4`, so that all can be read at its wall-clock.
There are no results yet.
"""

from dataclasses import replace
from typing import Any

from losses import MEASURE, ON_STATES, on_gpu
from setting import HEADS_CPU, TRUNK_CPU

from mtp_jax import MeasureConfig, Sweep, TrainConfig

SEQUENTIAL = {"head.kind": "sequential"}
TOKEN = {"head.encoder": "token"}


def one(factors: str) -> dict[str, Any]:
    """A single component."""
    return {"head.circuit": "independent", "head.rank": 1, "head.factors": factors, "head.balance": "none"}


def cases(steps: int) -> dict[str, dict[str, Any]]:
    """All heads; `steps` are those of a mixture of four."""
    more = {"steps": 3 * steps}
    return {
        "cpd-4": {"head.rank": 4},
        "medusa": {**one("residual"), **more},
        "gloeckle": {**one("shared"), **more},
        "cpd-8": {"head.rank": 8},
        "cpd-4-token": {"head.rank": 4, **TOKEN},
        "cpd-8-token": {"head.rank": 8, **TOKEN},
        "hmm-4-token": {"head.rank": 4, "head.circuit": "hmm", **TOKEN},
        "btree-4-token": {"head.rank": 4, "head.circuit": "btree", **TOKEN},
        "hydra": {**SEQUENTIAL, **more},
        "eagle": {**SEQUENTIAL, "head.attention": True, **more},
        "block-4": {"head.rank": 4, "head.encoder": "block"},
    }


def sweep(base: TrainConfig, measure: MeasureConfig, first: dict[str, TrainConfig]) -> Sweep:
    """All of them, against the mixture of four that reads the hidden state alone."""
    return Sweep(base, {"seed": (0, 1, 2)}, cases(base.steps), {"case": "cpd-4"}, first, measure)


def rates(base: TrainConfig, measure: MeasureConfig) -> Sweep:
    """Three rates for one of each kind, in a third of the steps."""
    steps = base.steps // 3
    short = replace(base, steps=steps, eval_every=steps, checkpoint_every=steps // 3)
    some = {name: case for name, case in cases(steps).items() if name in ("cpd-4", "cpd-4-token", "hydra", "eagle")}
    own = base.optimizer.learning_rate
    grid = {"optimizer.learning_rate": (own / 2, own, 2 * own), "seed": (0,)}
    return Sweep(short, grid, some, {"optimizer.learning_rate": own}, measure=measure)


ON_SMOLLM2 = replace(
    ON_STATES,
    head=replace(ON_STATES.head, window=8, encoder="none"),
    steps=360,
    eval_every=180,
    checkpoint_every=40,
    keep_checkpoints=27,
)
ON_BYTES = replace(
    HEADS_CPU,
    head=replace(HEADS_CPU.head, window=8, factors="lora", factor_width=16, init_noise=1.0),
    steps=360,
    eval_every=120,
    checkpoint_every=40,
    keep_checkpoints=27,
)
ON_TEXTS = replace(MEASURE, ks=(1, 3, 5))
SWEEPS = {
    "cpu": sweep(ON_SMOLLM2, ON_TEXTS, {}),
    "gpu": sweep(
        replace(on_gpu(ON_SMOLLM2), steps=3600, eval_every=1800, checkpoint_every=400),
        ON_TEXTS,
        {},
    ),
    "rates": rates(ON_SMOLLM2, replace(MEASURE, ks=(3,), rounds=3)),
    "bytes": sweep(
        ON_BYTES, MeasureConfig(prompts=80, temperatures=(0.7, 0.0), ks=(1, 3, 5), rounds=10), {"trunk": TRUNK_CPU}
    ),
}
