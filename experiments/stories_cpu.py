"""A CPD model of short stories, over a vocabulary of 1,024 byte pairs, in minutes on two CPU cores.

    mtp-jax tokenizer train --source data/stories.txt --separator '<|endoftext|>' \\
        --vocab-size 1024 --out data/stories.json
    mtp-jax train experiments/stories_cpu.py
    mtp-jax generate runs/stories_cpu --prompt 'Once upon a time' --temperature 0.7
    mtp-jax bench decode runs/stories_cpu --prompt-tokens 32 --prompts 16 --new-tokens 128

Data: stories in data/stories.txt with <|endoftext|> between them (TinyStories, arXiv 2305.07759, say; this run read
8.6 MB of it). The tokenizer is made of the stories that are trained on.
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
    head=HeadConfig(kind="cpd", window=4, rank=4, factors="lowrank", factor_width=64, target="marginal"),
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
