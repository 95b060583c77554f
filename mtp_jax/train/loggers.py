"""Loggers of metrics: `metrics.jsonl`, TensorBoard, and the screen of the person who waits; `sinks` has others.

The training loop holds one `Loggers` and calls `log(kind, step, metrics)`; process 0 writes and the others do not.
`read_metrics` is the way back, for reports and notebooks.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from etils import epath

from mtp_jax.runs.paths import is_local, replace_file
from mtp_jax.train.sinks import SINKS

if TYPE_CHECKING:
    from rich.console import Console

METRICS_FILE = "metrics.jsonl"

Kind = Literal["train", "eval"]


class Logger(Protocol):
    """Anything that takes the numbers of a step."""

    def log(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """Record the `metrics` of `step`."""

    def close(self) -> None:
        """Write what is still held back, and let go of files and of the terminal."""


class Loggers:
    """All loggers of a run as one, and as a context manager that closes them.

    `resume_from` is the step that a resumed run starts from: later steps, left behind by a killed run, are forgotten.
    With `enabled` False, as on every process but the first, nothing is written at all. `log_to` are names of `SINKS`,
    which are told `config`, the run's.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        total_steps: int,
        *,
        resume_from: int | None = None,
        enabled: bool = True,
        console: Console | None = None,
        log_to: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        self._loggers: list[Logger] = []
        self._progress: ProgressLogger | None = None
        self._failed: list[Logger] = []
        if enabled:
            # Before the later steps are forgotten, which the sinks have; closed last, for they may be slow.
            earlier = None if resume_from is None else last_steps(run_dir)
            self._loggers = [SINKS[name](run_dir, config or {}, earlier) for name in dict.fromkeys(log_to)]
            self._loggers += [TensorBoardLogger(run_dir, resume_from), JsonlLogger(run_dir, resume_from)]
            self._progress = ProgressLogger(total_steps, resume_from or 0, console)
            self._loggers.append(self._progress)

    def log(self, kind: Kind, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand the `metrics` of `step` (scalars of Python, NumPy or JAX; None is left out) to every logger."""
        if self._loggers:
            values = {name: float(value) for name, value in metrics.items() if value is not None}
            for logger in self._loggers:
                self._try(logger, lambda logger=logger: logger.log(kind, step, values))

    def advance(self, step: int) -> None:
        """`step` has begun: move the bar, whose numbers come later."""
        if self._progress:
            self._progress.advance(step)

    def close(self) -> None:
        """Close every logger, even if one of them fails to."""
        with contextlib.ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(self._try, logger, logger.close)

    def _try(self, logger: Logger, write: Callable[[], None]) -> None:
        """A run goes on where its numbers cannot be written, on a full disk say; that is said once."""
        try:
            write()
        except OSError as error:
            if logger not in self._failed:
                self._failed.append(logger)
                print(f"warning: {type(logger).__name__} cannot write ({error}).", file=sys.stderr, flush=True)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonlLogger:
    """One line of strict JSON per call: `{"kind": "train", "step": 10, "time": unix seconds, "loss": 1.64, ...}`.

    Floats keep all their digits; JSON has no NaN and no infinities, so those are the strings "nan", "inf" and "-inf",
    which `float` (and `read_metrics`) turns back.

    On a local disk each line is appended at once; what cannot be written is kept, and tried again. Object stores cannot
    append: there the lines stay in memory and the whole file is written again every `flush_seconds`, at the end, and
    with each evaluation: one comes before every save, so that a saved step has its past.
    """

    def __init__(self, run_dir: epath.PathLike, resume_from: int | None = None, flush_seconds: float = 30.0):
        self._path = epath.Path(run_dir) / METRICS_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        earlier = [] if resume_from is None or not self._path.exists() else read_metrics(run_dir)
        self._lines = [_to_json(record) for record in earlier if record["step"] <= (resume_from or 0)]
        # In one go, so that a kill right here cannot lose the history.
        replace_file(self._path, "".join(self._lines))
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()
        self._file: io.FileIO | None = None
        if is_local(self._path):
            self._file = io.FileIO(self._path, "a")
            self._size = self._file.tell()
            self._lines.clear()

    def log(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        self._lines.append(_to_json({"kind": kind, "step": step, "time": time.time(), **metrics}))
        if self._file or kind == "eval" or time.monotonic() - self._flushed >= self._flush_seconds:
            self._flush()

    def close(self) -> None:
        """Flush and close."""
        with contextlib.closing(self._file) if self._file else contextlib.nullcontext():
            self._flush()

    def _flush(self) -> None:
        if self._file:
            # What is not in the file yet, in place of what an earlier try left of it.
            data = "".join(self._lines).encode()
            self._file.seek(self._size)
            self._file.truncate()
            while data:
                data = data[self._file.write(data) :]
            self._size = self._file.tell()
            self._lines.clear()
            return
        try:
            self._path.write_text("".join(self._lines))
        except Exception as error:  # gcsfs has its own, which are no OSError
            raise error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}") from error
        self._flushed = time.monotonic()


def read_metrics(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of `<run_dir>/metrics.jsonl`, in order; all values but `kind` and `step` are floats.

    What a killed process or a full disk left of a line is ignored. Raises `FileNotFoundError` if there is no such file.
    """
    records = []
    for line in (epath.Path(run_dir) / METRICS_FILE).read_bytes().splitlines(keepends=True):
        # No line stands in the way of a run that goes on.
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            record = json.loads(line if line.endswith(b"\n") else b"{}")
            values = {k: v if k in ("kind", "step") else float(v) for k, v in record.items()}
            records += [values] if {"kind", "step"} <= values.keys() else []
    return records


def last_steps(run_dir: epath.PathLike) -> dict[str, int]:
    """The last step of each kind in `metrics.jsonl`; nothing where there is none."""
    last: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for record in read_metrics(run_dir):
            last[record["kind"]] = max(record["step"], last.get(record["kind"], 0))
    return last


class TensorBoardLogger:
    """Event files under `<run_dir>/tensorboard`, with tags `train/<name>` and `eval/<name>`.

    TensorBoard hides the steps after `resume_from` that an earlier process wrote. A `gs://` run directory needs the
    package google-cloud-storage, which gcsfs brings.
    """

    def __init__(self, run_dir: epath.PathLike, resume_from: int | None = None):
        from tensorboardX import SummaryWriter

        purge_step = None if resume_from is None else resume_from + 1
        self._writer = SummaryWriter(str(epath.Path(run_dir) / "tensorboard"), purge_step=purge_step, flush_secs=30)
        # tensorboardX writes in a thread. If an error ended that, its queue would fill up and block for good.
        self._error: Exception | None = None
        file: Any = self._writer._get_file_writer()
        for name in ("write_event", "flush"):
            events = file.event_writer._ev_writer
            setattr(events, name, self._keep_error(getattr(events, name)))

    def log(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar per metric, or raise as `OSError` what went wrong when earlier ones were written."""
        self._check()
        for name, value in metrics.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        try:
            self._writer.close()
        except Exception as error:  # a bucket's package has its own, which are no OSError
            self._error = self._error or error
        self._check()

    def _check(self) -> None:
        if self._error:
            raise OSError(str(self._error) or repr(self._error)) from self._error

    def _keep_error(self, write: Callable[..., None]) -> Callable[..., None]:
        """`write` until it fails, and from then on nothing: behind half an event none can be read."""

        def kept(*args: Any) -> None:
            if not self._error:
                try:
                    write(*args)
                except Exception as error:
                    self._error = error

        return kept


class ProgressLogger:
    """What a person watches: a bar with the newest training numbers, and above it one line per evaluation.

    Where the output is no terminal (CI, log files) there is no bar and not one control character: a training line
    comes with the first numbers and then once per tenth of the run.
    """

    def __init__(self, total_steps: int, first_step: int = 0, console: Console | None = None):
        from rich import progress
        from rich.console import Console

        self._console = console or Console()
        self._live = self._console.is_interactive and self._console.file.isatty()
        self._total, self._printed_tenth = total_steps, -1
        self._progress = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[numbers]}", markup=False),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=self._console,
            expand=True,
            disable=not self._live,
            # Slow steps and evaluations must not empty the window that the time left is estimated from.
            speed_estimate_period=3600.0,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, numbers="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._progress.update(self._task, completed=step)

    def log(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """Show the newest numbers (train), or print the line of an evaluation (eval)."""
        if kind == "eval":
            self._print(f"step {step}  {_eval_text(metrics)}")
            return
        numbers = _train_text(metrics)
        self._progress.update(self._task, completed=max(step, int(self._progress.tasks[0].completed)), numbers=numbers)
        tenth = 10 * step // self._total
        if not self._live and tenth > self._printed_tenth:
            # At the first numbers steps were begun, and none has ended: nothing is known of how long they take.
            seconds = self._progress.tasks[0].time_remaining if self._printed_tenth >= 0 else None
            self._printed_tenth = tenth
            left = f"  {datetime.timedelta(seconds=int(seconds))} left" if seconds else ""
            self._print(f"step {step}/{self._total}  {numbers}{left}")

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        self._progress.stop()

    def _print(self, line: str) -> None:
        if self._live:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._console.file, flush=True)


def series(metrics: Mapping[str, float], prefix: str) -> list[float]:
    """The values of `<prefix>1`, `<prefix>2`, ... as far as they go."""
    names = (f"{prefix}{i}" for i in itertools.count(1))
    return [metrics[name] for name in itertools.takewhile(metrics.__contains__, names)]


def _train_text(metrics: Mapping[str, float]) -> str:
    parts = [("loss", "loss {:.3f}"), ("tokens_per_second", "{:,.0f} tokens/s"), ("mfu", "MFU {:.1%}")]
    return "  ".join(text.format(metrics[name]) for name, text in parts if name in metrics)


def _eval_text(metrics: Mapping[str, float]) -> str:
    text = f"valid loss {metrics['loss']:.3f}"
    if by_offset := series(metrics, "loss_offset_"):
        text += "  by offset " + " ".join(f"{loss:.2f}" for loss in by_offset)
    if "loss_first_token" in metrics:
        text += f"  first token {metrics['loss_first_token']:.2f}"
    if "expected_tokens" in metrics:
        text += f"  expected tokens per forward {metrics['expected_tokens']:.2f}"
    if "gate_effective" in metrics:
        text += f"  effective components {metrics['gate_effective']:.1f}/{len(series(metrics, 'gate_share_'))}"
    return text


def _to_json(record: dict[str, Any]) -> str:
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
