"""Run directories in a bucket, on a server of this machine: trained, killed, gone on with and loaded.

What is real: gcsfs, TensorStore and google-cloud-storage, each over HTTP, and Orbax's way of writing to a bucket. What
is not: the server (`fake_gcs`), which wants no credentials, knows no hierarchical namespace and is never overloaded.
"""

import hashlib
import json
import signal
import time

import pytest

from mtp_jax.runs import paths
from mtp_jax.validate import ConfigError
from support.processes import Processes, experiment

RUN = "gs://bucket/runs/mine"
STEPS = [
    "--steps",
    "60",
    "--eval-every",
    "10",
    "--checkpoint-every",
    "10",
    "--log-every",
    "10",
    "--keep-checkpoints",
    "9",
]

LOAD = """
import sys
import jax, numpy as np
import mtp_jax
from mtp_jax.train.loggers import read_metrics
from mtp_jax.train.step import split

bucket, disk = sys.argv[1:]
ours, theirs = (mtp_jax.load(run_dir) for run_dir in (bucket, disk))
assert ours.step == theirs.step == 60, (ours.step, theirs.step)
parameters = [jax.device_get(split(run.model)[1]) for run in (ours, theirs)]
jax.tree.map(np.testing.assert_array_equal, *parameters)
losses = [[(r["kind"], r["step"], r["loss"]) for r in read_metrics(run_dir)] for run_dir in (bucket, disk)]
assert losses[0] == losses[1] and len(losses[0]) > 10, losses
assert ours.generate("abc", max_new_tokens=8) == theirs.generate("abc", max_new_tokens=8)
mtp_jax.load(bucket, step=20)
"""

WATCH = """
import tensorstore as ts
from etils import epath
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.manifest import check, seal

def write(name, data):
    where = {"driver": "gcs", "bucket": "bucket", "path": "runs/watched/checkpoints/"}
    ts.KvStore.open(where).result().write(name, data).result()

with Checkpoints("gs://bucket/runs/watched") as checkpoints:
    assert checkpoints.steps() == []
    for step in range(1, 11):
        folder = epath.Path(f"gs://bucket/runs/watched/checkpoints/{step}")
        write(f"{step}/params/a", b"old")
        assert [path.name for path in (folder / "params").iterdir()] == ["a"]
        write(f"{step}/params/b", b"new")
        seal(folder)
        assert '"params/b"' in (folder / "manifest.json").read_text()
        check(folder)
        assert checkpoints.steps() == list(range(1, step + 1))
    write("5/manifest.json", None)
    assert checkpoints.steps() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
"""


@pytest.fixture(scope="module")
def trained(here, root):
    """A run in the bucket that was killed and went on, beside one on the disk that was left alone."""
    with Processes(experiment(root, "straight"), root / "straight", *STEPS, count=1) as one:
        command = "-m", "mtp_jax", "train", experiment(root, "mine"), "--run-dir", RUN, "--auto-resume", *STEPS
        killed = here.start(*command)
        try:
            end = time.monotonic() + 120
            while len(here.sealed()) < 2:
                assert killed.poll() is None and time.monotonic() < end, (here.folder / "log").read_text()
                time.sleep(0.005)
            killed.send_signal(signal.SIGKILL)
        finally:
            killed.kill()
            killed.wait()
        sealed = here.sealed()
        assert "60" not in sealed, "it was killed too late"
        status, said = here.run(*command, "--profile.steps", "50:52")
        assert status == 0 and f"resuming at step {max(map(int, sealed))}" in said, said
        assert one.wait() == [0], one.said()
    return root / "straight"


def test_what_others_write_is_seen_at_once_and_sealed(here):
    """TensorStore is another to gcsfs, as another process is."""
    status, said = here.run("-c", WATCH)
    assert status == 0, said


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_goes_on_and_loads_as_one_on_a_disk(here, trained):
    """Bit for bit: the parameters, every loss on the way, and what is generated."""
    status, said = here.run("-c", LOAD, RUN, trained)
    assert status == 0, said
    assert not here.bucket.unknown
    assert [path.name for path in here.folder.iterdir()] == ["log"], "nothing of it lies on the disk"


