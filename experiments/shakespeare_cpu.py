"""A CPD model of Shakespeare's plays, byte by byte, in minutes on two CPU cores.

    mtp-jax train experiments/shakespeare_cpu.py
    mtp-jax generate runs/shakespeare_cpu --prompt 'KING RICHARD' --temperature 0.7
    mtp-jax bench decode runs/shakespeare_cpu --prompt-tokens 64 --prompts 16

Data: the plain text of the plays in data/shakespeare.txt (the "tinyshakespeare" file of 1.1 MB, say; any text with
blank lines between its parts will do). A speech is a document, so no speech of the held-out ones was seen.

Cost: 12 minutes of training on two cores of an AMD EPYC that other work shared.
Expect: validation loss by offset 1.48 1.80 2.07 2.37 nats per byte, 3.9 of 4 components in use; at T = 0.7 1.65, 2.02
and 2.25 tokens per forward with k = 1, 2, 3. That did not pay there: measured beside other work, a forward of two to
four tokens cost 2.7 to 3.4 times one of a single token, and decoding with drafts ran at 0.6 of plain speed.
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
    head=HeadConfig(window=4, rank=4, factors="full", target="marginal", balance_weight=0.05, init_noise=0.02),
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
