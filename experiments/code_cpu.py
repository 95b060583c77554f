"""The demo: a CPD model of Python source code, in minutes on two CPU cores.

    mtp-jax train experiments/code_cpu.py            # what `make demo` runs first
    mtp-jax generate runs/code_cpu --held-out 3
    mtp-jax bench decode runs/code_cpu --report

Data: the source of the running interpreter's standard library, split by file; byte tokens.
Shape: the trunk is heavy next to the head, and wide next to its depth, because on a CPU a forward of k + 1 tokens costs
least, next to one of a single token, where the time goes into reading weights. Sequences of 384 tokens cover
the positions that the benchmark decodes (96 + 256).

Cost: about 4.5 minutes of training on two cores; the three commands take about 7 minutes.
Expect: validation loss by offset 1.8 2.1 2.2 2.3 2.5 nats per byte, 3.8 of 4 components in use, 2.4 to 2.8 tokens per
forward at T = 0.7 with k = 4, and decoding at T = 0.7 about 1.1 times as fast as without drafts. A change in the last
digit of any sum, or another interpreter's library, leads to another model, so the figures differ a little.
"""

from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=264,
        d_model=256,
        d_ff=704,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        context_length=512,
        dtype="float32",
    ),
    head=HeadConfig(kind="cpd", window=5, rank=4, factors="full", target="marginal"),
    data=DataConfig(source="stdlib", seq_len=384, batch_size=3),
    optimizer=OptimizerConfig(
        name="adamw",
        learning_rate=3e-3,
        schedule="wsd",
        warmup_steps=30,
        decay_fraction=0.35,
        final_lr_fraction=0.02,
        weight_decay=0.05,
    ),
    steps=640,
    eval_every=80,
    eval_batches=24,
    checkpoint_every=320,
)
