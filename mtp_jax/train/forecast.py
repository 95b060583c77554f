"""Forecast: what the training step of a config needs on each device of a machine, which need not be here.

The step is the one that training runs. It is compiled for abstract arrays, so nothing of the model is allocated: for
the devices that are here, for any number of simulated ones, or for a TPU slice by the compiler of its own library.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import re
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtp_jax.arrays import random_key
from mtp_jax.config import TrainConfig
from mtp_jax.data.tokenizers import load_tokenizer
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.mesh import make_mesh, on_mesh
from mtp_jax.model.cache import init_cache
from mtp_jax.processes import end_with_parent
from mtp_jax.runs.layout import versions
from mtp_jax.sharding import RULES
from mtp_jax.state import TrainState, build_model
from mtp_jax.train.advice import advice
from mtp_jax.train.collectives import count_collectives
from mtp_jax.train.costs import accelerator, costs, tree_bytes
from mtp_jax.train.step import Batch, make_trainer
from mtp_jax.train.trained import partition
from mtp_jax.validate import ConfigError, require

CPU_NOTE = (
    "These are the temporaries and collectives of XLA for CPUs. It holds and sends bfloat16 as float32, sums gradients "
    "whole where others scatter them, and has smaller tiles of logits: at most 160 MiB, where a GPU has up to 4 GiB "
    "and a TPU 2. Parameters, optimizer and batch are the same on all machines; --topology asks a TPU's own compiler."
)

NOTHING_NOTE = (
    "Nothing would be trained: the trunk is frozen and there is no head. Give one, such as --head.kind mixture "
    "--head.circuit cpd --head.window 4 --head.rank 2 --head.factors lowrank --head.target ntp --head.encoder token."
)


class ForecastError(RuntimeError):
    """A step that could not be compiled for another machine. The message says why and what may help."""


def forecast(
    config: TrainConfig, devices: int | None = None, topology: str = "", memory: int | None = None
) -> dict[str, Any]:
    """Compile the step of `config` and say what it needs, as JSON values. All bytes and FLOPs are of one device.

    It is compiled for the devices that are here, or for another machine in a process of its own. `fits` compares
    `memory` with `peak`, whose temporaries are those of the compiler that `backend` names.

    Args:
      config: the run.
      devices: so many simulated CPU devices instead of those that are here.
      topology: a TPU slice instead, by the name that its library has for it, such as `v5e:16x16` (16 x 16 chips) or
        `v5p:4x4x8`.
      memory: what a device has, in bytes; by default that of its kind, where it is known.

    Raises:
      ConfigError: the mesh, the batch or the tokenizer does not fit, or there is no such topology.
      ForecastError: no compiler for that topology is here, or it refuses the step (for lack of memory, say).
    """
    if devices is None and not topology:
        return _forecast(config, jax.devices(), memory)
    require(devices is None or devices >= 1, f"--devices is {devices}; it must be at least 1.")
    require(
        not topology or re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology) is not None,
        f"The topology is {topology!r}; give a kind and chips along each axis, such as v5e:16x16.",
    )
    require(not (devices and topology), f"--devices is {devices} and --topology is {topology}; give one of them.")
    if devices:  # the same is found there, but sooner here
        config.check_mesh(config.mesh.shape(devices))
    context = multiprocessing.get_context("spawn")  # JAX has one set of devices for each process
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    with concurrent.futures.ProcessPoolExecutor(1, context, _pretend, (devices or 1, cache)) as pool:
        try:
            return pool.submit(_elsewhere, config, topology, memory).result()
        except BrokenProcessPool as error:
            raise ForecastError(
                "The process that compiled has died, for lack of memory perhaps. Try fewer devices."
            ) from error


def abstract_step(config: TrainConfig, mesh: Mesh) -> tuple[Any, TrainState, Batch]:
    """The jitted step of `config`, and shapes with shardings of its arguments on the mesh in scope."""
    data, window = config.data, config.head.window
    sharding = jax.NamedSharding(mesh, RULES.rows_B)

    def rows(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((data.batch_size, *shape), dtype, sharding=sharding)

    trainer = make_trainer(config)
    batch = {
        "tokens_BT": rows(jnp.int32, data.seq_len),
        "targets_BTW": rows(jnp.int32, data.seq_len, window),
        "valid_BTW": rows(jnp.bool, data.seq_len, window),
        "segments_BT": rows(jnp.int32, data.seq_len),
    }
    return trainer.step, on_mesh(jax.eval_shape(trainer.init), mesh), batch


def decoding_bytes(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes that decoding needs on each device, the mesh in scope: the `weights` in the compute dtype, and the cache of
    a `row` as long as the `context`. The rows of a batch lie over `data` and `fsdp`.
    """
    slots = config.model.context_length
    each = mesh.shape["data"] * mesh.shape["fsdp"]

    def made() -> Any:
        model = build_model(config, random_key(0))
        return for_decoding(model), (init_cache(config.model, each, slots), model.head.init_cache(each, slots))

    def kept(leaf: Any) -> Any:
        # A CPU has it in float32, and stands for other machines here.
        return leaf.update(dtype=jnp.dtype(config.model.dtype)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    weights, cache = on_mesh(jax.eval_shape(jax.jit(made)), mesh)
    return {"weights": tree_bytes(weights), "row": tree_bytes(jax.tree.map(kept, cache)), "context": slots}


def _pretend(devices: int, cache: str | None) -> None:
    """Set JAX up in a process where it has not begun: so many CPU devices alone."""
    end_with_parent()
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the library then asks no cloud which machine this is
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)


