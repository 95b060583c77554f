"""Sources of documents, by name.

To add a source, write a class that follows `Source`, in a file of its own, and give it one line in `SOURCES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from mtp_jax.config import DataConfig
from mtp_jax.data.sources.stdlib import Stdlib
from mtp_jax.data.sources.text import Text
from mtp_jax.registry import lookup


class Source(Protocol):
    """Named documents in an order that does not change. Constructing one is cheap and reads no document."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change whenever the documents do. Cheap: it is computed at every start."""
        ...

    def documents(self, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """Every document once: a name that no other has, and its bytes. `data_dir` may keep what is made on the way."""
        ...


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "stdlib": Stdlib,
    "text": Text,
}


def load_source(config: DataConfig) -> Source:
    """The source that `config` names. Raises `ConfigError` on an unknown name or a source that has no documents."""
    return lookup(SOURCES, config.source, "DataConfig.source")(config)


def is_held_out(name: str, valid_fraction: float) -> bool:
    """Whether the document called `name` is held out: its hash, as a number in [0, 1), lies below `valid_fraction`.

    It depends on nothing else, so a document stays on its side when others come and go, and a larger fraction holds
    out all that a smaller one does.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < valid_fraction * 2**64
