"""The demo: a CPD model of Python source code, in minutes on two CPU cores.

    mtp-jax train experiments/code_cpu.py            # what `make demo` runs first
    mtp-jax generate runs/code_cpu --held-out 3
    mtp-jax bench decode runs/code_cpu --report

Data: the source of the running interpreter's standard library, split by file; byte tokens.
Shape: few wide layers, because on a CPU a forward of k + 1 tokens costs least, next to one of a single token, where
the time goes into reading large matrices. Sequences of 384 tokens cover the positions that the benchmark decodes
(96 + 256).

Cost: 5 to 8 minutes of training on two cores; the three commands take 8 to 16.
Expect: validation loss by offset 1.9 2.1 2.2 2.4 nats per byte, 7 of the 8 components in effect, about 2.5 tokens per
forward at T = 0.7 with k = 3, and decoding 1.5 to 1.8 times as fast as without drafts. A change in the last digit of
any sum, or another interpreter's library, leads to another model, so the figures differ a little; at T = 0, where a
model this small repeats itself, they differ a lot.
"""

from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=264,
        d_model=512,
        d_ff=1024,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        context_length=512,
        dtype="float32",
    ),
    head=HeadConfig(window=4, rank=8, factors="lora", factor_width=16, balance_weight=1.0, init_noise=1.0),
    data=DataConfig(source="stdlib", seq_len=384, batch_size=3),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=3e-3,
        schedule="wsd",
        warmup_steps=30,
        decay_fraction=0.35,
        final_lr_fraction=0.02,
        weight_decay=0.05,
    ),
    steps=320,
    eval_every=80,
    eval_batches=24,
    checkpoint_every=160,
)
