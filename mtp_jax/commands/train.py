"""`mtp-jax train EXPERIMENT.py`: train, and leave a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mtp_jax.commands import parse, use_compilation_cache
from mtp_jax.commands.experiment import load_experiment, split_file
from mtp_jax.config import TrainConfig


@dataclass(frozen=True)
class Train:
    """Train the CONFIG of an experiment file; every field of it can be set here."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    run_dir: str
    """Where the run goes; runs/<the experiment's name> by default."""
    resume: bool = False
    """Go on with the run that is there."""
    overwrite: bool = False
    """Delete the run that is there and start again."""


def main(args: list[str]) -> None:
    """See the module."""
    if args in (["-h"], ["--help"]):
        print("usage: mtp-jax train EXPERIMENT.py [options]\n\nmtp-jax train EXPERIMENT.py --help lists the options.")
        return
    file, rest = split_file(args, "train")
    default = Train(load_experiment(file), str(Path("runs") / Path(file).stem))
    options = parse(Train, rest, f"train {file}", default)

    from mtp_jax.train.loop import train

    use_compilation_cache()
    train(options.config, options.run_dir, resume=options.resume, overwrite=options.overwrite)
