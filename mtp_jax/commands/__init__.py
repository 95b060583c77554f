"""Commands of `mtp-jax`, a file for each: its options as a dataclass, and `main(args)`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], name: str, default: T | None = None) -> T:
    """The options in `args` as a `cls`. Unknown options are answered with the nearest, and end the process."""
    import tyro

    return tyro.cli(cls, prog=f"mtp-jax {name}", args=args, default=default)  # type: ignore[arg-type]


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 120))


def use_compilation_cache() -> None:
    """Keep compiled functions between processes, in `$JAX_COMPILATION_CACHE_DIR` or `~/.cache/mtp_jax/xla`."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "mtp_jax" / "xla"))
