"""The training loop: everything that touches the outside world. The arithmetic is in `step`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mtp_jax.checkpoint import Checkpoints
from mtp_jax.config import ConfigError, TrainConfig, require, shown, to_dict
from mtp_jax.data import Store, Tokenizer, batches, load_tokenizer
from mtp_jax.data import prepare as prepare_data
from mtp_jax.heads.shortlist import most_frequent
from mtp_jax.mesh import make_mesh, on_mesh
from mtp_jax.run_dir import clear_run, read_config, run_tokenizer, write_config, write_tokenizer
from mtp_jax.train.costs import Costs, costs, peak_flops
from mtp_jax.train.evaluate import evaluate, held_out, named, place
from mtp_jax.train.loggers import Loggers
from mtp_jax.train.step import Metrics, TrainState, make_trainer

# Fields of model, head and data that a resumed run may change: they change no parameter's shape and no batch.
RESUMABLE = {
    *(("model", name) for name in ("dtype", "remat", "attention", "context_length")),
    *(("head", name) for name in ("ntp_weight", "gamma", "z_weight", "balance", "balance_weight", "init_noise")),
    *(("head", name) for name in ("loss_fraction", "backward_draws")),
    ("data", "cache_dir"),
}


def check_machine(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Mesh:
    """The mesh of a config. Raises `ConfigError` if the devices, the batch or the tokenizer do not fit it."""
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    config.check_tokenizer(tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    config.check_mesh((mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]))
    return mesh


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite. Nothing after the last good checkpoint was saved."""


def check_run_dir(run_dir: epath.PathLike, *, resume: bool = False, overwrite: bool = False) -> epath.Path:
    """The path of a run directory that may be used, before anything expensive happens. Nothing is changed.

    Raises:
      ConfigError: it exists and is not empty, and neither `resume` nor `overwrite` says what to do; or both do; or
        there is nothing to resume; or `overwrite` would delete something that is not a run directory.
    """
    path = epath.Path(run_dir).expanduser().resolve()
    if resume and overwrite:
        raise ConfigError("Both --resume and --overwrite are given; choose one.")
    require(not path.exists() or path.is_dir(), f"The run directory {path} is a file; give another --run-dir.")
    exists = path.exists() and any(path.iterdir())
    if resume and not exists:
        raise ConfigError(f"--resume was given and {path} has no run in it. Leave --resume out to start one.")
    if exists and not (resume or overwrite):
        raise ConfigError(
            f"The run directory {path} exists. Give --resume to go on with it, --overwrite to delete it and start "
            "again, or another --run-dir."
        )
    if exists and overwrite:
        try:
            read_config(path)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"--overwrite leaves {path} alone, for it is not a run of mtp_jax: {error}") from error
    return path


def check_same_run(config: TrainConfig, saved: TrainConfig, path: epath.Path) -> None:
    """Refuse to resume with another model, head or data: the parameters or the next batch would not be the run's."""
    require(
        config.optimizer.name == saved.optimizer.name,
        f"--resume: optimizer.name is {config.optimizer.name!r} and the run in {path} has {saved.optimizer.name!r}; "
        "their states differ. Give the run's own value, or start another run with --run-dir.",
    )
    require(
        bool(config.ema_decay) == bool(saved.ema_decay),
        f"--resume: ema_decay is {config.ema_decay} and the run in {path} has {saved.ema_decay}; it keeps an average "
        "of its weights from its first step, or none. Give the run's own value, or start another run with --run-dir.",
    )
    for part in ("model", "head", "data"):
        new, old = to_dict(getattr(config, part)), to_dict(getattr(saved, part))
        for name in old:
            require(
                new[name] == old[name] or (part, name) in RESUMABLE,
                f"--resume: {part}.{name} is {shown(new[name])} and the run in {path} has {shown(old[name])}. "
                "Give the run's own value, or start another run with --run-dir.",
            )


def check_same_data(store: Store, meta: dict[str, Any], path: epath.Path) -> None:
    """Refuse to resume on other training tokens than those of the checkpoint: its next batch would not be the run's."""
    saved = meta["data_sha256"]
    require(
        store.sha256 == saved,
        f"--resume: the training tokens in {store.path} have sha256 {store.sha256[:12]} and the run in {path} was "
        f"trained on {saved[:12]}; files, tokenizer or interpreter have changed. Bring the old ones back, or start "
        "another run with --run-dir.",
    )


