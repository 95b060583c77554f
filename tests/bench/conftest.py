"""A store whose tokens tell where they come from."""

import numpy as np
import pytest

from mtp_jax.data.store import Documents, Store


def documents(split, first, lengths):
    """Documents whose token i is `first + i`."""
    offsets = np.cumsum([0, *lengths])
    names = [f"{split}{i}" for i in range(len(lengths))]
    return Documents(split, np.arange(first, first + offsets[-1], dtype=np.uint16), offsets, names)


@pytest.fixture
def store(tmp_path):
    """Tokens below 1000 are for training, the others are held out, of which 2, 3 and 5 are too short."""
    return Store(tmp_path, {}, documents("train", 0, [50] * 9), documents("valid", 1000, [9, 12, 7, 8, 20, 1, 9, 30]))
