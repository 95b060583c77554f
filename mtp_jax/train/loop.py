"""Training loop: all is made ready, then steps, logs, evaluations and saves. The arithmetic is in `step`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.data.batches import batches
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.placement import place
from mtp_jax.data.preparation import prepare as prepare_data
from mtp_jax.data.rows import pack
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import Tokenizer, load_tokenizer
from mtp_jax.distributed import Distributed, on_first
from mtp_jax.heads.registry import check_head
from mtp_jax.heads.shortlist import most_frequent, put_listed
from mtp_jax.mesh import on_mesh
from mtp_jax.runs.base import open_base, step_of
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.layout import run_tokenizer, to_config, write_run
from mtp_jax.runs.lock import one_writer
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.state import TrainState
from mtp_jax.train.acceptance import NOTHING_EXPECTED, Texts, base_texts, expected_metrics
from mtp_jax.train.checks import (
    as_learnt,
    check_cache,
    check_machine,
    check_run_dir,
    check_same_base,
    check_same_data,
    check_same_run,
    learnt_from,
)
from mtp_jax.train.clock import Speedometer
from mtp_jax.train.costs import Costs, costs
from mtp_jax.train.evaluate import batch_sizes, evaluate, held_out, is_normalised, named
from mtp_jax.train.init_from import begin_from
from mtp_jax.train.loggers import Loggers
from mtp_jax.train.profile import Profile
from mtp_jax.train.session import TrainSession, open_session, say
from mtp_jax.train.sinks import check_sinks
from mtp_jax.train.step import Metrics, Trainer, make_trainer
from mtp_jax.validate import differences, require, to_dict


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite. Nothing after the last good checkpoint was saved."""


