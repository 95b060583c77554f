"""Random bits against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import arrays


@pytest.mark.parametrize("shape", [(1,), (2, 3)])
@pytest.mark.parametrize("count", [1, 8, 1001])
def test_random_bits_are_those_of_jax(shape, count):
    keys = jax.random.split(jax.random.key(3, impl="threefry2x32"), shape)
    each = [jax.random.bits(key, (count,), jnp.uint32) for key in keys.reshape(-1)]
    expected = np.stack(each).reshape(*shape, count)
    found = jax.jit(arrays.random_bits, static_argnums=1)(keys, count)
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, expected)
