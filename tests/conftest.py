"""Strict settings for every test: 8 simulated CPU devices, and silent broadcasting over ranks is an error.

Warnings are errors too (setup.cfg). The environment variables reach subprocesses, which otherwise start as a
user's would: with the real number of devices and JAX's own settings.
"""

import importlib.metadata
import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Compiled functions outlive the run: the second `make test` skips most of the compiling.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Without LLVM's optimizations: tests of tiny shapes compile for longer than they run. Twice as fast with no cache, and
# again by XLA's older emitters, which only some releases have: one that does not know a flag refuses to start. In one
# piece, for the other core has a test of its own. What the caller's XLA_FLAGS say comes after it and wins.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []),
        os.environ.get("XLA_FLAGS", ""),
    )
)

# A shell that runs the suite in the background has Ctrl-C ignored, and nohup a closed terminal; what the tests start
# would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import hypothesis
import jax
import pytest

from support import fake_gcs, tiny
from support.bucket import Here
from support.compilation import quick
from support.processes import make_corpus

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# An example that compiles takes seconds, so no deadline; the same examples in every run, so a failure can be repeated.
hypothesis.settings.register_profile("mtp_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mtp_jax")


@pytest.fixture(scope="module", autouse=True)
def forget():
    """A program is some pieces of memory, and Linux lets a process have 65,530 of them: what earlier files compiled
    goes before there are so many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of what code does, not of how fast: faster code would take longer to compile."""
    with quick():
        yield


@pytest.fixture(scope="module")
def mesh():
    """A mesh of one device, in scope."""
    with tiny.mesh() as made:
        yield made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a corpus, for the runs of processes (see `support.processes.experiment`)."""
    root = tmp_path_factory.mktemp("processes")
    make_corpus(root)
    return root


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Processes that work on a bucket, and the bucket."""
    pytest.importorskip("gcsfs", reason="gs:// is opened by gcsfs: pip install 'mtp_jax[gcs]'")
    pytest.importorskip("google.cloud.storage", reason="TensorBoard's events are written to gs:// by it")
    with fake_gcs.serve("bucket") as (bucket, url):
        yield Here(bucket, url, tmp_path_factory.mktemp("here"))
