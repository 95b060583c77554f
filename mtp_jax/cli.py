"""The command line: `mtp-jax COMMAND ...`. Parsing only; each command is a file in `commands`.

`mtp-jax --help` imports neither JAX nor Flax.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from mtp_jax.output import open_standard_files, safe_output
from mtp_jax.train.signals import INTERRUPTED, leave, listening
from mtp_jax.validate import PREEMPTED, REFUSED, ConfigError, PreemptedError

# name: (module, what it does)
COMMANDS = {
    "train": ("mtp_jax.commands.train", "EXPERIMENT.py [--run-dir DIR]     train, and leave a run directory"),
    "generate": ("mtp_jax.commands.generate", "RUN --prompt TEXT                 continue text with a trained model"),
    "chat": ("mtp_jax.commands.chat", "RUN                               talk with a model that has a chat template"),
    "bench": ("mtp_jax.commands.bench", "decode RUN | loss | train FILE    time decoding, the loss or training steps"),
    "data": ("mtp_jax.commands.data", "prepare | show | regenerate | hidden   make stores of tokens, look into them"),
    "eval": ("mtp_jax.commands.eval", "RUN                               held-out loss by offset, tokens per forward"),
    "import": ("mtp_jax.commands.import_run", "SOURCE --out RUN                  a pretrained model becomes a run"),
    "export": ("mtp_jax.commands.export_run", "RUN --out DIR                     the model of a run, for transformers"),
    "tokenizer": (
        "mtp_jax.commands.tokenizer",
        "train --vocab-size N --out FILE   make a tokenizer from the documents of a source",
    ),
    "sweep": ("mtp_jax.commands.sweep", "EXPERIMENT.py                     train and measure the runs of a question"),
    "report": ("mtp_jax.commands.report", "RESULTS.json ... --out DIR         what sweeps have found, as a page"),
    "doctor": (
        "mtp_jax.commands.doctor",
        "[EXPERIMENT.py]                   what a run would need, here or elsewhere",
    ),
}

PRINT = ("generate", "chat", "eval", "doctor")  # they have nothing to do where nobody reads

USAGE = "usage: mtp-jax COMMAND ...\n\n" + "\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items())
USAGE += "\n\nmtp-jax COMMAND --help lists a command's options. Errors exit with status 2, failed runs with 1, and runs"
USAGE += "\nthat were saved because SIGTERM or another notice came with 75: start the same again, with --auto-resume."


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits with status 2 on a mistake of the caller's, 1 on a run that failed, 75 on one that was
    preempted, 130 on Ctrl-C, which ends the process at once where a command does not say otherwise."""
    args = list(sys.argv[1:] if argv is None else argv)
    open_standard_files()
    name = args[0] if args else ""
    with safe_output(ends=name in PRINT) as output, listening(leave, [signal.SIGINT]):
        _run(args)
        output.flush()
        if output.lost and name in (*PRINT, "bench"):
            _fail(f"What it found could not be printed: {output.lost}.", 1)


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
        _fail(f"there is no command {name!r}; {hint}", REFUSED)
    command = importlib.import_module(COMMANDS[name][0])
    try:
        command.main(rest)
    except ConfigError as error:
        _fail(str(error), REFUSED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except PreemptedError as error:
        _fail(str(error), PREEMPTED)
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        # That is where JAX looks for devices.
        if platforms and traceback.extract_tb(error.__traceback__)[-1].name == "backends":
            _fail(f"JAX_PLATFORMS is {platforms!r}, and JAX finds no such device here. Unset it, or give cpu.", REFUSED)
        if type(error).__module__.partition(".")[0] != "mtp_jax":
            raise
        _fail(str(error), 1)


def _fail(message: str, status: int) -> None:
    print(f"mtp-jax: error: {message}", file=sys.stderr)
    sys.exit(status)
