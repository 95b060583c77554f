"""`mtp-jax export RUN --out DIR`: the model of a run, for `transformers` and what reads its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtp_jax.commands import RunOptions, parse, use_compilation_cache


@dataclass(frozen=True, kw_only=True)
class Export(RunOptions):
    """Write config, safetensors, tokenizer and a model card, without the head: the law that decoding keeps."""

    out: str
    """The directory, which is made."""
    to: Literal["hf"] = "hf"
    """The format: that of Hugging Face."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    options = parse(Export, args, "export")
    use_compilation_cache()
    from mtp_jax.interop.exporting import check_exportable, export_run
    from mtp_jax.runs.layout import read_config
    from mtp_jax.runs.paths import check_writable, full_path

    config = read_config(options.run)
    check_exportable(config.model, config.head)
    check_writable(full_path(options.out).parent, "Give another --out.", folder=True)
    print(f"Wrote {export_run(options.load(), options.run, options.out)}")
