"""What the recipes have in common: trunks, data and optimizers, in a size for two CPU cores and in one for a GPU.

A trunk is trained with a next-token loss and is frozen; heads of all kinds are then trained on it, at a constant
learning rate, so that a run that is stopped early is a shorter run. All of them preserve the law of the trunk's own
next-token head (target `ntp`), so that their acceptance can be compared, and their text is the same.
"""

from dataclasses import replace

from mtp_jax import DataConfig, HeadConfig, ModelConfig, OptimizerConfig, TrainConfig

# Every field that runs here depend on: whatever the defaults become, they go on and are measured again. Balanced
# strongly: else components that begin alike stay so for a third of such short runs.
PLAIN = HeadConfig(window=4, rank=4, factors="full", factor_width=64, balance_weight=1.0, init_noise=0.02)
NEXT_TOKEN = replace(PLAIN, circuit="independent", window=1, rank=1, balance="none", balance_weight=0.05)

MODEL_CPU = ModelConfig(
    vocab_size=264,
    d_model=512,
    d_ff=1024,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    context_length=512,
    dtype="float32",
)
# 56 million parameters in the layers, as the paper's models of short stories have in all.
MODEL_GPU = ModelConfig(
    vocab_size=264,
    d_model=768,
    d_ff=2048,
    num_layers=8,
    num_heads=12,
    num_kv_heads=12,
    context_length=1024,
    dtype="bfloat16",
    attention="cudnn",
)

TRUNK_CPU = TrainConfig(
    model=MODEL_CPU,
    head=NEXT_TOKEN,
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
    steps=600,
    eval_every=150,
    eval_batches=16,
    checkpoint_every=150,
)
TRUNK_GPU = replace(
    TRUNK_CPU,
    model=MODEL_GPU,
    data=DataConfig(source="packages", seq_len=1024, batch_size=64),
    optimizer=replace(TRUNK_CPU.optimizer, learning_rate=2e-3, warmup_steps=200),
    steps=8000,
    eval_every=1000,
    checkpoint_every=1000,
)


def for_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """The run with so many steps. Twelve checkpoints are kept to read it by."""
    return replace(
        config,
        steps=steps,
        optimizer=replace(config.optimizer, warmup_steps=steps // 20),
        eval_every=steps // 12,
        checkpoint_every=steps // 12,
        keep_checkpoints=12,
        ema_decay=1 - 12 / steps,  # what is read is the average of about the steps since the checkpoint before
    )


def heads(trunk: TrainConfig, *, steps: int, batch_size: int, learning_rate: float, base: str) -> TrainConfig:
    """Runs of heads on a `trunk` that stays as it is, the run `base`."""
    config = replace(
        trunk,
        head=replace(PLAIN, target="ntp", ntp_weight=0.0),
        data=replace(trunk.data, batch_size=batch_size),
        # Not Muon: for small batches its products with every factor's matrix cost more than the gradients, R times.
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="constant",
            weight_decay=0.0,
        ),
        eval_batches=8,
        base=base,
    )
    return for_steps(config, steps)


HEADS_CPU = heads(TRUNK_CPU, steps=480, batch_size=2, learning_rate=2e-3, base="trunk")
HEADS_GPU = heads(TRUNK_GPU, steps=2400, batch_size=64, learning_rate=1e-3, base="trunk")
