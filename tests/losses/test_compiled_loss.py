"""What the loss compiles to: its memory, and what devices exchange."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import OptimizerConfig
from mtp_jax.train.step import make_trainer
from support import tiny
from support.mixture_losses import W, set_tile_bytes, traced

pytestmark = pytest.mark.usefixtures("mesh", "float64")


def lower_large(shape, factors="shared", dtype=jnp.float32, batch=8, time=128, vocab=4096):
    """The compiled loss and gradient of a problem that is never run, R = 8, W = 4, D = 256."""
    sizes = {"D": 256, "R": 8, "W": 4, "V": vocab, "E": 64}
    with tiny.mesh(*shape) as mesh, jax.enable_x64(False):
        return traced(mesh, sizes, factors, dtype, batch, time).lower().compile()


def loop_and_rest(text):
    """The lines of a compiled program that are in the body of a loop, and the others."""
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    inside, rest, here = [], [], False
    for line in text.splitlines():
        if match := re.match(r"%?([\w.\-]+) \(.*\{$", line):
            here = match[1] in bodies
        (inside if here else rest).append(line)
    return inside, rest


def collectives(lines):
    """Elements that each collective of these lines gives, largest first."""
    found = []
    for line in lines:
        if match := re.search(r"= (\(?[^=]*?) (all-reduce|reduce-scatter|all-gather|all-to-all)\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    return sorted(found, reverse=True)


def test_no_gradient_of_a_table_is_exchanged_in_the_loop():
    """In it only what positions have; after it one reduction for each table."""
    with pytest.MonkeyPatch.context() as patch:
        set_tile_bytes(patch, 2**20)
        inside, rest = loop_and_rest(lower_large((2, 2, 2)).as_text())
    positions = 2**20 // (8 * 4 * 2048 * 4)
    assert collectives(inside) and collectives(inside)[0] <= positions * 256
    # The largest outside: a map [D, R, W, D] is gathered, its gradient scattered over fsdp.
    assert collectives(rest)[0] == 256 * 8 * 4 * 256


def test_work_is_divided_among_devices():
    """A loop's body is counted once, so the tiles are made one."""
    with pytest.MonkeyPatch.context() as patch:
        set_tile_bytes(patch, 2**40)
        flops = {shape: lower_large(shape).cost_analysis()["flops"] for shape in ((1, 1, 1), (8, 1, 1), (2, 2, 2))}
    assert flops[8, 1, 1] < 1.02 * flops[1, 1, 1] / 8
    # The maps are not split over tensor: a small part of the work, at this vocabulary 1/16 of the logits'.
    assert flops[2, 2, 2] < 1.15 * flops[1, 1, 1] / 8


# Memory.


def scratch_bytes(batch, time, factors="shared", vocab=32768):
    return lower_large((1, 1, 1), factors, batch=batch, time=time, vocab=vocab).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("factors", ["shared", "lowrank"])
def test_memory_is_that_of_a_tile(factors, small_tiles):
    """The logits of 512 positions are 2 GiB; 100 MiB are enough, of which 32 are the table's gradient."""
    assert scratch_bytes(2, 256, factors) < 100 * 2**20


@pytest.mark.parametrize(("batch", "time"), [(4, 8192), (2048, 16), (8192, 4)])
def test_memory_does_not_grow_with_the_batch(batch, time):
    """From 4,096 to 32,768 positions, beyond the gradient of the hidden states, whatever the shape of the batch is."""

    def beyond(batch, time):
        return scratch_bytes(batch, time) - 4 * 256 * batch * time

    assert beyond(batch, time) < 1.05 * beyond(4, 1024)


def test_memory_of_one_large_tile_is_seen(monkeypatch):
    """The measure that the tests above use does see logits that live together."""
    set_tile_bytes(monkeypatch, 2**31)
    assert scratch_bytes(2, 256) > 2**31


@pytest.mark.slow
def test_a_large_vocabulary_trains():
    """A real step at V = 32,768, R = 8, W = 4: the loss falls."""
    with jax.enable_x64(False):
        model = tiny.model_config(vocab_size=32768)
        config = tiny.train_config(
            model,
            tiny.head_config(rank=8, factors="lowrank"),
            batch=2,
            seq_len=8,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        )
        trainer = make_trainer(config)
        state, batch, losses = trainer.init(), tiny.make_batch(config), []
        for _ in range(3):
            state, metrics = trainer.step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2] and losses[0] < 1.05 * W * np.log(32768)
