"""The training loop: everything that touches the outside world. The arithmetic is in `step`."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mtp_jax.checkpoint import Checkpoints, unsealed_steps
from mtp_jax.config import TrainConfig, require
from mtp_jax.data import Mixture, Store, Tokenizer, batches, load_tokenizer
from mtp_jax.data import prepare as prepare_data
from mtp_jax.distributed import Distributed, Watchdog, on_first
from mtp_jax.heads.shortlist import most_frequent
from mtp_jax.manifest import MANIFEST
from mtp_jax.mesh import on_mesh
from mtp_jax.run_dir import (
    CHECKPOINTS_DIR,
    clear_run,
    read_config,
    run_tokenizer,
    set_aside,
    write_config,
    write_tokenizer,
)
from mtp_jax.train.checks import check_machine, check_run_dir, check_same_data, check_same_run
from mtp_jax.train.clock import Clock
from mtp_jax.train.costs import Costs, costs
from mtp_jax.train.evaluate import evaluate, held_out, named, place, shard_of
from mtp_jax.train.initial import begin_from
from mtp_jax.train.loggers import Loggers
from mtp_jax.train.profile import Profile
from mtp_jax.train.signals import StopSignals
from mtp_jax.train.step import Metrics, TrainState, make_trainer


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite. Nothing after the last good checkpoint was saved."""


