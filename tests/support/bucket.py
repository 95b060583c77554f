"""Processes that take the server of `fake_gcs` for the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import REPOSITORY
from support.fake_gcs import Bucket


def environment(url: str) -> dict[str, str]:
    """That of a process which takes the server at `url` for the real one."""
    names = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # TensorStore's
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the bucket's kind by gRPC, which is not served
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return {**os.environ, **names}


class Here:
    """Commands of processes that work on the bucket, in a folder of their own."""

    def __init__(self, bucket: Bucket, url: str, folder: Path):
        self.bucket, self.folder, self.env = bucket, folder, environment(url)

    def start(self, *args: object) -> subprocess.Popen:
        """Python with these arguments; what it says is in the file `log`."""
        with (self.folder / "log").open("w") as log:
            command = [sys.executable, *map(str, args)]
            return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log)

    def run(self, *args: object) -> tuple[int, str]:
        """The exit status, and what was said."""
        process = self.start(*args)
        try:
            process.wait(timeout=120)
        finally:
            process.kill()
            process.wait()
        return process.returncode, (self.folder / "log").read_text()

    def names(self, prefix: str = "") -> list[str]:
        """The objects of the run `mine` below a prefix."""
        return sorted(name for name in list(self.bucket.objects) if name.startswith(f"runs/mine/{prefix}"))

    def sealed(self) -> list[str]:
        """The steps of the run `mine` that have a manifest."""
        return [name.split("/")[-2] for name in self.names("checkpoints/") if name.endswith("/manifest.json")]
