"""Blocks that arrays are written in: a device that keeps a part of an array reads little more than that."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtp_jax.config import MeshConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.runs import checkpoints, writer
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.state import TrainState
from support import tiny

SHAPE_LDF = (6, 64, 96)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """An array that one device has saved, in blocks of 4 KiB."""
    for module in (checkpoints, writer):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
    array_LDF = jnp.arange(math.prod(SHAPE_LDF), dtype=jnp.float32).reshape(SHAPE_LDF)
    with CheckpointWriter(tmp_path, 1) as run:
        run.save(TrainState(jnp.asarray(1), {"w_LDF": array_LDF}, {}), tiny.train_config(), {}, "")
    return tmp_path, np.asarray(array_LDF)


@pytest.mark.parametrize(
    ("shape", "spec", "most"),
    [((1, 4, 2), (None, "fsdp", "tensor"), 1 / 8), ((1, 8, 1), (None, None, "fsdp"), 1 / 2), ((1, 1, 1), (), 1)],
)
def test_a_device_reads_its_part(saved, monkeypatch, shape, spec, most):
    path, array_LDF = saved
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    like = jax.ShapeDtypeStruct(SHAPE_LDF, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
    at_once, handler = [], checkpoints.array_handler
    monkeypatch.setattr(checkpoints, "array_handler", lambda largest: (at_once.append(largest), handler(largest))[1])
    found = Checkpoints(path).restore_params({"w_LDF": like})["w_LDF"]
    np.testing.assert_array_equal(found, array_LDF)
    assert found.sharding == like.sharding
    assert array_LDF.nbytes / math.prod(shape) <= at_once[0] <= most * array_LDF.nbytes


def test_blocks_are_small(saved):
    path, _ = saved
    stored = ocp.PyTreeCheckpointHandler().metadata(path / "checkpoints/1/params").tree["w_LDF"]
    assert 1024 < 4 * math.prod(stored.storage.chunk_shape) <= 4096
