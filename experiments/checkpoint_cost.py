"""What checkpoints cost: seconds that a save takes from training, and the speed and memory of restoring.

    python experiments/checkpoint_cost.py [--megabytes 1000] [--steps 500]

A run of a small model is stepped with and without saves, interleaved: a save blocks briefly, and goes on in
the background, next to the steps. Then a state of random float32 is saved and restored, each in a process of its own,
on one device and on eight simulated ones, both ways; the hash check is part of the time. Prints a table, and
as the last line one JSON object. Takes about three minutes on two cores, and the megabytes on the disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import MeshConfig, TrainConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.heads.config import HeadConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.model.config import ModelConfig
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.layout import versions
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.state import TrainState
from mtp_jax.train.step import make_trainer

ARRAYS = 16


def state(megabytes: int, devices: int, fill: bool) -> TrainState:
    """A state of random float32 in `ARRAYS` arrays, split over the devices; shapes alone if it is not to be filled."""
    mesh = make_mesh(MeshConfig(1, devices, 1), jax.devices()[:devices])
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    rows = megabytes * 10**6 // 4 // ARRAYS // 1024 // 8 * 8
    rng = np.random.default_rng(0)

    def make() -> jax.Array | jax.ShapeDtypeStruct:
        if not fill:
            return jax.ShapeDtypeStruct((rows, 1024), jnp.float32, sharding=sharding)
        return jax.device_put(rng.random((rows, 1024), np.float32), sharding)

    half = {f"w{i}": make() for i in range(ARRAYS // 2)}
    return TrainState(jnp.zeros((), jnp.int32), half, {f"m{i}": make() for i in range(ARRAYS // 2)})


def memory(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is the memory of this process, VmHWM the most that it has had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def child(what: str, path: str, megabytes: int, devices: int) -> dict[str, float]:
    """Save or restore in this process."""
    jax.config.update("jax_num_cpu_devices", devices)
    made = state(megabytes, devices, fill=what == "save")
    before, begun = memory("VmRSS"), time.perf_counter()
    processor = time.process_time()
    size = 0
    if what == "save":
        with CheckpointWriter(path, keep=1) as checkpoints:
            checkpoints.save(made, TrainConfig(), {}, "")
            blocked = time.perf_counter() - begun
    else:
        blocked = 0.0
        with Checkpoints(path) as checkpoints:
            found = jax.block_until_ready(checkpoints.restore(made))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(found))
    seconds = time.perf_counter() - begun
    used = time.process_time() - processor
    return {
        **{"seconds": seconds, "processor_seconds": used, "blocked": blocked, "bytes": size},
        "memory": memory("VmHWM") - before,
    }


def in_process(*args: object) -> dict[str, float]:
    """`child` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def overhead(steps: int, rounds: int = 5) -> dict[str, float]:
    """Seconds that one save adds to the `steps` steps from it to the next, its work in the background included."""
    model = ModelConfig(vocab_size=264, d_model=256, d_ff=704, num_layers=4, context_length=128, dtype="float32")
    head = HeadConfig(window=4, rank=4, factors="full")
    config = TrainConfig(model, head, DataConfig(batch_size=8, seq_len=128), mesh=MeshConfig(1, 1, 1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config)
        current = trainer.init()
        shape, window = (config.data.batch_size, config.data.seq_len), config.head.window
        batch = {
            "tokens_BT": np.zeros(shape, np.int32),
            "targets_BTW": np.zeros((*shape, window), np.int32),
            "valid_BTW": np.ones((*shape, window), bool),
            "segments_BT": np.zeros(shape, np.int32),
        }
        batch = {name: jax.device_put(rows, jax.NamedSharding(mesh, jax.P())) for name, rows in batch.items()}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(current))
        # A save is over after some steps: those are timed, with and without one.
        few, found = 20, {True: [], False: []}
        current, _ = trainer.step(current, batch)
        with CheckpointWriter(folder, keep=1) as checkpoints:
            for _ in range(rounds):
                for saving in (False, True):
                    jax.block_until_ready(current)
                    begun = time.perf_counter()
                    if saving:
                        checkpoints.save(current, config, {}, "")
                    for _ in range(few):
                        current, metrics = trainer.step(current, batch)
                    jax.block_until_ready((current, metrics))
                    if saving:
                        checkpoints.wait()
                    found[saving].append(time.perf_counter() - begun)
    step = statistics.median(found[False]) / few
    extra = statistics.median(a - b for a, b in zip(found[True], found[False], strict=True))
    return {"state_bytes": size, "step_seconds": step, "save_seconds": extra, "fraction": extra / (steps * step)}


def _row(name: str, found: dict[str, float], megabytes: int) -> str:
    return f"{name:14}{found['seconds']:9.2f}{megabytes / found['seconds']:8.0f}{found['processor_seconds']:8.1f}"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=TrainConfig.checkpoint_every)
    parser.add_argument("--child", nargs=4)
    options = parser.parse_args()
    if options.child:
        what, path, megabytes, devices = options.child
        print(json.dumps(child(what, path, int(megabytes), int(devices))))
        return
    result = {"overhead": overhead(options.steps), "restore": [], "save": [], "versions": versions()}
    cost = result["overhead"]
    print(
        f"a save of {cost['state_bytes'] / 1e6:.0f} MB takes {cost['save_seconds']:.3f} s from training: "
        f"{cost['fraction']:.2%} of {options.steps} steps of {cost['step_seconds'] * 1e3:.0f} ms"
    )
    print(f"{'':14}{'seconds':>9}{'MB/s':>8}{'cpu s':>8}{'memory, of the state':>22}")
    for source in (8, 1):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            saved = in_process("save", folder, options.megabytes, source)
            result["save"].append({"devices": source, **saved})
            print(_row(f"save {source}", saved, options.megabytes), f"blocks {saved['blocked']:.2f} s")
            for target in (8, 1):
                row = in_process("restore", folder, options.megabytes, target)
                result["restore"].append({"from": source, "to": target, **row})
                share = f"{row['memory'] / row['bytes']:22.2f}"
                print(_row(f"restore {source} -> {target}", row, options.megabytes) + share, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
