"""One model for all tests of a file."""

import pytest

from support.noise import hidden, make_model, make_tokens


@pytest.fixture(scope="module")
def model(mesh):
    """Two layers of noise."""
    return make_model()


@pytest.fixture(scope="module")
def hidden_alone(model):
    """The hidden states of one document."""
    return hidden(model, make_tokens())
