"""A CPD model of Shakespeare's plays, byte by byte, in minutes on two CPU cores.

    mtp-jax train experiments/shakespeare_cpu.py
    mtp-jax generate runs/shakespeare_cpu --prompt 'KING RICHARD' --temperature 0.7
    mtp-jax bench decode runs/shakespeare_cpu --prompt-tokens 64 --prompts 16

Data: the plain text of the plays in data/shakespeare.txt (the "tinyshakespeare" file of 1.1 MB, say; any text with
blank lines between its parts will do). A speech is a document, so no speech of the held-out ones was seen.
"""

from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=264,
        d_model=384,
        d_ff=768,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        context_length=512,
        dtype="float32",
    ),
    head=HeadConfig(kind="cpd", window=4, rank=4, factors="full", target="marginal"),
    data=DataConfig(source="data/shakespeare.txt", separator=r"\n\n", seq_len=256, batch_size=6),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=3e-3,
        schedule="wsd",
        warmup_steps=30,
        decay_fraction=0.35,
        final_lr_fraction=0.02,
        weight_decay=0.05,
    ),
    steps=500,
    eval_every=100,
    eval_batches=24,
    checkpoint_every=250,
)