def say(text: str) -> None:
    """Print on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def with_shortlist(config: TrainConfig, store: Store | Mixture) -> TrainConfig:
    """`config` with the most frequent training tokens as its shortlist, where it gives their number."""
    count = config.head.shortlist
    if not isinstance(count, int) or not count:
        return config
    ids, share = most_frequent(store.train.frequencies(config.model.vocab_size), count)
    say(f"shortlist: the {count:,} most frequent of {config.model.vocab_size:,} tokens are {share:.2%} of the data")
    return dataclasses.replace(config, head=dataclasses.replace(config.head, shortlist=ids))


def train(
    config: TrainConfig,
    run_dir: epath.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_old: bool = False,
    resume_step: int | None = None,
    distributed: Distributed | None = None,
) -> dict[str, float]:
    """Train a model and leave a run directory that `mtp_jax.load` reads. Returns the last evaluation's metrics.

    Everything that can be refused is refused before the step is compiled, and before an old run is deleted.
    With `overwrite` a run that is there is deleted, or with `keep_old` too moved to RUN/lost-N.
    With `resume` it goes on from the latest checkpoint, or from `resume_step`: later ones are deleted at the next save.
    Several processes, connected by `mtp_jax.distributed.connect`, call it alike; `distributed` says how long they wait
    for each other.

    Raises:
      ConfigError: the config, the mesh, the data or the run directory does not fit.
      NonFiniteLossError: the loss became NaN or infinite; the message names the last good checkpoint.
      CheckpointError: what it would go on from is damaged or not there; or the last state was not saved.
      KeyboardInterrupt: Ctrl-C, after the state was saved.
      PreemptedError: SIGTERM, or a notice that the machine is taken away, after the state was saved.
    """
    require(resume or resume_step is None, f"--from-step is {resume_step} and --resume is not given; give both.")
    clock = Clock()
    with StopSignals() as signals, Watchdog(distributed or Distributed()) as watchdog:
        watchdog.at("preparing", 0, patient=True)
        try:
            check = functools.partial(check_run_dir, run_dir, resume=resume, overwrite=overwrite)
            path = epath.Path(on_first(lambda: str(check())))
            if resume:
                saved = read_config(path)
                config = dataclasses.replace(config, head=config.head.adopt_shortlist(saved.head))
                check_same_run(config, saved, path)
                tokenizer = run_tokenizer(path, config)
            else:
                tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
            mesh = check_machine(config, tokenizer)
            with jax.set_mesh(mesh):
                run = Run(config, mesh, path, resume, tokenizer, resume_step, clock, signals, watchdog)
                # All that can fail before the first step has not failed: an old run is deleted only now.
                on_first(lambda: _write_run(run, overwrite, keep_old))
                with Checkpoints(path, config.keep_checkpoints, run.last_good) as checkpoints:
                    return run.fit(checkpoints)
        except Exception as error:
            # An exchange that fails for want of a process may raise either.
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                watchdog.blame()
            raise


def _write_run(run: Run, overwrite: bool, keep_old: bool) -> None:
    if overwrite and keep_old:
        steps, aside = unsealed_steps(run.path), set_aside(run.path)
        last = aside / CHECKPOINTS_DIR / str(steps[-1])
        print(
            f"warning: Steps {steps} of {run.path} have no {MANIFEST}: it is lost, or the run was killed before it was "
            f"written. That run is moved to {aside}, and a new one begins. If they are good, "
            f"`mtp_jax.manifest.seal(etils.epath.Path({str(last)!r}))` makes the last one complete as it is, and "
            f"--run-dir {aside} --resume goes on from it. If nobody needs them, delete {aside}.",
            file=sys.stderr,
            flush=True,
        )
    elif overwrite:
        clear_run(run.path)
    write_config(run.path, run.config)
    write_tokenizer(run.path, run.tokenizer)


class Run:
    """One call of `train`. Making it prepares data, initialises or restores the state, and compiles."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        path: epath.Path,
        resume: bool,
        tokenizer: Tokenizer,
        resume_step: int | None,
        clock: Clock,
        signals: StopSignals,
        watchdog: Watchdog,
    ):
        self.mesh, self.path, self.resume, self.tokenizer = mesh, path, resume, tokenizer
        self.clock, self.signals, self.watchdog = clock, signals, watchdog
        with clock.losing("preparing data"):
            self.store = prepare_data(config.data, print, tokenizer)
        self.config = config = with_shortlist(config, self.store)
        self.trainer = make_trainer(config)
        self.held_out = held_out(config, self.store, mesh, config.eval_batches)
        with clock.losing("restoring" if resume else "initialising"):
            self.state = self._restore(resume_step) if resume else self._begin()
            self.first = int(self.state.step)
        self.last_good = self.first if resume else None
        self.cost = costs(config, self.state.params)
        self._describe(self.cost)
        if self.first < config.steps:
            self.batches = self._batches()
            self.batch = next(self.batches)
            watchdog.at("compiling", self.first, patient=True)
            with clock.losing("compiling"):
                self.trainer = self.trainer.compile(self.state, self.batch)
            say(f"compiled in {clock.lost['compiling']:.1f} s")

    def _begin(self) -> TrainState:
        state = self.trainer.init()
        if self.config.init_from:
            state, taken = begin_from(self.config, state, self.tokenizer, self.mesh)
            say(taken)
        return state

    def _restore(self, wanted: int | None) -> TrainState:
        with Checkpoints(self.path) as checkpoints:
            meta = checkpoints.meta("latest" if wanted is None else wanted)
            check_same_data(self.store, meta, self.path)
            self.evaluated = bool(meta["metrics"])
            require(
                meta["step"] <= self.config.steps,
                f"--resume: the run in {self.path} is at step {meta['step']} and steps is {self.config.steps}; "
                f"set --steps to {meta['step']} or more.",
            )
            later = [step for step in checkpoints.steps() if step > meta["step"]]
            if later:
                say(f"Steps {later} come after step {meta['step']}: they are deleted when the next one is saved.")
            return checkpoints.restore(on_mesh(jax.eval_shape(self.trainer.init), self.mesh), meta["step"])

    def fit(self, checkpoints: Checkpoints) -> dict[str, float]:
        """Train to `config.steps`. Returns the metrics of the last evaluation."""
        self.checkpoints = checkpoints
        resume_from, enabled = (self.first if self.resume else None), jax.process_index() == 0
        profile = Profile(self.config.profile, self.path)
        with Loggers(self.path, self.config.steps, resume_from=resume_from, enabled=enabled) as loggers:
            return self._steps(self.state, loggers, profile)

    def _steps(self, state: TrainState, loggers: Loggers, profile: Profile) -> dict[str, float]:
        config, clock, signals, step = self.config, self.clock, self.signals, self.first
        last_eval: dict[str, float] = {}
        pending: tuple[int, Metrics] | None = None
        clock.start(step, config, self.cost, self.mesh)
        signals.hold()
        if self.resume and not self.evaluated and (step % config.eval_every == 0 or step == config.steps):
            # It was due when the run was stopped.
            last_eval = self._evaluate(loggers, step, state)
        while step < config.steps and not signals.stop():
            self.watchdog.at("training", step)
            profile.before(step, state)
            state, metrics = self.trainer.step(state, self.batch)
            step += 1
            loggers.advance(step)
            # The metrics of the step before are fetched while this one runs: the device never waits for the host.
            self._log(loggers, pending)
            pending = (step, metrics)
            evaluating = step % config.eval_every == 0 or step == config.steps
            saving = step % config.checkpoint_every == 0 or step == config.steps
            if step < config.steps:
                with clock.losing("waiting for data", stops=False):
                    self.batch = next(self.batches)
            if evaluating or saving:
                self._log(loggers, pending)
                pending = None
                # What is saved is evaluated first: its own loss has been seen to be finite.
                last_eval = self._evaluate(loggers, step, state)
                if saving:
                    self._save(state, last_eval)
        profile.stop(state)
        self.watchdog.at("saving", step, patient=True)
        if signals.seen is not None and step > self.first and self.last_good != step:
            self._log(loggers, pending)
            self._save(state, self._evaluate(loggers, step, state))
        with clock.losing("saving"):
            self.last_good = self.checkpoints.wait()
        if step < config.steps or (signals.seen is not None and not last_eval):
            kept = "Nothing was saved yet; start again with --overwrite or --auto-resume."
            if self.last_good is not None:
                kept = f"Step {self.last_good} is saved in {self.path}; go on with --resume."
            raise signals.end(kept)
        say(clock.summary())
        return last_eval

    def _save(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.watchdog.at("saving", int(state.step), patient=True)  # a large one is hashed for long
        with self.clock.losing("saving"):
            self.last_good = self.checkpoints.save(state, self.config, metrics, self.store.sha256)

    def _log(self, loggers: Loggers, pending: tuple[int, Metrics] | None) -> None:
        if pending is None:
            return
        step, metrics = pending[0], jax.device_get(pending[1])
        limit = self.config.optimizer.skip_limit
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if metrics["skipped"] > limit if limit else not finite:
            row = f"; {int(metrics['skipped'])} steps were skipped in a row" if limit else ""
            raise self._not_finite(f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}{row}.")
        if step % self.config.log_every == 0 or step == 1 or step == self.config.steps:
            loggers.log("train", step, {**named(metrics), **self.clock.speed(step)})

    def _evaluate(self, loggers: Loggers, step: int, state: TrainState) -> dict[str, float]:
        """The held-out metrics, logged. Where the run is to stop it is one batch, to see that the loss is finite, and
        there are none."""
        with self.clock.losing("evaluating"):
            metrics = self._held_out_metrics(step, state.params)
            if state.ema is not None and not self.signals.stop():
                metrics["ema_loss"] = self._held_out_metrics(step, state.ema).get("loss", math.nan)
        if self.signals.seen is not None:
            return {}
        loggers.log("eval", step, metrics)
        return metrics

    def _held_out_metrics(self, step: int, params: Any) -> dict[str, float]:
        def stop() -> bool:
            self.watchdog.at("evaluating", step)
            return self.signals.stop()

        metrics = evaluate(self.trainer.evaluate, params, self.held_out, stop)
        if not math.isfinite(metrics["loss"]):
            raise self._not_finite(f"Step {step}: held-out loss {metrics['loss']}.")
        return metrics

    def _not_finite(self, what: str) -> NonFiniteLossError:
        self.last_good = self.checkpoints.wait()
        advice = "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or compute in float32"
        if self.last_good is None:
            return NonFiniteLossError(f"{what} No checkpoint was saved yet. {advice}, and start with --overwrite.")
        kept = f"The last good checkpoint is step {self.last_good} in {self.path}."
        return NonFiniteLossError(f"{what} {kept} {advice}, and --resume.")

    def _batches(self) -> Iterator[Any]:
        """The batches from the state's step on, on the mesh."""
        data = self.config.data
        found = batches(
            self.store.train,
            seq_len=data.seq_len,
            window=self.config.head.window,
            batch_size=data.batch_size,
            seed=data.seed,
            start=self.first,
            shard=shard_of(self.mesh, data.batch_size),
        )
        return (place(batch, self.mesh, data.batch_size) for batch in found)

    def _describe(self, c: Costs) -> None:
        config, head, first = self.config, self.config.head, self.first
        processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(
            f"{self.path}: {'resuming at step ' + str(first) if first else 'new run'}, {config.steps} steps of "
            f"{config.data.batch_size} x {config.data.seq_len} tokens on mesh {dict(self.mesh.shape)} "
            f"({self.mesh.devices.flat[0].device_kind}{processes})"
        )
        say(
            f"trunk {c.trunk_params:,} parameters, head {c.head_params:,} ({head.kind}, R = {head.rank}, "
            f"W = {head.window}, {head.factors} factors), embedding {c.embedding_params:,}"
        )
        say(
            f"predicted cost: head / trunk {c.head_flops / c.trunk_flops:.2f} of {c.trunk_flops / 1e6:.1f} MFLOPs a "
            f"token; a step costs {c.step_ratio:.2f} times one with a plain next-token head"
        )
