"""Worker processes of the package."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this worker when its parent ends, however that ends; call it first in a worker."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker of multiprocessing has a parent to end with"
    parent.join()  # on a pipe whose other end the system closes, for SIGKILL too
    os._exit(1)
