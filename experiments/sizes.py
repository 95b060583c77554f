"""Does what rank gives hold across model sizes? Rank 1 and 4 on frozen trunks of two sizes (three on a GPU), of code.

    mtp-jax sweep experiments/sizes.py
    mtp-jax report experiments/results/sizes-cpu.json experiments/results/rank_code-cpu.json --out reports/sizes

`@gpu` for one GPU. On the CPU the trunk of rank_code.py is the third size.

Cost on two cores: 12 minutes for both trunks at the same time, 8 for the costs of a step and an iteration, alone, and
28 for the 12 runs, two at a time.
Found (results/sizes-cpu.json; three seeds, T = 0.7, equal wall-clock of training): rank 4 has a joint loss lower by
0.77, 0.75 and 0.79 nats a window at widths 256, 384 and 512 (of rank_code.py, on another machine), and 0.19, 0.17 and
0.17 more tokens per forward, so what it gives holds across these sizes. With `full` factors it is not faster: 0.90,
0.95 and 0.84 times the tokens per second.
"""

from dataclasses import replace

from setting import HEADS_CPU, HEADS_GPU, TRUNK_CPU, TRUNK_GPU

from mtp_jax import MeasureConfig, Sweep, TrainConfig

SIZES = {
    "cpu": {"d256": (256, 512, 3, 4), "d384": (384, 768, 3, 6)},
    "gpu": {"d384": (384, 1024, 8, 6), "d768": (768, 2048, 8, 12), "d1280": (1280, 3456, 12, 20)},
}


def shape(size: tuple[int, int, int, int]) -> dict[str, int]:
    """The fields of the model of a size."""
    return dict(zip(("d_model", "d_ff", "num_layers", "num_heads"), size, strict=True))


def sweep(name: str, trunk: TrainConfig, heads: TrainConfig) -> Sweep:
    """Both ranks on each size."""
    # Key and value heads: two on the CPU, as many as query heads on the GPU.
    models = {
        size: {**shape(of), **({} if name == "cpu" else {"num_kv_heads": of[3]})} for size, of in SIZES[name].items()
    }
    return Sweep(
        heads,
        {"head.rank": (1, 4), "seed": (0, 1, 2)},
        {
            size: {**{f"model.{field}": value for field, value in model.items()}, "base": f"trunk-{size}"}
            for size, model in models.items()
        },
        reference={"head.rank": 1},
        first={f"trunk-{size}": replace(trunk, model=replace(trunk.model, **model)) for size, model in models.items()},
        measure=MeasureConfig(),
    )


def on(size: str, trunk: str) -> TrainConfig:
    """Heads on a trunk that this sweep has left."""
    found = SWEEPS[size]
    return replace(found.base, model=found.first[trunk].model, base=f"runs/sizes/{size}/{trunk}")


SWEEPS = {"cpu": sweep("cpu", TRUNK_CPU, HEADS_CPU), "gpu": sweep("gpu", TRUNK_GPU, HEADS_GPU)}
