"""`mtp-jax import SOURCE --out RUN`: a pretrained model becomes a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mtp_jax.commands import parse


@dataclass(frozen=True)
class Import:
    """Make a run directory of a Llama, Mistral or Qwen. Nothing of the source is changed or executed."""

    source: Annotated[str, tyro.conf.Positional]
    """A Hugging Face directory, the id of a model of its hub, such as Qwen/Qwen3-0.6B, or a .gguf file."""
    out: str
    """The run directory."""
    revision: str = "main"
    """Of a model of the hub: a branch, a tag or a commit."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What it computes in, and the heads that are trained on it; by default bfloat16 where its parameters are, else
    float32."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    options = parse(Import, args, "import")
    from mtp_jax.interop.importing import import_run

    run = import_run(options.source, options.out, revision=options.revision, dtype=options.dtype, log=print)
    print(f"Wrote {run}; continue text with: mtp-jax generate {run} --prompt 'Once upon a time'")
