"""`mtp-jax train EXPERIMENT.py`: train, and leave a run directory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mtp_jax.commands import parse, use_compilation_cache
from mtp_jax.commands.experiment import load_experiment, split_file
from mtp_jax.config import TrainConfig, differences, shown


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a run goes, and what becomes of one that is there."""

    run_dir: str
    """Where the run goes; runs/<the experiment's name> by default."""
    resume: bool = False
    """Go on with the run that is there."""
    from_step: int | None = None
    """With --resume: go on from this checkpoint and not from the latest. Later ones are deleted at the next save."""
    overwrite: bool = False
    """Delete the run that is there and start again."""


@dataclass(frozen=True, kw_only=True)
class Train(Where):
    """Train the CONFIG of an experiment file; every field of it can be set here.

    With --resume the run's own config holds instead, and what is set here changes it.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(args: list[str]) -> None:
    """See the module."""
    if args in (["-h"], ["--help"]):
        print("usage: mtp-jax train EXPERIMENT.py [options]\n\nmtp-jax train EXPERIMENT.py --help lists the options.")
        return
    file, rest = split_file(args, "train")
    config = experiment = load_experiment(file)
    default = Where(run_dir=str(Path("runs") / Path(file).stem))
    # The options need to fit the run alone, so where that is must be known before they are read.
    where, _ = tyro.cli(
        Where, prog=f"mtp-jax train {file}", args=rest, default=default, return_unknown_args=True, add_help=False
    )
    if where.resume:
        from mtp_jax.run_dir import read_config
        from mtp_jax.train.loop import check_run_dir

        config = read_config(check_run_dir(where.run_dir, resume=True, overwrite=where.overwrite))
    options = parse(Train, rest, f"train {file}", Train(run_dir=default.run_dir, config=config))
    if options.resume:
        head = experiment.head.adopt_shortlist(options.config.head)
        for name, here, there in differences(dataclasses.replace(experiment, head=head), options.config):
            print(f"--resume: {name} is {shown(there)} in this run ({shown(here)} in {file})")

    from mtp_jax.train.loop import train

    use_compilation_cache()
    train(
        options.config,
        options.run_dir,
        resume=options.resume,
        overwrite=options.overwrite,
        resume_step=options.from_step,
    )
