"""A CPD model of short stories, over a vocabulary of 1,024 byte pairs, in minutes on two CPU cores.

    mtp-jax tokenizer train --source data/stories.txt --separator '<|endoftext|>' \\
        --vocab-size 1024 --out data/stories.json
    mtp-jax train experiments/stories_cpu.py
    mtp-jax generate runs/stories_cpu --prompt 'Once upon a time' --temperature 0.7
    mtp-jax bench decode runs/stories_cpu --prompt-tokens 32 --prompts 16 --new-tokens 128

Data: stories in data/stories.txt with <|endoftext|> between them (TinyStories, arXiv 2305.07759, say; this run read
8.6 MB of it). The tokenizer is made of the stories that are trained on.

Cost: 14 minutes of training on two cores of an AMD EPYC that other work shared.
Expect: validation loss by offset 2.74 3.61 4.06 4.57 nats per token (3.1 bytes), 3.8 of 4 components in use; at T = 0.7
1.49, 1.68 and 1.77 tokens per forward with k = 1, 2, 3. That did not pay there: beside other work, a forward of two to
four tokens cost 2.0 to 2.5 times one of a single token, and decoding with drafts ran at 0.7 of plain speed (0.9 at
T = 0).
"""

from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=1024,
        d_model=384,
        d_ff=768,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        context_length=512,
        dtype="float32",
    ),
    head=HeadConfig(
        window=4,
        rank=4,
        factors="lowrank",
        factor_width=64,
        target="marginal",
        balance_weight=0.05,
        init_noise=0.02,
    ),
    data=DataConfig(
        source="data/stories.txt",
        separator="<|endoftext|>",
        tokenizer="hf:data/stories.json",
        seq_len=256,
        batch_size=6,
    ),
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
