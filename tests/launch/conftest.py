"""What the tests of launchers have in common: a box."""

import pytest

from support.launchers import Box


@pytest.fixture
def box(tmp_path):
    """A directory with a stand-in for the program."""
    box = Box(tmp_path)
    yield box
    box.close()
