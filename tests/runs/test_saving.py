"""Saving and restoring, of states that were not trained: damage, kills, a full disk, other meshes."""

import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtp_jax.runs import manifest
from mtp_jax.runs.checkpoints import CheckpointError, Checkpoints
from mtp_jax.runs.manifest import MANIFEST
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.state import TrainState
from support import TESTS, tiny
from support.states import CONFIG, make_state, on_disk

LARGE = 4096


def save(run_dir, losses, keep=9, **options):
    """Save the steps of a dict, with these held-out losses."""
    with CheckpointWriter(run_dir, keep, **options) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(make_state(step), CONFIG, {} if loss is None else {"loss": loss}, "")


def assert_is(state, step, size=16):
    expected = make_state(step, size)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def load_all(run_dir, step="latest"):
    """All that a checkpoint holds is read."""
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.meta(step), checkpoints.restore(make_state(0), step)


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {"flipped": flip, "cut": lambda path: os.truncate(path, path.stat().st_size // 2), "missing": Path.unlink}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_every_file_is_refused_by_its_name_with_the_way_out(tmp_path, kind):
    save(tmp_path, {4: None, 8: None})
    step = tmp_path / "checkpoints/8"
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    parts = {path.relative_to(step).parts[0] for path in files}
    assert {"params", "opt_state", "ema", "meta", MANIFEST, "_CHECKPOINT_METADATA"} <= parts and len(files) > 20
    for path in files:
        if (kind, path.name) == ("missing", MANIFEST):
            continue  # a step that is not complete: see below
        before = path.read_bytes()
        DAMAGE[kind](path)
        with pytest.raises(CheckpointError) as error:
            load_all(tmp_path)
        message = str(error.value)
        assert message.startswith(f"Step 8 of {tmp_path} is damaged: {path} ")
        assert f"The last good step is 4. Go on from it with `mtp-jax train EXPERIMENT.py --run-dir {tmp_path} --resume"
        assert "--resume --from-step 4`; load it with --step 4, or mtp_jax.load(" in message
        path.write_bytes(before)
    assert_is(load_all(tmp_path)[1], 8)


def test_the_last_good_step_is_one_that_is_good(tmp_path):
    save(tmp_path, {2: None, 4: None, 8: None})
    for step, file in ((8, "params/_METADATA"), (4, "ema/_METADATA")):
        flip(tmp_path / "checkpoints" / str(step) / file)
    with pytest.raises(CheckpointError, match=r"8/params/_METADATA has other bytes .* The last good step is 2\."):
        load_all(tmp_path)
    flip(tmp_path / "checkpoints/2" / MANIFEST)
    with pytest.raises(CheckpointError, match=r"No other step of this run is good: bring the file back, or start"):
        load_all(tmp_path)


def test_only_what_is_read_is_checked(tmp_path):
    save(tmp_path, {4: None})
    flip(tmp_path / "checkpoints/4/opt_state/_METADATA")
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore_params(make_state(0).params)
        np.testing.assert_array_equal(found["w"], make_state(4).params["w"])


def test_a_step_without_its_manifest_is_not_complete(tmp_path, capsys):
    save(tmp_path, {4: None, 8: None})
    (tmp_path / "checkpoints/8" / MANIFEST).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4] and checkpoints.latest_step() == 4
        with pytest.raises(CheckpointError, match=r"has no step 8; it has \[4\]\. Steps \[8\] have no manifest.json"):
            checkpoints.restore(make_state(0), 8)
        assert int(checkpoints.restore(make_state(0)).step) == 4
    assert "Step 8 of" in (said := capsys.readouterr().err) and "has no manifest" in said and "good step is 4" in said
    assert on_disk(tmp_path) == ["4", "8"], "who only reads deletes nothing"
    save(tmp_path, {12: None})
    assert on_disk(tmp_path) == ["12", "4"]


@pytest.mark.parametrize(
    "w, words",
    [
        (np.zeros(16, np.float16), r"has float32\[16\] as params/w, and float16\[16\] is to be restored"),
        (np.zeros((16, 1), np.float32), r"has float32\[16\] as params/w, and float32\[16, 1\] is"),
        (None, r"has float32\[16\] as params/w, and nothing is"),
        ({"v": np.zeros(16, np.float32)}, r"has float32\[16\] as params/w, and nothing is|has nothing as params/w/v"),
    ],
)
def test_arrays_of_another_kind_are_refused_by_name(tmp_path, w, words):
    save(tmp_path, {4: None})
    target = {**make_state(0).params, "w": w}
    if w is None:
        del target["w"]
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=words):
        checkpoints.restore_params(target)


