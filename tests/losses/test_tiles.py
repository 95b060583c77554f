"""Tiles: how many rows of logits are multiplied at once, by platform and vocabulary."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from mtp_jax.heads.factors import FACTORS
from mtp_jax.losses import tiles
from mtp_jax.mesh import AXES
from support.mixture_losses import SHAPES, traced


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


def test_tiles_of_a_cpu_fit_its_cache_or_have_enough_rows():
    assert tiles.tile_positions(2**15, 4 * 258 * 32, 1) == 643, "what fits the cache, 634, alike in all tiles"
    assert tiles.tile_positions(2**15, 4 * 128256 * 32, 32) == 8
    assert tiles.tile_positions(2**15, 4 * 32000, 1) == 256
    assert tiles.tile_positions(2**15, 4 * 32000 * 32, 1) == 40, "as many as there is memory for, alike in all tiles"
    assert tiles.tile_positions(100, 4 * 32000, 1) == 100


def dots(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dots(inner)


@pytest.mark.parametrize("factors", FACTORS)
def test_rows_are_those_that_go_through_the_largest_table(factors, mesh):
    """Its products for one position, over its entries."""
    sizes = {"D": 16, "R": 3, "W": 4, "V": 100, "E": 5}
    params = {name: jnp.zeros([sizes[axis] for axis in name.split("_")[1]]) for name in SHAPES[factors]}
    tables = FACTORS[factors].tables(params)
    found = jax.make_jaxpr(FACTORS[factors].logits)(tables, jnp.zeros((1, 1, sizes["D"])))
    through = {}
    for product in dots(found.jaxpr):
        ((contracted, _), _), left = product.params["dimension_numbers"], product.invars[0].aval.shape
        work = math.prod(product.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        for table in (a.aval for a in product.invars if sizes["V"] in a.aval.shape):
            through[table.size] = work / table.size
    assert through[max(through)] == FACTORS[factors].rows(sizes["R"], sizes["W"])
