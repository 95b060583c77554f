"""An imported run, written by one process on one device, on other meshes and in several processes: the same logits."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.config import MeshConfig
from mtp_jax.interop.importing import import_run
from mtp_jax.mesh import make_mesh
from mtp_jax.state import split
from support import REPOSITORY
from support.pretrained import FAMILIES, write
from support.processes import free_port

pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")

TOKENS_BT = np.random.default_rng(0).integers(0, 256, (8, 12)).astype(np.int32)
PROCESS = """
import sys
import jax, numpy as np
port, index, run_dir, out = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
import mtp_jax
from jax.experimental.multihost_utils import process_allgather
run = mtp_jax.load(run_dir, mesh=mtp_jax.MeshConfig(1, 4, 2))
assert jax.process_count() == 2 and run.mesh.size == 8
tokens_BT = np.random.default_rng(0).integers(0, 256, (8, 12)).astype(np.int32)
with jax.set_mesh(run.mesh):
    logp_BTV = jax.jit(lambda model, t: model.target(model.see(t))[0])(run.model, tokens_BT)
found = process_allgather(logp_BTV, tiled=True)
if index == "0":
    np.save(out, found)
"""


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def path(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("imported")
    directory, *_ = write(root / "source", "float16", **FAMILIES[request.param])
    return import_run(str(directory), root / "run")


@pytest.fixture(scope="module")
def alone(path):
    """The run on one device, and its logits."""
    run = mtp_jax.load(path)
    return run, law(run)


def law(run):
    with jax.set_mesh(run.mesh):
        return np.asarray(jax.jit(lambda model, t: model.target(model.see(t))[0])(run.model, TOKENS_BT))


@pytest.mark.parametrize("shape", [(1, 4, 2), (4, 2, 1), (1, 8, 1)])
def test_eight_devices(path, alone, shape):
    run = mtp_jax.load(path, mesh=make_mesh(MeshConfig(*shape), jax.devices()[:8]))
    jax.tree.map(np.testing.assert_array_equal, split(run.model)[1], split(alone[0].model)[1])
    np.testing.assert_allclose(law(run), alone[1], atol=2e-5)


def test_two_processes(path, alone, tmp_path):
    out, port = tmp_path / "logits.npy", free_port()
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, *map(str, (port, i, path, out))], cwd=REPOSITORY)
        for i in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    np.testing.assert_allclose(np.load(out), alone[1], atol=2e-5)