def test_a_state_without_an_average_has_none(tmp_path):
    state = TrainState(jnp.asarray(1, jnp.int32), {"w": jnp.zeros(3)}, {"m": jnp.zeros(3)})
    with CheckpointWriter(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, CONFIG, {}, "")
        assert checkpoints.restore(state).ema is None
        with pytest.raises(CheckpointError, match=r"has no ema in step 1: the run kept no averaged weights"):
            checkpoints.restore_params(state.params, weights="ema")


def test_who_reads_cannot_save(tmp_path):
    save(tmp_path, {4: None})
    assert not {"save", "wait", "close"} & set(dir(Checkpoints(tmp_path)))
    with pytest.raises(TypeError, match="keep"):
        Checkpoints(tmp_path, keep=1)


# Which are kept


def test_the_best_step_is_kept_beside_the_newest(tmp_path):
    save(tmp_path, {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5}, keep=1)
    assert on_disk(tmp_path) == ["2", "4"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 2 and checkpoints.meta("best")["step"] == 2
        assert_is(checkpoints.restore(make_state(0), "best"), 2)
    # Another process knows the losses of what is there.
    save(tmp_path, {5: 3.5}, keep=1)
    assert on_disk(tmp_path) == ["2", "5"]
    save(tmp_path, {6: 2.0}, keep=1)
    assert on_disk(tmp_path) == ["6"]


def test_of_steps_that_are_equally_good_the_newest_is_the_best(tmp_path):
    save(tmp_path, {1: 2.0, 2: 2.0, 3: 2.5})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 2


def test_without_losses_the_latest_is_the_best(tmp_path):
    save(tmp_path, {1: None, 2: None})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None and checkpoints.meta("best")["step"] == 2


def test_a_step_that_cannot_say_its_loss_makes_the_best_unknown(tmp_path):
    save(tmp_path, {1: 2.0, 2: 3.0})
    flip(tmp_path / "checkpoints/1/meta/metadata")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"Step 1 .* damaged.* step is 2"):
        checkpoints.best_step()


# An earlier step


def test_later_steps_go_when_the_run_that_went_on_from_an_earlier_one_is_saved(tmp_path):
    save(tmp_path, {4: None, 8: None, 12: None})
    with CheckpointWriter(tmp_path, 9, resumed_from=4) as checkpoints:
        assert checkpoints.steps() == [4, 8, 12], "nothing is deleted before there is something better"
        checkpoints.save(make_state(12, size=8), CONFIG, {}, "")
        assert checkpoints.wait() == 12
        assert_is(checkpoints.restore(make_state(0, size=8)), 12, size=8)
        checkpoints.save(make_state(16), CONFIG, {}, "")
        assert checkpoints.wait() == 16
    assert on_disk(tmp_path) == ["12", "16", "4"]


# Kills and a full disk

