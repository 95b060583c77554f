"""Which loss for a head on a pretrained model? Log-likelihood alone, the LK loss, and a sum of the two.

    mtp-jax import HuggingFaceTB/SmolLM2-135M-Instruct --out runs/base
    python experiments/prompts.py prompts.jsonl --count 1400 --base runs/base
    python experiments/prompts.py data/dev.jsonl --count 48 --held-out
    mtp-jax data regenerate --base runs/base --source prompts.jsonl --out data/own --max-new-tokens 256
    mtp-jax data hidden --base runs/base --source data/own --out data/states --seq-len 512
    mtp-jax sweep experiments/losses.py
    mtp-jax report experiments/results/losses-cpu.json --out reports/losses

`@long` takes ten minutes of training a run, `@gpu` is for one GPU. The suite, `data/dev.jsonl`, has prompts of subjects
that the data has not, with a `category` each; any other will do. The log-likelihood needs no law of the model, so with
the others a step takes 1.6 times as long (docs/benchmarks.md): they have five eighths of the steps, and are compared at
equal wall-clock.

What `@long` gave (three seeds, commit ded890a, two cores of an Intel Xeon, 24 prompts of 128 new tokens, T = 0.7,
k = 3; the second look at these losses): tokens per forward, and the difference to the log-likelihood, with intervals of
95% over seeds and prompts. The cache had no normaliser of the law then: a step against it took 2.0 times one of the
log-likelihood, and had half as many

| loss | 640 steps | ten minutes |
| --- | --- | --- |
| log-likelihood | 1.622 [1.500, 1.744] | 1.668 [1.541, 1.795] |
| LK | +0.004 [-0.006, +0.015] | -0.042 [-0.074, -0.009] |
| both | +0.002 [-0.012, +0.016] | -0.044 [-0.072, -0.016] |

So in a few passes over the text the law says no more than the text, and at equal time the log-likelihood is ahead.
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
    fewer = for_steps(steps * 5 // 8)
    return Sweep(
        replace(base, eval_every=steps // 2, keep_checkpoints=steps // base.checkpoint_every),
        {"seed": (0, 1, 2)},
        {
            "nll": {**for_steps(steps)},
            "lk": {"head.nll_weight": 0.0, "head.lk_weight": 1.0, **fewer},
            "nll + lk": {"head.lk_weight": 1.0, **fewer},
        },
        reference={"case": "nll"},
        measure=MEASURE,
    )


SWEEPS = {
    "cpu": losses(ON_STATES, 160),
    "long": losses(replace(ON_STATES, checkpoint_every=80), 1280),
    "gpu": losses(on_gpu(ON_STATES), 2400),
}
