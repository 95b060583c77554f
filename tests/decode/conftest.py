"""Models to decode with, and what they decode by hand: made once, as no test changes them."""

import numpy as np
import pytest

from support import tiny
from support.decoding import LAWS, build, by_hand, chooser


@pytest.fixture(scope="session")
def models():
    """A model whose drafts are sometimes right, as training and as decoding have it."""
    with tiny.mesh() as mesh:
        return build(mesh)


@pytest.fixture
def model(models):
    """The model to decode with, its mesh in scope."""
    with tiny.mesh():
        yield models.ready


@pytest.fixture(scope="session")
def greedy(models):
    """Greedy decoding in Python."""
    return by_hand(models, lambda b, position, logp_V: np.argmax(logp_V))


@pytest.fixture(scope="session")
def sampled(models):
    """Sampling by `LAWS` in Python."""
    return by_hand(models, chooser(LAWS))


@pytest.fixture(scope="session")
def narrow():
    """The model to decode with in bfloat16. Its parameters are those of `models`, rounded."""
    with tiny.mesh() as mesh:
        return build(mesh, dtype="bfloat16").ready
