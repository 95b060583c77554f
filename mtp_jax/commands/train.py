"""`mtp-jax train EXPERIMENT.py`: train, and leave a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mtp_jax.commands import joined, parse, use_compilation_cache
from mtp_jax.commands.experiment import default_run_dir, load_experiment, split_file
from mtp_jax.config import TrainConfig
from mtp_jax.distributed import Distributed, connect, on_first
from mtp_jax.train.signals import STOPS, leave, listening
from mtp_jax.validate import differences, require


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a run goes, and what becomes of one that is there."""

    run_dir: str
    """Where the run goes; runs/<the experiment's name> by default."""
    resume: bool = False
    """Go on with the run that is there."""
    auto_resume: bool = False
    """Go on with the run that is there, or start it: for launchers, which give the same command again."""
    from_step: int | None = None
    """With --resume: go on from this checkpoint and not from the latest. Later ones are deleted at the next save."""
    overwrite: bool = False
    """Delete the run that is there and start again."""
    distributed: Distributed


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Where):
    """Train the CONFIG of an experiment file; every field of it can be set here.

    With --resume the run's own config holds instead, and what is set here changes it.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


@listening(leave, STOPS)  # before training hears them itself
def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    if args in (["-h"], ["--help"]):
        print("usage: mtp-jax train EXPERIMENT.py [options]\n\nmtp-jax train EXPERIMENT.py --help lists the options.")
        return
    file, rest = split_file(args, "train")
    config = experiment = load_experiment(file)
    default = Where(run_dir=default_run_dir(file), distributed=Distributed.from_environment())
    # The options need to fit the run alone, so where that is must be known before they are read.
    where, _ = tyro.cli(
        Where,
        prog=f"mtp-jax train {file}",
        args=joined(rest),
        default=default,
        return_unknown_args=True,
        add_help=False,
    )
    require(
        not where.auto_resume or not (where.resume or where.overwrite or where.from_step is not None),
        "--auto-resume is given together with --resume, --from-step or --overwrite. To go back to an earlier step, "
        "give --resume --from-step N once.",
    )
    helping = {"-h", "--help"} & set(rest)
    if not helping:
        connect(where.distributed)
    there = {"resume": where.resume, "overwrite": where.overwrite}
    if where.auto_resume and not helping:
        there = on_first(lambda: _what_is_there(where.run_dir))
    if there["resume"] or (where.auto_resume and there["overwrite"]):
        from mtp_jax.runs.layout import read_config
        from mtp_jax.train.checks import check_run_dir

        config = read_config(check_run_dir(where.run_dir, **there))
    options = parse(TrainOptions, rest, f"train {file}", TrainOptions(**vars(default), config=config))
    from mtp_jax.train.loop import train
    from mtp_jax.train.session import say

    if config is not experiment:
        flag = "--resume" if where.resume else "--auto-resume"
        for name, here, theirs in differences(experiment, options.config):
            if name != "model.num_tokens":  # which the run has from its tokenizer
                say(f"{flag}: {name} is {theirs!r} in this run ({here!r} in {file})")

    use_compilation_cache()
    train(options.config, options.run_dir, **there, resume_step=options.from_step, distributed=options.distributed)


def _what_is_there(run_dir: str) -> dict[str, bool]:
    """What `--auto-resume` means for a run directory.

    A run with a complete step goes on. One without, killed before or in its first save, starts again with its own
    config.
    """
    from mtp_jax.runs.layout import CHECKPOINTS_DIR, holds_run
    from mtp_jax.runs.manifest import sealed_steps
    from mtp_jax.runs.paths import full_path

    path = full_path(run_dir)
    if not holds_run(path) or sealed_steps(path / CHECKPOINTS_DIR):
        return {"resume": holds_run(path), "overwrite": False}
    return {"resume": False, "overwrite": True, "unfinished": True}
