"""Worker processes of the package."""

import multiprocessing
import os
import signal
import threading

ENDS_WITH_INPUT = "MTP_JAX_ENDS_WITH_INPUT"


def end_with_parent() -> None:
    """End this worker when its parent ends, however that ends; call it first in a worker."""
    threading.Thread(target=_watch, daemon=True).start()


def end_with_input() -> None:
    """Tell this process to save and end when whoever started it ends, if that was `mtp_jax`: its standard input ends
    then."""
    if os.environ.pop(ENDS_WITH_INPUT, None):  # what it starts itself does not inherit it
        threading.Thread(target=_read, daemon=True).start()


def _read() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _watch() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker of multiprocessing has a parent to end with"
    parent.join()  # on a pipe whose other end the system closes, for SIGKILL too
    os._exit(1)
