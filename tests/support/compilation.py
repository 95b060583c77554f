"""Compiling in less time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """What is compiled in here, and by processes that are started in here, is compiled without most optimizations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)
