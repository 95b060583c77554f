"""Tiles: how many rows of logits are multiplied at once, by platform and vocabulary."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from mtp_jax.losses import tiles
from mtp_jax.mesh import AXES
from support.mixture_losses import traced


@pytest.mark.parametrize(("kind", "platform"), [("TPU v5 lite", "tpu"), ("NVIDIA H100", "gpu")])
@pytest.mark.parametrize(("shape", "rank", "window", "tokens"), [
    ((1, 1, 1), 8, 4, 2**15), ((1, 1, 1), 1, 1, 2**15), ((2, 2, 2), 8, 4, 2**17), ((1, 1, 1), 1, 1, 2**12),
])  # fmt: skip
def test_accelerators_multiply_thousands_of_rows_by_a_large_table(kind, platform, shape, rank, window, tokens):
    vocab, (_, most) = 128256, tiles.TILE_BYTES[platform]
    device = jax.sharding.AbstractDevice(kind, None, platform)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, abstract_device=device)
    sizes = {"D": 64, "R": rank, "W": window, "V": vocab}
    with jax.sharding.use_abstract_mesh(mesh), jax.enable_x64(False):
        text = (
            traced(mesh, sizes, "shared", jnp.bfloat16, 8, tokens // 8)
            .lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),))
            .as_text()
        )
    local = vocab // mesh.shape["tensor"]
    (rows,) = {int(n) for n in re.findall(rf"stablehlo.exponential .*tensor<(\d+)x{local}xf32>", text)}
    assert rows >= 4096 and 4 * rows * local <= most
    assert rows <= 8192 or 4 * rows * local <= 2**29, "and no more memory than that is worth"


def test_tiles_of_a_cpu_fit_its_cache():
    assert tiles.tile_positions(2**15, 4 * 128256 * 32, 32) == 1
    assert tiles.tile_positions(2**15, 4 * 32000, 1) == 163
    assert tiles.tile_positions(100, 4 * 32000, 1) == 100