def train(
    config: TrainConfig,
    run_dir: epath.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    unfinished: bool = False,
    resume_step: int | None = None,
    distributed: Distributed | None = None,
) -> dict[str, float]:
    """Train a model and leave a run directory that `mtp_jax.load` reads. Returns the last evaluation's metrics.

    Everything that can be refused is refused before the step is compiled, and before an old run is deleted.
    With `overwrite` a run that is there is deleted; with `unfinished` too only one that never saved a whole step, and
    what may be good of it is moved to RUN/lost-N.
    While another process trains in the directory, it is refused and nothing is touched.
    With `resume` it goes on from the latest checkpoint, or from `resume_step`: later ones are deleted at the next save.
    Several processes, connected by `mtp_jax.distributed.connect`, call it alike; `distributed` says how long they wait
    for each other.

    Raises:
      ConfigError: the config, the mesh, the data or the run directory does not fit; or another process trains there.
      NonFiniteLossError: the loss became NaN or infinite; the message names the last good checkpoint.
      CheckpointError: what it would go on from is damaged or not there; or the last state was not saved.
      KeyboardInterrupt: Ctrl-C, after the state was saved.
      PreemptedError: SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, or a notice that the machine is taken away, after the state was
        saved. Signals that are ignored stay so, and but for SIGTERM those that the caller has handlers for.
    """
    require(resume or resume_step is None, f"--from-step is {resume_step} and --resume is not given; give both.")
    check_sinks(config.log_to)
    check = lambda: str(check_run_dir(run_dir, resume=resume, overwrite=overwrite, unfinished=unfinished))  # noqa: E731
    with open_session(distributed or Distributed()) as session, one_writer(on_first(check)) as path:
        on_first(check)  # again: what was there may have changed until nobody else could write
        meta: dict[str, Any] = {}
        if resume:
            meta = Checkpoints(path).meta("latest" if resume_step is None else resume_step)
        base = open_base(config.base, step_of(meta, config.base)) if config.base else None
        config = base.resolve(config) if base else config
        if resume:
            saved = to_config(meta["config"], f"The config of step {meta['step']} in {path}")
            config = as_learnt(config, saved)
            check_resumed(config, saved, meta["step"], path)
            if base:
                check_same_base(base, meta, path)
            tokenizer = run_tokenizer(path, config)
        else:
            data = config.data
            tokenizer = base.tokenizer if base else load_tokenizer(data.tokenizer, data.end_of_document)
        config = config.with_tokenizer(tokenizer.vocab_size)
        mesh = check_machine(config, tokenizer)
        with jax.set_mesh(mesh):
            with session.phase("preparing data", 0), session.signals.at_once():
                store = prepare_data(config.data, print, tokenizer)
            config = learnt_from(config, store)
            check_cache(config, store, base)
            trainer = make_trainer(config, trunk=store.hidden is None)
            held_out_batches = held_out(config, store, mesh, config.eval_batches)
            if meta:
                with session.phase("restoring", 0):
                    state, evaluated = restore(trainer, mesh, store, path, meta)
            else:
                with session.phase("initialising", 0):
                    state, evaluated = begin(config, trainer, mesh, store, tokenizer), True
            if base:
                with session.phase("reading the base", 0):
                    shapes = jax.eval_shape(trainer.init).base
                    state = dataclasses.replace(state, base=base.params(on_mesh(shapes, mesh)))
            first = int(state.step)
            cost = costs(config, state.whole, is_normalised(config, store))
            describe(config, store, mesh, path, cost, first)
            texts: list[Texts] = []
            drafts = config.head.window > 1 and config.head.target == "ntp"  # by which the base's law is preserved
            if base and drafts and config.eval_temperatures and jax.process_count() == 1:
                with session.phase("writing texts", first):
                    texts = base_texts(config, base, trainer, state, store, tokenizer, mesh)
            if base and not texts:
                say(NOTHING_EXPECTED)
            read = batches(store.train, seed=config.data.seed, start=first, **batch_sizes(config, store, mesh))
            data = (place(batch, mesh, config.data.batch_size) for batch in read)
            batch = next(data)
            if first < config.steps:
                with session.phase("compiling", first):
                    trainer = trainer.compile(state, batch)
                say(f"compiled in {session.clock.lost['compiling']:.1f} s")
            # All that can fail before the first step has not failed: an old run is deleted only now, and whole.
            session.signals.hold()
            on_first(lambda: write_run(config, path, tokenizer, overwrite, unfinished))
            resumed_from = first if resume else None
            with (
                CheckpointWriter(path, config.keep_checkpoints, resumed_from) as checkpoints,
                Loggers(
                    path,
                    config.steps,
                    resume_from=resumed_from,
                    enabled=jax.process_index() == 0,
                    log_to=config.log_to,
                    config=to_dict(config),
                ) as loggers,
            ):
                speed = Speedometer(session.clock, first, config, cost, mesh)
                known = store.sha256, {"base": base.reference()} if base else {}
                run = TrainRun(config, session, trainer, held_out_batches, texts, *known, checkpoints, loggers, speed)
                return run.fit(state, batch, data, evaluated=evaluated)


