"""The precision of what is compared with a definition."""

import jax
import pytest


@pytest.fixture
def float64():
    """Numbers are float64 where nothing else is said."""
    with jax.enable_x64(True):
        yield
