"""The loggers: strict JSON that survives kills and resumes, event files that can be read, and a quiet plain log."""

import datetime
import errno
import io
import json
import math
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from mtp_jax.train import loggers
from mtp_jax.train.loggers import JsonlLogger, Loggers, ProgressLogger, TensorBoardLogger, read_metrics
from support.commands import refuse

TRAIN = {"loss": 1.5, "tokens_per_second": 12345.6, "mfu": 0.412}
EVAL = {
    "loss": 1.642,
    **{f"loss_offset_{s}": loss for s, loss in enumerate((1.64, 2.31, 2.67, 2.9), 1)},
    "loss_first_token": 1.64,
    "gate_effective": 3.42,
    **{f"gate_share_{r}": 0.25 for r in range(1, 5)},
}
EVAL_LINE = "step 200  valid loss 1.642  by offset 1.64 2.31 2.67 2.90  first token 1.64  effective components 3.4/4"


def test_every_line_is_strict_json_and_keeps_all_digits(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": float(np.float32(1.1)), "d": math.nan, "e": math.inf, "f": -math.inf}
    logger = JsonlLogger(tmp_path)
    logger.log("train", 1, values)
    logger.log("eval", 1, values)
    # Flushed per line: both are there before the logger is closed.
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    train, evaluation = read_metrics(tmp_path)
    assert (train["kind"], train["step"]) == ("train", 1)
    assert evaluation["kind"] == "eval"
    np.testing.assert_array_equal([train[name] for name in values], list(values.values()))
    logger.close()


class FullDisk:
    """A file that takes ten more bytes while the disk is full."""

    def __init__(self, file):
        self.file, self.full = file, True

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.full:
            return self.file.write(data)
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:10])


def test_a_full_disk_loses_no_line_and_ends_no_run(tmp_path, capsys):
    run = loggers.Loggers(tmp_path, 10)
    events, lines, _ = run._loggers
    run.log("train", 1, {"loss": 1.0})
    lines._file = FullDisk(lines._file)
    record = events._writer._get_file_writer().event_writer._ev_writer._py_recordio_writer
    record._writer = FullDisk(record._writer)
    for step in range(2, 40):
        # More than the queue of the thread that writes events takes.
        run.log("train", step, {"loss": 1 / step, **{f"loss_offset_{s}": 1.0 for s in range(1, 20)}})
    said = capsys.readouterr().err
    assert said.count("JsonlLogger cannot write ([Errno 28]") == 1, "it is said once"
    assert said.count("TensorBoardLogger cannot write ([Errno 28]") == 1 and "Traceback" not in said
    lines._file.full = False
    run.log("train", 40, {"loss": 0.1})
    run.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 41))


@pytest.mark.parametrize("name", ["flush", "close"])
def test_a_disk_that_is_full_at_the_end_leaves_the_other_loggers_to_close(tmp_path, capsys, monkeypatch, name):
    with Loggers(tmp_path, 2, console=Console(file=io.StringIO())) as some:
        record = some._loggers[0]._writer._get_file_writer().event_writer._ev_writer._py_recordio_writer  # pyright: ignore
        monkeypatch.setattr(record, name, lambda: FullDisk(None).write(b""))
        some.log("eval", 1, {"loss": 1.0})
    assert capsys.readouterr().err.count("TensorBoardLogger cannot write ([Errno 28]") == 1
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_half_a_line_anywhere_stands_in_the_way_of_no_resume(tmp_path):
    logger = JsonlLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log("train", step, {"loss": 1 / step})
    logger.close()
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:30] + third + b"\0\xff\0\n7\n" + third + second[:30])
    JsonlLogger(tmp_path, resume_from=3).close()
    assert path.read_bytes() == first + third


def test_resume_drops_what_a_killed_run_left_behind(tmp_path):
    logger = JsonlLogger(tmp_path)
    for step in range(1, 11):
        logger.log("train", step, {"loss": 1 / step})
    logger.close()
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before) + '{"kind": "train", "step": 11, "lo')

    logger = JsonlLogger(tmp_path, resume_from=6)
    logger.log("train", 7, {"loss": 0.5})
    logger.close()
    after = path.read_text().splitlines(keepends=True)
    assert after[:6] == before[:6]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("resume_from", [None, 0])
def test_a_run_without_history_starts_an_empty_file(tmp_path, resume_from):
    JsonlLogger(tmp_path / "run", resume_from).close()
    assert read_metrics(tmp_path / "run") == []


def test_object_stores_are_rewritten_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "is_local", lambda path: False)
    patient = JsonlLogger(tmp_path, flush_seconds=1e6)
    patient.log("train", 1, TRAIN)
    patient.log("train", 2, TRAIN)
    assert read_metrics(tmp_path) == []
    patient.log("eval", 2, {"loss": 1.25})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 2], "a save may follow, and a kill"
    patient.log("train", 3, TRAIN)
    patient.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 2, 3]

    eager = JsonlLogger(tmp_path, resume_from=1, flush_seconds=0)
    eager.log("train", 3, TRAIN)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    eager.close()


def test_an_object_store_that_refuses_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    """Its packages have errors that are no OSError."""

    class HttpError(Exception): ...

    def refuse(*_):
        raise HttpError("quota, 429")

    monkeypatch.setattr(loggers, "is_local", lambda path: False)
    with Loggers(tmp_path, 2, console=Console(file=io.StringIO())) as some, monkeypatch.context() as patch:
        patch.setattr(type(loggers.epath.Path("/")), "write_text", refuse)
        some.log("eval", 1, {"loss": 1.0})
        some.log("eval", 2, {"loss": 2.0})
    assert capsys.readouterr().err == "warning: JsonlLogger cannot write (HttpError: quota, 429).\n"
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2], "kept, and written when it can be"