# When one array fails, Orbax closes the loop that waits for the others, and TensorStore, being done with them, says so.
write_fails = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("where", ["seal", "unseal", "replace_file"])
@pytest.mark.parametrize("keep", [1, 2])
def test_an_error_at_any_point_leaves_a_complete_step(tmp_path, monkeypatch, capsys, where, keep):
    def fail(*args):
        raise OSError(28, "No space left on device")

    save(tmp_path, {1: None, 2: None}, keep)
    with monkeypatch.context() as patch, CheckpointWriter(tmp_path, keep) as checkpoints:
        patch.setattr(manifest, where, fail)
        assert checkpoints.save(make_state(3), CONFIG, {}, "") == 3
        assert checkpoints.wait() == (3 if where == "unseal" else 2)
        words = "Older checkpoints than step 3 were not deleted" if where == "unseal" else "Step 3 was not saved"
        assert capsys.readouterr().err == f"warning: {words} in {tmp_path}: [Errno 28] No space left on device.\n"
        assert checkpoints.wait() and capsys.readouterr().err == ""
        patch.undo()
        checkpoints.save(make_state(4), CONFIG, {}, "")
    assert_is(load_all(tmp_path)[1], 4)
    assert len(on_disk(tmp_path)) == keep


@pytest.fixture
def small_files():
    """Functions that forbid files of more than 8 KiB, and allow them again. The system does it, not a fake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))

    def allow():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield limit, allow
    allow()


@write_fails
def test_a_full_disk_is_said_and_the_next_save_tries_again(tmp_path, small_files, capsys):
    limit, allow = small_files
    with CheckpointWriter(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(1, LARGE), CONFIG, {}, "")
        assert checkpoints.wait() == 1
        limit()
        assert checkpoints.save(make_state(2, LARGE), CONFIG, {}, "") == 2
        checkpoints.save(make_state(3, LARGE), CONFIG, {}, "")
        assert checkpoints.wait() == 1
        allow()
        warnings = re.findall(r"^warning: Step (\d) was not saved in .*File too large", capsys.readouterr().err, re.M)
        assert warnings == ["2", "3"] and on_disk(tmp_path) == ["1"]
        checkpoints.save(make_state(4, LARGE), CONFIG, {}, "")
        assert checkpoints.wait() == 4
        assert_is(checkpoints.restore(make_state(0, LARGE)), 4, LARGE)


@write_fails
def test_a_last_save_that_fails_is_an_error(tmp_path, small_files, capsys):
    limit, allow = small_files
    words = r"Step 2 was not saved in .*File too large.* go on with --resume"
    with pytest.raises(CheckpointError, match=words), CheckpointWriter(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(1, LARGE), CONFIG, {}, "")
        checkpoints.wait()
        limit()
        checkpoints.save(make_state(2, LARGE), CONFIG, {}, "")
    allow()
    assert on_disk(tmp_path) == ["1"]


# Imports once; each child that is killed is a fork which has not started a backend.
KILLED = """
import os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import jax
sys.path.insert(0, {tests!r})
from mtp_jax.runs.writer import CheckpointWriter
from support.states import CONFIG, make_state
assert not jax._src.xla_bridge.backends_are_initialized()
random.seed({seed})
for trial in range({trials}):
    run_dir = Path({root!r}) / str(trial)
    run_dir.mkdir()
    acked = os.open(run_dir / "acked", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    child = os.fork()
    if not child:
        with CheckpointWriter(run_dir, keep=1 + trial % 2) as checkpoints:
            for step in range(1, 10**6):
                checkpoints.save(make_state(step), CONFIG, {{"loss": 1 / step}}, "")
                os.write(acked, f"{{checkpoints.latest_step() or 0}}\\n".encode())
                if trial % 3:
                    checkpoints.wait()
    deadline = time.time() + 120
    while os.fstat(acked).st_size < 6 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() / 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(acked)
"""


@pytest.mark.parametrize("trials", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_instant_has_its_last_complete_step(tmp_path, trials):
    script = KILLED.format(tests=str(TESTS), root=str(tmp_path), trials=trials, seed=0)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600, capture_output=True)
    left = 0
    for run_dir in sorted(tmp_path.iterdir()):
        acked = int((run_dir / "acked").read_text().split()[-1])
        left += any(not (path / MANIFEST).exists() for path in (run_dir / "checkpoints").iterdir())
        meta, state = load_all(run_dir)
        assert meta["step"] >= acked >= 1
        assert_is(state, meta["step"])
        following = meta["step"] + 1
        save(run_dir, {following: None}, keep=1, resumed_from=meta["step"])
        assert_is(load_all(run_dir)[1], following)
        assert len(on_disk(run_dir)) <= 2, "nothing of it stays but the best"
    assert left, "no kill came in the middle of anything: this test looked at nothing"


# Other meshes


def spread(tree, mesh):
    return jax.tree.map(lambda a: jax.device_put(a, jax.NamedSharding(mesh, jax.P(("data", "fsdp", "tensor")))), tree)


@pytest.mark.parametrize("there", [(1, 8, 1), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("here", [(1, 8, 1), (1, 1, 1), (4, 1, 1)])
def test_a_state_is_restored_on_any_mesh_whole_or_its_parameters(tmp_path, there, here):
    made = make_state(3)
    with tiny.mesh(*there) as mesh, CheckpointWriter(tmp_path, keep=1) as checkpoints:
        arrays = spread((made.params, made.opt_state, made.ema), mesh)
        checkpoints.save(TrainState(made.step, *arrays), CONFIG, {}, "")
    with tiny.mesh(*here) as mesh, Checkpoints(tmp_path) as checkpoints:
        arrays = spread((made.params, made.opt_state, made.ema), mesh)
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays)
        state = checkpoints.restore(TrainState(made.step, *target))
        params = checkpoints.restore_params(target[0])
        assert_is(jax.device_get(state), 3)
        for tree in (state.params, state.opt_state, state.ema, params):
            assert {leaf.sharding.mesh for leaf in jax.tree.leaves(tree)} == {mesh}
            assert {len(leaf.addressable_shards[0].data) for leaf in jax.tree.leaves(tree)} == {16 // np.prod(here)}
        np.testing.assert_array_equal(params["w"], made.params["w"])


# One of several processes that share eight devices, or one device each where there are more than two.
PROCESS = """
import sys
import jax
count, index, port, run_dir, what = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_num_cpu_devices", 8 if count == 1 else 4 if count == 2 else 1)
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{{port}}", num_processes=count, process_id=index)
sys.path.insert(0, {tests!r})
import resource
from pathlib import Path
import numpy as np
from mtp_jax.distributed import from_all
from mtp_jax.runs.checkpoints import CheckpointError, Checkpoints
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.config import MeshConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.state import TrainState
from support.states import CONFIG, make_state

mesh = make_mesh(MeshConfig(1, -1, 1))

def place(state):
    def whole(a, spec):
        a = np.asarray(a)
        return jax.make_array_from_callback(a.shape, jax.NamedSharding(mesh, spec), lambda part: a[part])

    arrays = jax.tree.map(lambda a: whole(a, jax.P("fsdp")), (state.params, state.opt_state, state.ema))
    return TrainState(whole(state.step, jax.P()), *arrays)

def fail(which):
    # Four saves, of which the second finds no room, or no folder, on one process.
    root = Path(run_dir) / "checkpoints"
    with CheckpointWriter(run_dir, keep=9) as checkpoints:
        for step in (1, 2, 3, 4):
            if step == 2 and index == int(which[-1]):
                if which.startswith("full"):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
                else:
                    root.rename(root.with_name("away"))
                    root.write_text("")
            checkpoints.save(place(make_state(step, 2**15)), CONFIG, {{"loss": 1 / step}}, "")
            if step == 2 and index == int(which[-1]) and which.startswith("none"):
                root.unlink()
                root.with_name("away").rename(root)
            from_all("")
            assert checkpoints.wait() == (step if step != 2 else 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert checkpoints.steps() == [1, 3, 4]
        checkpoints.restore(place(make_state(0, 2**15)))

index = int(index)
if what not in ("save", "load"):
    with jax.set_mesh(mesh):
        fail(what)
    sys.exit(0)

opened = CheckpointWriter(run_dir, keep=1) if what == "save" else Checkpoints(run_dir)
with jax.set_mesh(mesh), opened as checkpoints:
    if what == "save":
        for step in (1, 2, 3):
            checkpoints.save(place(make_state(step)), CONFIG, {{"loss": 1 / step}}, "")
        assert checkpoints.wait() == 3
    assert checkpoints.steps() == [3] and checkpoints.best_step() == 3
    try:
        found = checkpoints.restore(place(make_state(0)))
    except CheckpointError as error:
        sys.exit(f"{{error}}")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(place(make_state(3))), strict=True):
        for here, there in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(here.data, there.data)
"""


def processes(count, run_dir, what):
    """What each of `count` processes returned and wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = PROCESS.format(tests=str(TESTS))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(count), str(index), str(port), str(run_dir), what],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    return [(child.communicate(timeout=300)[1], child.returncode) for child in children]


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, (4,)), (2, (1, 2, 4)), (4, (1,)))]


