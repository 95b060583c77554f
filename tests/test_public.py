"""The public names of the package."""

import subprocess
import sys

import pytest

import mtp_jax
from support import REPOSITORY


def test_every_public_name_is_there_and_stays_what_it_is():
    for name in mtp_jax.__all__:
        first = getattr(mtp_jax, name)
        assert callable(first) and getattr(mtp_jax, name) is first


def test_importing_the_package_waits_for_no_library():
    heavy = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow")
    code = (
        f"import sys, mtp_jax, mtp_jax.config; mtp_jax.TrainConfig(); print([n for n in {heavy} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_public_name_is_answered_with_those_there_are():
    assert set(mtp_jax.__all__) < set(dir(mtp_jax))
    with pytest.raises(AttributeError, match=r"no attribute 'Trainconfig'.*TrainConfig"):
        _ = mtp_jax.Trainconfig