def with_shortlist(config: TrainConfig, store: Store) -> TrainConfig:
    """`config` with the most frequent training tokens as its shortlist, where it gives their number."""
    count = config.head.shortlist
    if not isinstance(count, int) or not count:
        return config
    ids, share = most_frequent(store.train.tokens, count, config.model.vocab_size)
    print(f"shortlist: the {count:,} most frequent of {config.model.vocab_size:,} tokens are {share:.2%} of the data")
    return dataclasses.replace(config, head=dataclasses.replace(config.head, shortlist=ids))


def train(
    config: TrainConfig,
    run_dir: epath.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resume_step: int | None = None,
) -> dict[str, float]:
    """Train a model and leave a run directory that `mtp_jax.load` reads. Returns the last evaluation's metrics.

    Everything that can be refused is refused before the step is compiled, and before an old run is deleted.
    With `resume` it goes on from the latest checkpoint, or from `resume_step`: later ones are deleted at the next save.

    Raises:
      ConfigError: the config, the mesh, the data or the run directory does not fit.
      NonFiniteLossError: the loss became NaN or infinite; the message names the last good checkpoint.
      CheckpointError: what it would go on from is damaged or not there; or the last state was not saved.
      KeyboardInterrupt: Ctrl-C, after the state was saved.
    """
    require(resume or resume_step is None, f"--from-step is {resume_step} and --resume is not given; give both.")
    path = check_run_dir(run_dir, resume=resume, overwrite=overwrite)
    if resume:
        saved = read_config(path)
        config = dataclasses.replace(config, head=config.head.adopt_shortlist(saved.head))
        check_same_run(config, saved, path)
        tokenizer = run_tokenizer(path, config)
    else:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    mesh = check_machine(config, tokenizer)
    with jax.set_mesh(mesh):
        run = Run(config, mesh, path, resume, tokenizer, resume_step)
        # All that can fail before the first step has not failed: an old run is deleted only now.
        if overwrite:
            clear_run(path)
        write_config(path, run.config)
        write_tokenizer(path, tokenizer)
        with Checkpoints(path, config.keep_checkpoints, run.last_good) as checkpoints:
            return run.fit(checkpoints)