@pytest.mark.slow
def test_what_lies_in_the_bucket_is_what_lies_on_a_disk(here, trained):
    def kinds(names):
        return {name.split("/")[0] for name in names}

    prefix = len("runs/mine/")
    names = [name[prefix:] for name in here.names()]
    assert kinds(names) == {path.name for path in trained.iterdir()} | {"profile"}
    assert here.sealed() == sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert any(name.endswith(".xplane.pb") for name in names)
    assert any(name.startswith("tensorboard/events") for name in names)


@pytest.mark.slow
def test_every_object_of_a_step_is_in_its_manifest(here, trained):
    """Those of TensorStore too, which writes past gcsfs."""
    for step in here.sealed():
        prefix = f"runs/mine/checkpoints/{step}/"
        objects = {
            name.removeprefix(prefix): here.bucket.objects[name][0] for name in here.names(f"checkpoints/{step}/")
        }
        files = json.loads(objects.pop("manifest.json"))["files"]
        assert files == {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in objects.items()}
        assert any(name.startswith("params/d/") or "/d/" in name for name in files), "arrays"


@pytest.mark.slow
def test_damage_in_a_bucket_is_refused_with_the_way_out(here, trained):
    name = max(here.names("checkpoints/60/params/"), key=lambda name: len(here.bucket.objects[name][0]))
    data, generation = here.bucket.objects[name]
    here.bucket.objects[name] = bytes([data[0] ^ 1]) + data[1:], generation
    try:
        status, said = here.run("-c", f"import mtp_jax; mtp_jax.load({RUN!r})")
    finally:
        here.bucket.objects[name] = data, generation
    assert status == 1 and f"gs://bucket/{name} has other bytes" in said and "The last good step is 50." in said, said


@pytest.mark.slow
def test_a_run_in_a_bucket_is_not_overwritten_unasked_and_nothing_else_is_ever_deleted(here, trained, root):
    here.bucket.put("runs/mine/notes.txt", b"keep", {})
    here.bucket.put("runs/other/config.json", b"keep", {})
    before = here.names()
    command = "-m", "mtp_jax", "train", root / "mine.py", "--run-dir", RUN, "--steps", "2"
    status, said = here.run(*command)
    assert status == 2 and f"The run directory {RUN} exists" in said and here.names() == before, said
    status, said = here.run(*command, "--overwrite")
    assert status == 0 and here.sealed() == ["2"], said
    assert not [name for name in here.names() if "profile" in name]
    assert here.bucket.objects["runs/mine/notes.txt"][0] == here.bucket.objects["runs/other/config.json"][0] == b"keep"


@pytest.mark.slow
def test_steps_in_a_bucket_that_lost_their_manifests_are_set_aside(here, trained, root):
    objects = here.bucket.objects
    ours = [name for name in here.names() if not name.endswith("manifest.json")]
    assert any(name.endswith("commit_success.txt") for name in ours)
    for name in ours:
        here.bucket.put(name.replace("/mine/", "/unsealed/"), objects[name][0], {})
    before = {name: data for name, (data, _) in objects.items() if name.startswith("runs/unsealed/")}
    command = "-m", "mtp_jax", "train", root / "mine.py", "--run-dir", "gs://bucket/runs/unsealed", "--auto-resume"
    status, said = here.run(*command, "--steps", "2")
    assert status == 0 and "moved to gs://bucket/runs/unsealed/lost-1" in said, said
    assert {
        name.replace("/lost-1/", "/"): data for name, (data, _) in objects.items() if "unsealed/lost-1/" in name
    } == {name: data for name, data in before.items() if not name.endswith("notes.txt")}
    assert "runs/unsealed/checkpoints/2/manifest.json" in objects


@pytest.mark.parametrize("url", ["s3://bucket/run", "gcs://bucket/run", "file:///tmp/run"])
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match="must be a local path or gs://BUCKET/"):
        paths.full_path(url)


def test_a_bucket_without_the_package_that_opens_it_is_refused(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gcsfs, which opens gs://, is not installed: pip install 'mtp_jax\[gcs\]'"):
        paths.full_path(RUN)
