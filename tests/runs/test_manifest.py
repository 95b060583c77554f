"""The manifest: whatever happens to a file after it was sealed is seen, and the file is named."""

import os
import re

import pytest
from etils import epath

from mtp_jax.runs import manifest
from mtp_jax.runs.manifest import MANIFEST, DamagedError, check, is_sealed, seal, unseal

FILES = {"meta/metadata": b'{"step": 4}', "params/d/a": bytes(range(256)), "params/b": b"", "top": b"top"}


@pytest.fixture
def sealed(tmp_path):
    directory = epath.Path(tmp_path / "4")
    for name, data in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    assert not is_sealed(directory)
    seal(directory)
    return directory


def damages(data):
    """Every way to change these bytes that is tried: each byte in turn, cut, longer, empty."""
    for index in range(len(data)):
        for bit in (0, 7):
            yield data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]
    yield from (data + b"\0", b"" if data else b"x", data[: len(data) // 2] if data else b"xx")


def test_what_was_sealed_is_good(sealed):
    assert is_sealed(sealed)
    check(sealed)
    assert not (sealed / f"{MANIFEST}.partial").exists()


@pytest.mark.parametrize("name", FILES)
def test_every_change_of_every_byte_is_seen_and_named(sealed, name):
    for data in damages(FILES[name]):
        (sealed / name).write_bytes(data)
        with pytest.raises(DamagedError, match=re.escape(str(sealed / name)) + " has "):
            check(sealed)
    (sealed / name).unlink()
    with pytest.raises(DamagedError, match=re.escape(str(sealed / name)) + " is missing"):
        check(sealed)
    (sealed / name).mkdir()
    with pytest.raises(DamagedError, match=re.escape(str(sealed / name)) + " cannot be read"):
        check(sealed)


def test_every_change_of_the_manifest_is_seen(sealed):
    before = (sealed / MANIFEST).read_bytes()
    for data in damages(before):
        (sealed / MANIFEST).write_bytes(data)
        with pytest.raises(DamagedError, match=re.escape(str(sealed / MANIFEST)) + " is no manifest, or not the one"):
            check(sealed)
    (sealed / MANIFEST).write_bytes(before)
    check(sealed)


@pytest.mark.parametrize("text", ["[]", "null", '{"files": []}', '{"files": {"a": 3}}', "[" * 100_000])
def test_other_json_is_no_manifest(sealed, text):
    (sealed / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match="is no manifest"):
        check(sealed)


def test_the_folders_that_are_read_are_checked_and_what_lies_outside_of_folders(sealed):
    (sealed / "params/b").write_bytes(b"x")
    check(sealed, ["meta"])
    with pytest.raises(DamagedError, match="params/b"):
        check(sealed, ["params"])
    (sealed / "params/b").write_bytes(b"")
    (sealed / "top").write_bytes(b"pot")
    with pytest.raises(DamagedError, match="top has other bytes than were written"):
        check(sealed, ["meta"])


def test_processes_share_the_work(sealed, monkeypatch):
    seen = []
    monkeypatch.setattr(manifest, "_compare", lambda path, entry: seen.append(path.name))
    for index in range(3):
        check(sealed, shard=(index, 3))
    assert sorted(seen) == ["a", "b", "metadata", "top"]


def test_a_file_that_the_manifest_does_not_have_is_left_alone(sealed):
    (sealed / "params/.DS_Store").write_bytes(b"x")
    check(sealed)


def test_the_files_have_reached_the_disk_before_the_manifest_is_written(sealed, monkeypatch):
    events, sync, replace = [], os.fsync, manifest.replace_file
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    monkeypatch.setattr(manifest, "replace_file", lambda *args: (events.append("write"), replace(*args)))
    seal(sealed)
    # Four files, four folders; then the manifest's own folder.
    assert events == [*["sync"] * (4 + 4), "write", "sync"]


def test_the_manifest_goes_first(sealed, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(sealed), "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            unseal(sealed)
    assert not is_sealed(sealed) and (sealed / "params/d/a").exists()
    unseal(sealed)
    assert not sealed.exists()