def events(folder):
    """The events of every event file in `folder`: records of (length, crc, bytes, crc)."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_holds_the_values_under_their_tags(tmp_path):
    logger = TensorBoardLogger(tmp_path, resume_from=10)
    logger.log("train", 20, TRAIN)
    logger.log("eval", 20, {"loss": 1.25})
    logger.close()
    found = list(events(tmp_path / "tensorboard"))
    scalars = {(value.tag, event.step): value.simple_value for event in found for value in event.summary.value}
    assert scalars[("eval/loss", 20)] == 1.25
    assert scalars[("train/loss", 20)] == 1.5
    assert scalars[("train/mfu", 20)] == pytest.approx(0.412)
    assert 11 in [event.step for event in found if event.HasField("session_log")], "later steps are not purged"


def test_plain_output_is_modest_and_has_no_control_characters(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    progress = ProgressLogger(1000, console=Console(file=stream))
    for step in range(1, 1001):
        progress.log("train", step, TRAIN)
        if step == 200:
            progress.log("eval", step, EVAL)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    assert EVAL_LINE in lines
    assert len(lines) == 12
    assert lines[0] == "step 1/1000  loss 1.500  12,346 tokens/s  MFU 41.2%"
    assert lines[-1].startswith("step 1000/1000  ")


class Terminal(io.StringIO):
    """A terminal that keeps what was written to it."""

    def isatty(self):
        return True

    def console(self, **options):
        environment = {"TERM": "xterm"}
        return Console(file=self, force_terminal=True, width=120, color_system=None, _environ=environment, **options)

    def bar(self):
        """The bar as it stands at last, without control characters."""
        lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.getvalue()).replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith("step") and line.rstrip().endswith("left")][-1]


def test_a_terminal_gets_a_bar_and_evaluations_above_it():
    stream = Terminal()
    progress = ProgressLogger(400, first_step=100, console=stream.console())
    progress.log("train", 300, {"loss": 1.5, "tokens_per_second": 12345.6})
    progress.log("eval", 200, EVAL)
    progress.close()
    shown = stream.getvalue()
    assert EVAL_LINE in shown
    assert "300/400" in stream.bar() and "loss 1.500  12,346 tokens/s" in stream.bar()
    assert "MFU" not in shown
    assert shown.index("\x1b[?25l") < shown.index("\x1b[?25h"), "the cursor was not given back"


@pytest.mark.parametrize("last", [103, 104, 105])
def test_the_bar_moves_with_every_step_and_shows_the_newest_numbers(last):
    """The numbers of a step come while the next one runs: the bar does not go back for them."""
    stream, now = Terminal(), [0.0]
    progress = ProgressLogger(400, first_step=100, console=stream.console(get_time=lambda: now[0]))
    for step in range(101, last + 1):
        now[0] += 2
        progress.advance(step)
        if step == 103:
            progress.log("train", 102, TRAIN)
    progress.close()
    assert f"{last}/400" in stream.bar()
    assert "loss 1.500  12,346 tokens/s  MFU 41.2%" in stream.bar()
    left = datetime.timedelta(seconds=2 * (400 - last))
    assert f"{left} left" in stream.bar()


def test_a_plain_log_says_how_much_time_is_left():
    stream, now = io.StringIO(), [0.0]
    progress = ProgressLogger(40, console=Console(file=stream, get_time=lambda: now[0]))
    for step in range(1, 41):
        now[0] += 2
        progress.advance(step)
        if step > 1:
            progress.log("train", step - 1, TRAIN)
    progress.log("train", 40, TRAIN)
    progress.close()
    first, *rest, last = stream.getvalue().splitlines()
    numbers = "loss 1.500  12,346 tokens/s  MFU 41.2%"
    assert first == f"step 1/40  {numbers}", "steps have begun, and none has ended"
    assert rest == [
        f"step {n}/40  {numbers}  0:{2 * (39 - n) // 60:02}:{2 * (39 - n) % 60:02} left" for n in range(4, 40, 4)
    ]
    assert last == f"step 40/40  {numbers}"


def test_a_head_without_a_gate_has_no_effective_components():
    stream = io.StringIO()
    ProgressLogger(10, console=Console(file=stream)).log("eval", 1, {"loss": 2.0, "loss_offset_1": 2.0})
    assert stream.getvalue() == "step 1  valid loss 2.000  by offset 2.00\n"


def test_loggers_write_everywhere_and_close_when_the_run_fails(tmp_path):
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Loggers(tmp_path, 10, console=Console(file=stream)) as log:
        log.advance(1)
        log.log("train", 1, {"loss": np.float32(0.5), "mfu": None})
        raise KeyboardInterrupt
    (record,) = read_metrics(tmp_path)
    assert record["loss"] == 0.5
    assert "mfu" not in record
    assert any(event.step == 1 for event in events(tmp_path / "tensorboard"))
    assert stream.getvalue().startswith("step 1/10  loss 0.500")


def test_other_processes_write_nothing(tmp_path, capsys):
    with Loggers(tmp_path / "run", 10, enabled=False) as log:
        log.advance(1)
        log.log("train", 1, TRAIN)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_importing_is_light():
    heavy = {"jax", "flax", "orbax", "matplotlib", "tensorboardX", "rich"}
    code = f"import sys, mtp_jax.train.loggers, mtp_jax.bench.report; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