@dataclass(frozen=True)
class TrainRun:
    """The steps of one call of `train`, and what they need: all that was made ready before the first one.

    `known`: what a checkpoint says of the run beside that, as `CheckpointWriter.save` takes it.
    """

    config: TrainConfig
    session: TrainSession
    trainer: Trainer
    held_out: list[Any]
    texts: list[Texts]
    data_sha256: str
    known: dict[str, Any]
    checkpoints: CheckpointWriter
    loggers: Loggers
    speed: Speedometer

    def fit(self, state: TrainState, batch: Any, data: Iterator[Any], *, evaluated: bool) -> dict[str, float]:
        """Train to `config.steps` on `batch` and then on `data`. Returns the metrics of the last evaluation.

        `evaluated` is whether the evaluation that is due at the state's step has been made.
        """
        config, session, signals = self.config, self.session, self.session.signals
        first = step = int(state.step)
        saved: int | None = None
        last_eval: dict[str, float] = {}
        looked = first if evaluated else -1  # the step of the last evaluation
        pending: tuple[int, Metrics] | None = None
        profile = Profile(config.profile, self.checkpoints.run_dir)
        due = lambda every: step % every == 0 or step == config.steps  # noqa: E731
        if looked != step and due(config.eval_every):
            last_eval = self.evaluate(step, state)
        while step < config.steps and not signals.stop():
            session.watchdog.at("training", step)
            profile.before(step, state)
            state, metrics = self.trainer.step(state, batch)
            step += 1
            self.loggers.advance(step)
            # The metrics of the step before are fetched while this one runs: the device never waits for the host.
            self.log(pending)
            pending = (step, metrics)
            if step < config.steps:
                with session.clock.losing("waiting for data", stops=False):
                    batch = next(data)
            if due(config.eval_every) or due(config.checkpoint_every):
                self.log(pending)
                pending = None
                # What is saved is evaluated first: its own loss has been seen to be finite.
                last_eval, looked = self.evaluate(step, state), step
                if due(config.checkpoint_every):
                    saved = self.save(state, last_eval)
        profile.stop(state)
        if signals.seen is not None and step > first and step != saved:
            self.log(pending)
            # One that was evaluated right before is not again, for it would be logged twice.
            self.save(state, last_eval if looked == step else self.evaluate(step, state))
        with session.phase("saving", step):
            last_good = self.checkpoints.wait()
        if step < config.steps or (signals.seen is not None and not last_eval):
            kept = "Nothing was saved yet; start again with --overwrite or --auto-resume."
            if last_good is not None:
                kept = f"Step {last_good} is saved in {self.checkpoints.run_dir}; go on with --resume."
            raise signals.end(kept)
        say(session.clock.summary())
        return last_eval

    def save(self, state: TrainState, metrics: dict[str, float]) -> int:
        """Begin to save a state, and return its step. A large one is hashed for long."""
        with self.session.phase("saving", int(state.step)):
            return self.checkpoints.save(state, self.config, metrics, self.data_sha256, **self.known)

    def log(self, pending: tuple[int, Metrics] | None) -> None:
        """Fetch the metrics of a step, if there is one, and log them. Raises `NonFiniteLossError`."""
        if pending is None:
            return
        step, metrics = pending[0], jax.device_get(pending[1])
        limit = self.config.optimizer.skip_limit
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if metrics["skipped"] > limit if limit else not finite:
            row = f"; {int(metrics['skipped'])} steps were skipped in a row" if limit else ""
            raise self._not_finite(f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}{row}.")
        if step % self.config.log_every == 0 or step == 1 or step == self.config.steps:
            self.loggers.log("train", step, {**named(metrics, self.config.head.window), **self.speed.read(step)})

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """The held-out metrics, logged. Raises `NonFiniteLossError`.

        In a run that is to stop, one batch is read to see that its loss is finite, and no metrics are returned.
        """
        with self.session.phase("evaluating", step, patient=False):
            metrics = self._held_out_metrics(step, state.whole)
            if self.texts and not self.session.signals.stop():
                metrics |= expected_metrics(self.trainer.graph, state.whole, self.texts)
            if state.ema is not None and not self.session.signals.stop():
                metrics["ema_loss"] = self._held_out_metrics(step, state.on_base(state.ema)).get("loss", math.nan)
        if self.session.signals.seen is not None:
            return {}
        self.loggers.log("eval", step, metrics)
        return metrics

    def _held_out_metrics(self, step: int, params: Any) -> dict[str, float]:
        def stop() -> bool:
            self.session.watchdog.at("evaluating", step)  # each batch has its own time
            return self.session.signals.stop()

        metrics = evaluate(self.trainer.evaluate, params, self.held_out, stop)
        if not math.isfinite(metrics["loss"]):
            raise self._not_finite(f"Step {step}: held-out loss {metrics['loss']}.")
        return metrics

    def _not_finite(self, what: str) -> NonFiniteLossError:
        last_good = self.checkpoints.wait()
        advice = "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or compute in float32"
        if last_good is None:
            return NonFiniteLossError(f"{what} No checkpoint was saved yet. {advice}, and start with --overwrite.")
        kept = f"The last good checkpoint is step {last_good} in {self.checkpoints.run_dir}."
        return NonFiniteLossError(f"{what} {kept} {advice}, and --resume.")


