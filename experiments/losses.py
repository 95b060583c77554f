"""Which loss for a head on a pretrained model? Log-likelihood alone, the LK loss, and a sum of the two.

    mtp-jax import HuggingFaceTB/SmolLM2-135M-Instruct --out runs/base
    mtp-jax data regenerate --base runs/base --source prompts.jsonl --out data/own --max-new-tokens 256
    mtp-jax data hidden --base runs/base --source data/own --out data/states --seq-len 512
    mtp-jax sweep experiments/losses.py
    mtp-jax report experiments/results/losses-cpu.json --out reports/losses

`@long` takes ten minutes a run, `@gpu` is for one GPU. The suite, `data/dev.jsonl`, has prompts that the data has not,
with a `category` each. The log-likelihood needs no law of the model, whose logits cost more than all of the head: with
the others a run has half the steps, and they are compared at equal wall-clock.

Tried once (one seed, commit c8be27e, 24 prompts of 128 new tokens, T = 0.7, k = 3; a step against the law takes 3.2
times one of the log-likelihood): tokens per forward with intervals over prompts

| loss | after 80 steps | after as long as 160 steps of the log-likelihood |
| --- | --- | --- |
| log-likelihood | 1.363 [1.285, 1.443] | 1.428 [1.346, 1.513] |
| LK | 1.379 [1.305, 1.455] | 1.340 [1.279, 1.404] (50 steps) |
| both | 1.371 [1.294, 1.451] | 1.334 [1.273, 1.400] (50 steps) |

So the law paid where text was short, and not where time was. Tiles are larger since, and a step against the law takes
2.2 times one of the log-likelihood: the right column was not run again.
"""

from dataclasses import replace
from typing import Any

from head_on_base import CONFIG

from mtp_jax import MeasureConfig, OptimizerConfig, Sweep, TrainConfig

ON_STATES = replace(
    CONFIG,
    base="runs/base",
    head=replace(CONFIG.head, shortlist=4096, nll_weight=1.0, lk_weight=0.0),
    data=replace(CONFIG.data, source="data/states", batch_size=2),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0),
    eval_batches=1,
    checkpoint_every=10,
    eval_temperatures=(),
)
MEASURE = MeasureConfig(
    suite="data/dev.jsonl",
    held_out_sequences=8,
    prompts=8,
    batch_size=8,
    prompt_tokens=32,
    new_tokens=128,
    temperatures=(0.7,),
    ks=(1, 3),
    rounds=5,
)


def on_gpu(config: TrainConfig) -> TrainConfig:
    """The run with larger batches."""
    return replace(config, data=replace(config.data, batch_size=32), checkpoint_every=100)


def for_steps(steps: int) -> dict[str, Any]:
    """What goes with a number of steps. What is read is the average of about the last twelfth of them."""
    return {"steps": steps, "optimizer.warmup_steps": steps // 20, "ema_decay": 1 - 12 / steps}


def losses(base: TrainConfig, steps: int) -> Sweep:
    """All three, of three seeds."""
    half = for_steps(steps // 2)
    return Sweep(
        replace(base, eval_every=steps // 2, keep_checkpoints=steps // base.checkpoint_every),
        {"seed": (0, 1, 2)},
        {
            "nll": {**for_steps(steps)},
            "lk": {"head.nll_weight": 0.0, "head.lk_weight": 1.0, **half},
            "nll + lk": {"head.lk_weight": 1.0, **half},
        },
        reference={"case": "nll"},
        measure=MEASURE,
    )


SWEEPS = {
    "cpu": losses(ON_STATES, 160),
    "long": losses(replace(ON_STATES, checkpoint_every=25), 600),
    "gpu": losses(on_gpu(ON_STATES), 2400),
}