def _elsewhere(config: TrainConfig, topology: str, memory: int | None) -> dict[str, Any]:
    return _forecast(config, _slice(topology) if topology else jax.devices(), memory)


def _slice(name: str) -> list[Any]:
    """The devices of a TPU slice, as its library describes them."""
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ForecastError(
            f"The compiler for {name} is not installed here: pip install 'mtp_jax[tpu]' (no TPU is needed), or give "
            "--devices alone, for simulated devices."
        )
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # whatever the library's version raises
        raise ConfigError(f"libtpu has no topology {name}: {str(error).partition(chr(10))[0]}") from error


def _forecast(config: TrainConfig, devices: list[Any], memory: int | None) -> dict[str, Any]:
    notes = _check_tokenizer(config)
    mesh = make_mesh(config.mesh, devices)
    shape = (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"])
    config.check_mesh(shape)
    kind = accelerator(devices[0].device_kind)
    memory = memory or (kind and kind.memory)
    with jax.set_mesh(mesh):
        decoding = decoding_bytes(config, mesh)
        step, state, batch = abstract_step(config, mesh)
        found = {"parameters": tree_bytes(state.whole), "optimizer": tree_bytes(state.opt_state)}
        begun = time.perf_counter()
        try:
            compiled = step.lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            raise _refused(error, config, shape, found, memory) from error
        seconds = time.perf_counter() - begun
        if not jax.tree.leaves(partition(state.params)[0]):
            notes.append(NOTHING_NOTE)
    used = compiled.memory_analysis()
    found |= {
        "batch": tree_bytes(batch),
        "temporaries": used.temp_size_in_bytes,
        "kept": used.alias_size_in_bytes,
        "peak": _peak(used, devices[0].platform),
    }
    cost, traffic = costs(config, state.whole), count_collectives(compiled.as_text())
    fits = None if memory is None else found["peak"] <= memory
    return {
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "parameters": {"trunk": cost.trunk_params, "head": cost.head_params, "embedding": cost.embedding_params},
        "bytes": found,
        "decoding": decoding,
        "memory": memory,
        "fits": fits,
        "advice": advice(config, shape, found, memory) if fits is False else [],
        "flops": (cost.trunk_flops + cost.head_flops) * config.data.batch_size * config.data.seq_len / len(devices),
        "head_to_trunk": cost.head_flops / cost.trunk_flops,
        "step_ratio": cost.step_ratio,
        "collectives": {
            name: {"count": count, "sent_bytes": traffic.sent[name]} for name, count in traffic.counts.items()
        },
        "unknown_loops": traffic.unknown_loops,
        "shardings": _shardings(state.whole),
        "compile_seconds": seconds,
        "notes": notes + ([CPU_NOTE] if devices[0].platform == "cpu" else []),
        "versions": versions(),
    }


def _peak(used: Any, platform: str) -> int:
    """The most bytes that are there at once. A TPU's compiler plans all of them together and knows; others allocate
    what is temporary in one block, beside the arguments and what of the outputs is not in their place."""
    if platform == "tpu":
        return used.peak_memory_in_bytes
    new_outputs = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + used.temp_size_in_bytes + new_outputs


def _check_tokenizer(config: TrainConfig) -> list[str]:
    """Check the vocabulary against the tokenizer's, unless that is not here."""
    name = config.data.tokenizer
    path = name.partition(":")[2]
    if path and not Path(path).expanduser().exists():
        return [f"The tokenizer {name} is not here: whether model.vocab_size holds its tokens was not checked."]
    config.with_tokenizer(load_tokenizer(name, config.data.end_of_document).vocab_size)
    return []


def _refused(error: Exception, config: TrainConfig, shape: Any, found: dict[str, int], memory: int | None) -> Exception:
    """A compiler's refusal in short, and what helps if it is for lack of memory."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return ForecastError(f"The compiler refuses the step on mesh {shape}: {text.partition(chr(10))[0]}")
    said = text.partition(chr(10))[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    helps = "".join(f"\n  {line}" for line in advice(config, shape, found, memory))
    return ForecastError(f"The step does not fit: {said}. What helps:{helps}")


def _shardings(params: Any) -> list[dict[str, Any]]:
    """Every parameter: name, shape, dtype, the mesh axes that split it, and the bytes that one device holds."""
    return [
        {
            "name": ".".join(key.key for key in path),
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "spec": [list(axis) if isinstance(axis, tuple) else axis for axis in leaf.sharding.spec],
            "bytes": tree_bytes(leaf),
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
