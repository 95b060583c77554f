"""The public names of the package."""

import mtp_jax


def test_every_public_name_is_there_and_stays_what_it_is():
    for name in mtp_jax.__all__:
        first = getattr(mtp_jax, name)
        assert callable(first) and getattr(mtp_jax, name) is first


def test_an_unknown_name_is_answered_with_those_there_are():
    try:
        mtp_jax.lode  # noqa: B018
    except AttributeError as error:
        assert "load" in str(error)
    else:
        raise AssertionError("no error")