def begin(
    config: TrainConfig, trainer: Trainer, mesh: Mesh, store: Store | Mixture, tokenizer: Tokenizer
) -> TrainState:
    """The state of a new run: fresh, or from another run. A shortlist has the most frequent training tokens."""
    state, count, vocab_size = trainer.init(base=False), config.head.shortlist, config.model.vocab_size
    if count:
        ids, share = most_frequent(store.train.frequencies(vocab_size), count)
        say(f"shortlist: the {count:,} most frequent of {vocab_size:,} tokens are {share:.2%} of the data")
        ema = None if state.ema is None else put_listed(state.ema, ids)
        state = dataclasses.replace(state, params=put_listed(state.params, ids), ema=ema)
    if config.init_from:
        state, taken = begin_from(config, state, tokenizer, mesh)
        say(taken)
    return state


def check_resumed(config: TrainConfig, saved: TrainConfig, step: int, path: epath.Path) -> None:
    """Say what has changed since a checkpoint was saved, by options or by hand in config.json, or refuse it."""
    check_same_run(config, saved, path)
    require(
        step <= config.steps,
        f"--resume: the run in {path} is at step {step} and steps is {config.steps}; set --steps to {step} or more.",
    )
    for name, new, old in differences(config, saved):
        say(f"--resume: {name} is {new!r}; step {step} was trained with {old!r}")


def restore(
    trainer: Trainer, mesh: Mesh, store: Store | Mixture, path: epath.Path, meta: dict[str, Any]
) -> tuple[TrainState, bool]:
    """The state of the checkpoint that has this `meta`, and whether it was evaluated before it was saved."""
    with Checkpoints(path) as checkpoints:
        check_same_data(store, meta, path)
        later = [step for step in checkpoints.steps() if step > meta["step"]]
        if later:
            say(f"Steps {later} come after step {meta['step']}: they are deleted when the next one is saved.")
        state = checkpoints.restore(on_mesh(jax.eval_shape(lambda: trainer.init(base=False)), mesh), meta["step"])
    return state, bool(meta["metrics"])


def describe(
    config: TrainConfig, store: Store | Mixture, mesh: Mesh, path: epath.Path, cost: Costs, first: int
) -> None:
    """Say what is trained and what it will cost."""
    head = config.head
    per_token = f"{cost.head_flops / 1e6:.1f} MFLOPs a token, of the head alone"
    if cost.trunk_flops:
        ratio = cost.head_flops / cost.trunk_flops
        per_token = f"head / trunk {ratio:.2f} of {cost.trunk_flops / 1e6:.1f} MFLOPs a token"
    reads = f"hidden states of {config.base} from {store.path}" if store.hidden else "hidden states from the trunk"
    if store.hidden and config.head.against_target:
        reads += f", {'with' if is_normalised(config, store) else 'without'} the law's normaliser"
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(
        f"{path}: {'resuming at step ' + str(first) if first else 'new run'}, {config.steps} steps of "
        f"{config.data.batch_size} x {config.data.seq_len} tokens on mesh {dict(mesh.shape)} "
        f"({mesh.devices.flat[0].device_kind}{processes})\n"
        f"trunk {cost.trunk_params:,} parameters, head {cost.head_params:,} ({check_head(head).describe(head)}), "
        f"embedding {cost.embedding_params:,}\n"
        f"predicted cost: {per_token}; a step costs {cost.step_ratio:.2f} times one with a plain next-token head"
        + (f"\nreads {reads}, in {config.model.dtype}" if config.base else "")
    )
    parts = store.train.parts if isinstance(store, Mixture) else (store.train,)
    for rows in (pack(part, config.data.seq_len) for part in parts if part.mask is not None):
        if rows.cut:
            say(f"{rows.losses()} Raise data.seq_len, if the model's context allows it.")