@pytest.mark.parametrize("there, others", [(1, (2,)), *SLOW])
def test_a_state_is_restored_by_any_number_of_processes(tmp_path, there, others):
    for count, what in ((there, "save"), *((count, "load") for count in others)):
        for error, status in processes(count, tmp_path, what):
            assert status == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("which", ["full0", "full1", "none0"])
def test_a_save_that_fails_on_one_process_fails_on_all_and_the_next_is_tried(tmp_path, which):
    begun = time.monotonic()
    (first, status), (second, other) = processes(2, tmp_path, which)
    assert status == other == 0, first + second
    reason = "Not a directory: .*" if which == "none0" else rf"File too large.* \(process {which[-1]} of 2, host .*\)"
    assert re.search(rf"^warning: Step 2 was not saved in {tmp_path}: .*{reason}\.$", first, re.M), first
    assert "warning: Step" not in second and time.monotonic() - begun < 120
    assert on_disk(tmp_path) == ["1", "3", "4"]


def test_a_save_that_cannot_be_begun_beside_others_ends_the_run_with_the_way_out(tmp_path, monkeypatch):
    """The others wait in Orbax: this process ends, and they see that it is gone."""

    def fail(*args, **options):
        raise OSError(5, "Input/output error")

    save(tmp_path, {1: None})
    with CheckpointWriter(tmp_path, keep=2) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(ocp.AsyncCheckpointer, "save", fail)
        patch.setattr(jax, "process_count", lambda: 2)
        for module in ("checkpoints", "writer"):
            patch.setattr(f"mtp_jax.runs.{module}.from_all", lambda text: [text, ""])
        patch.setattr("mtp_jax.runs.checkpoints.on_first", lambda decide: decide())
        words = (
            r"Step 2 was not saved in .*Input/output error \(process 0 of 2\)\. The last good step is 1\..*auto-resume"
        )
        with pytest.raises(CheckpointError, match=words):
            checkpoints.save(make_state(2), CONFIG, {}, "")
        assert checkpoints.steps() == [1]


@pytest.mark.slow
def test_damage_that_one_process_finds_stops_all(tmp_path):
    assert [status for _, status in processes(2, tmp_path, "save")] == [0, 0]
    flip(max((tmp_path / "checkpoints/3/params").rglob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size))
    for error, status in processes(2, tmp_path, "load"):
        assert status == 1 and f"Step 3 of {tmp_path} is damaged: " in error and "No other step" in error


def test_what_one_process_finds_is_said_by_all(tmp_path, monkeypatch):
    """Else the others would wait for it in Orbax."""
    save(tmp_path, {4: None, 8: None})
    monkeypatch.setattr("mtp_jax.runs.checkpoints.from_all", lambda text: [text, "theirs is bad."])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"theirs is bad\. The last good"):
        checkpoints.restore(make_state(0))
