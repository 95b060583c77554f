"""Rows of arrays and random bits, against NumPy's and JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import arrays


@pytest.mark.parametrize("shape", [(1,), (2, 3)])
@pytest.mark.parametrize("count", [1, 8, 1001])
def test_random_bits_are_those_of_jax(shape, count):
    keys = jax.random.split(jax.random.key(3, impl="threefry2x32"), shape)
    with jax.threefry_partitionable(True):
        one = lambda key: jax.random.bits(key, (count,), jnp.uint32)  # noqa: E731
        expected = np.stack([one(key) for key in keys.reshape(-1)]).reshape(*shape, count)
    found = jax.jit(arrays.random_bits, static_argnums=1)(keys, count)
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, expected)


def test_the_first_of_the_largest():
    """With ties, infinities, and rows of nothing else."""
    x = np.random.default_rng(0).integers(-3, 3, (4, 5, 7)).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2, 3:5] = -np.inf, arrays.NEVER, np.inf
    found = jax.jit(arrays.argmax)(x)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.argmax(-1))


def test_what_is_not_a_number_has_an_index_in_range():
    x = np.array([[np.nan, 1.0, 2.0], [0.0, 1.0, np.nan]], np.float32)
    assert set(np.asarray(arrays.argmax(x))) <= {0, 1, 2}
