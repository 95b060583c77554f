"""`mtp-jax doctor [EXPERIMENT.py]`: versions, devices, and what a run would need before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mtp_jax.commands import parse, use_compilation_cache
from mtp_jax.commands.experiment import load_experiment, split_file
from mtp_jax.config import TrainConfig


@dataclass(frozen=True)
class Doctor:
    """What a run of this config would need in memory per device; every field of it can be set here."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(args: list[str]) -> None:
    """See the module."""
    if args in (["-h"], ["--help"]):
        print("usage: mtp-jax doctor [EXPERIMENT.py [options]]")
        return
    config = None
    if args:
        file, rest = split_file(args, "doctor")
        config = parse(Doctor, rest, f"doctor {file}", Doctor(load_experiment(file))).config
    use_compilation_cache()
    _machine()
    if config is not None:
        _run(config)


def _machine() -> None:
    import jax

    from mtp_jax.run_dir import versions
    from mtp_jax.train.costs import peak_flops

    print("\n".join(f"{name:18} {version}" for name, version in versions().items()))
    first = jax.devices()[0]
    peak = peak_flops(first)
    print(
        f"{'devices':18} {jax.device_count()} x {first.device_kind} ({first.platform}), {jax.process_count()} processes"
    )
    print(f"{'peak':18} {'not known: MFU is not shown' if peak is None else f'{peak / 1e12:.0f} TFLOP/s bf16'}")
    stats = first.memory_stats() or {}
    if "bytes_limit" in stats:
        print(f"{'device memory':18} {stats['bytes_limit'] / 2**30:.1f} GiB")


def _run(config: TrainConfig) -> None:
    import jax
    import jax.numpy as jnp

    from mtp_jax.sharding import RULES
    from mtp_jax.train.checks import check_machine
    from mtp_jax.train.costs import costs, tree_bytes
    from mtp_jax.train.step import make_trainer

    mesh = check_machine(config)
    data, head = config.data, config.head
    with jax.set_mesh(mesh):
        trainer = make_trainer(config)
        state = jax.eval_shape(trainer.init)

        def rows(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
            sharding = jax.NamedSharding(mesh, RULES.rows_B)
            return jax.ShapeDtypeStruct((data.batch_size, *shape), dtype, sharding=sharding)

        batch = {
            "tokens_BT": rows(jnp.int32, data.seq_len),
            "targets_BTW": rows(jnp.int32, data.seq_len, head.window),
            "valid_BTW": rows(jnp.bool, data.seq_len, head.window),
            "segments_BT": rows(jnp.int32, data.seq_len),
        }
        memory = trainer.step.lower(state, batch).compile().memory_analysis()  # type: ignore[attr-defined]
    cost = costs(config, state.params)
    mib = 2**20
    print(f"{'mesh':18} {dict(mesh.shape)}")
    print(
        f"{'parameters':18} trunk {cost.trunk_params:,}, head {cost.head_params:,}, embedding {cost.embedding_params:,}"
    )
    print(
        f"{'cost':18} head / trunk {cost.head_flops / cost.trunk_flops:.2f}, {cost.step_ratio:.2f}x a next-token step"
    )
    print(f"{'per device':18} parameters {tree_bytes(state.params) / mib:.1f} MiB, ", end="")
    print(f"optimizer {tree_bytes(state.opt_state) / mib:.1f} MiB, ", end="")
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"step {memory.temp_size_in_bytes / mib:.1f} MiB, together {total / mib:.1f} MiB")
