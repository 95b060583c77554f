"""The device mesh: three named axes, always there, of size 1 where they are not used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mtp_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A `data x fsdp x tensor` mesh in Explicit mode, where a wrong sharding is an error while tracing.

    Args:
      config: devices along each axis; by default all of them on `data`.
      devices: the devices to use; by default all that JAX sees.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (config or MeshConfig()).shape(len(devices))
    types = (AxisType.Explicit,) * 3
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # on a TPU whose own axes must be cut for it: 8 x 8 x 4 chips and tensor = 2, say
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def on_mesh(shapes: Any, mesh: Mesh) -> Any:
    """Abstract arrays of a traced function, as shapes that lie on a mesh of devices."""

    def place(a: Any) -> jax.ShapeDtypeStruct:
        spec = jax.P() if a.sharding is None else a.sharding.spec
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)