class Run:
    """One call of `train`. Making it prepares data, initialises or restores the state, and compiles."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        path: epath.Path,
        resume: bool,
        tokenizer: Tokenizer | None = None,
        resume_step: int | None = None,
    ):
        self.mesh, self.path, self.resume = mesh, path, resume
        self.shard = (jax.process_index(), jax.process_count())
        self.store = prepare_data(config.data, print, tokenizer)
        self.config = config = with_shortlist(config, self.store)
        self.trainer = make_trainer(config)
        self.held_out = held_out(config, self.store, mesh, config.eval_batches)
        self.state = self._restore(resume_step) if resume else self.trainer.init()
        self.first = int(self.state.step)
        self.last_good = self.first if resume else None
        cost = costs(config, self.state.params)
        self._describe(cost)
        self.clock = Clock(config, cost, mesh)
        if self.first < config.steps:
            self.batches = self._batches()
            self.batch = next(self.batches)
            self.clock.compile_seconds = self._compile()

    def _restore(self, wanted: int | None) -> TrainState:
        with Checkpoints(self.path) as checkpoints:
            meta = checkpoints.meta("latest" if wanted is None else wanted)
            check_same_data(self.store, meta, self.path)
            require(
                meta["step"] <= self.config.steps,
                f"--resume: the run in {self.path} is at step {meta['step']} and steps is {self.config.steps}; "
                f"set --steps to {meta['step']} or more.",
            )
            later = [step for step in checkpoints.steps() if step > meta["step"]]
            if later:
                print(f"Steps {later} come after step {meta['step']}: they are deleted when the next one is saved.")
            return checkpoints.restore(on_mesh(jax.eval_shape(self.trainer.init), self.mesh), meta["step"])

    def _compile(self) -> float:
        """Compile the step and the evaluation, say how long it took, and return the seconds."""
        begun = time.perf_counter()
        self.trainer = self.trainer.compile(self.state, self.batch)
        seconds = time.perf_counter() - begun
        print(f"compiled in {seconds:.1f} s", flush=True)
        return seconds

    def fit(self, checkpoints: Checkpoints) -> dict[str, float]:
        """Train to `config.steps`. Returns the metrics of the last evaluation."""
        self.checkpoints = checkpoints
        resume_from, enabled = (self.first if self.resume else None), self.shard[0] == 0
        with Loggers(self.path, self.config.steps, resume_from=resume_from, enabled=enabled) as loggers:
            return self._steps(self.state, loggers)

    def _steps(self, state: TrainState, loggers: Loggers) -> dict[str, float]:
        config, clock, step = self.config, self.clock, self.first
        last_eval: dict[str, float] = {}
        pending: tuple[int, Metrics] | None = None
        with Interrupts() as interrupts:
            clock.start(step)
            while step < config.steps and not interrupts.seen:
                state, metrics = self.trainer.step(state, self.batch)
                step += 1
                loggers.advance(step)
                # The metrics of the step before are fetched while this one runs: the device never waits for the host.
                self._log(loggers, pending)
                pending = (step, metrics)
                evaluating = step % config.eval_every == 0 or step == config.steps
                saving = step % config.checkpoint_every == 0 or step == config.steps
                if step < config.steps:
                    self.batch = next(self.batches)
                if evaluating or saving:
                    self._log(loggers, pending)
                    pending = None
                    with clock.paused():
                        # What is saved is evaluated first: its own loss has been seen to be finite.
                        last_eval = self._evaluate(loggers, step, state)
                        if saving:
                            self._save(state, last_eval)
            if interrupts.seen and step > self.first and self.last_good != step:
                self._log(loggers, pending)
                last_eval = self._evaluate(loggers, step, state)
                self._save(state, last_eval)
            self.last_good = self.checkpoints.wait()
        if step < config.steps:
            kept = f"Step {self.last_good} is saved in {self.path}; go on with --resume." if self.last_good else ""
            print(f"Interrupted. {kept}", flush=True)
            raise KeyboardInterrupt
        return last_eval

    def _save(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.last_good = self.checkpoints.save(state, self.config, metrics, self.store.sha256)

    def _log(self, loggers: Loggers, pending: tuple[int, Metrics] | None) -> None:
        if pending is None:
            return
        step, metrics = pending[0], jax.device_get(pending[1])
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise self._not_finite(f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}.")
        if step % self.config.log_every == 0 or step == 1 or step == self.config.steps:
            loggers.log("train", step, {**named(metrics), **self.clock.speed(step)})

    def _evaluate(self, loggers: Loggers, step: int, state: TrainState) -> dict[str, float]:
        metrics = evaluate(self.trainer.evaluate, state.params, self.held_out)
        if state.ema is not None:
            metrics["ema_loss"] = evaluate(self.trainer.evaluate, state.ema, self.held_out)["loss"]
        loggers.log("eval", step, metrics)
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
            shard=self.shard,
        )
        return (place(batch, self.mesh) for batch in found)

    def _describe(self, c: Costs) -> None:
        config, head, first = self.config, self.config.head, self.first
        print(
            f"{self.path}: {'resuming at step ' + str(first) if first else 'new run'}, {config.steps} steps of "
            f"{config.data.batch_size} x {config.data.seq_len} tokens on mesh {dict(self.mesh.shape)} "
            f"({self.mesh.devices.flat[0].device_kind})"
        )
        print(
            f"trunk {c.trunk_params:,} parameters, head {c.head_params:,} ({head.kind}, R = {head.rank}, "
            f"W = {head.window}, {head.factors} factors), embedding {c.embedding_params:,}"
        )
        print(
            f"predicted cost: head / trunk {c.head_flops / c.trunk_flops:.2f} of {c.trunk_flops / 1e6:.1f} MFLOPs a "
            f"token; a step costs {c.step_ratio:.2f} times one with a plain next-token head",
            flush=True,
        )


class Interrupts:
    """Ctrl-C as a flag, so that a step is never cut in half; a second one interrupts at once."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> Interrupts:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        print("Interrupted: saving after this step. Press again to stop without saving.", flush=True)


class Clock:
    """Tokens per second and MFU between logged steps; compiling, evaluating and saving do not count."""

    def __init__(self, config: TrainConfig, cost: Costs, mesh: Mesh):
        self.tokens = config.data.batch_size * config.data.seq_len
        self.flops = cost.trunk_flops + cost.head_flops
        peak = peak_flops(mesh.devices.flat[0])
        self.peak = None if peak is None else peak * mesh.devices.size
        self.compile_seconds: float | None = None

    def start(self, step: int) -> None:
        """Steps after `step` count from now on."""
        self.mark, self.mark_step = time.perf_counter(), step

    def speed(self, step: int) -> dict[str, float | None]:
        """Rates since the last call (metrics of `step` are on the host, so that step is done), and, in the first
        record of a process, the seconds that it compiled."""
        now = time.perf_counter()
        result: dict[str, float | None] = {"tokens": float(step * self.tokens)}
        if step > self.mark_step:
            rate = (step - self.mark_step) * self.tokens / (now - self.mark)
            result["tokens_per_second"] = rate
            result["mfu"] = None if self.peak is None else rate * self.flops / self.peak
            self.mark, self.mark_step = now, step
        result["compile_seconds"], self.compile_seconds = self.compile_seconds, None
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        begun = time.perf_counter()
        yield
        self.mark += time.perf_counter() - begun
