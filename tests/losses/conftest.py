"""What tests of losses share: the precision of what is compared with a definition, and the size of tiles."""

import jax
import pytest

from support.mixture_losses import set_tile_bytes


@pytest.fixture
def float64():
    """Numbers are float64 where nothing else is said."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """As many logits as fit a CPU's cache, however few rows they are."""
    set_tile_bytes(monkeypatch, 20 * 2**20)
