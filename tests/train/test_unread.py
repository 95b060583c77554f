"""A run whose output nobody reads, or has no room, is none the worse."""

import pytest

from mtp_jax.train import loop, profile
from support.loop import change, interrupt
from support.runs import on_disk
from support.streams import GONE, gone


@pytest.mark.parametrize("kind", GONE)
def test_a_run_that_nobody_reads_of_is_saved_and_goes_on(config, fake, tmp_path, kind):
    with gone(kind):
        fake(during={3: interrupt})
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "run")
        assert on_disk(tmp_path / "run") == [3]
        fake()
        loop.train(config, tmp_path / "run", resume=True)
    assert on_disk(tmp_path / "run") == [4, 8]


def test_a_profile_that_has_no_room_ends_no_run(config, fake, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile.Path, "read_bytes", full)
    fake()
    loop.train(change(config, "profile", steps="2:4"), tmp_path / "run")
    assert on_disk(tmp_path / "run") == [4, 8]
    assert capsys.readouterr().err.count("warning: The profile was not written ([Errno 28]") == 1
