"""`mtp-jax chat RUN`: a conversation in the terminal, in the form that the model was trained on."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtp_jax.commands import DraftingOptions, parse, use_compilation_cache
from mtp_jax.validate import ConfigError

if TYPE_CHECKING:
    from mtp_jax.runs.loading import LoadedRun


@dataclass(frozen=True)
class Chat(DraftingOptions):
    """Talk with a model that has a chat template. Accepted drafts are green. Ctrl-C stops an answer, Ctrl-D leaves."""

    system: str = ""
    """What the model is told before the first message."""
    max_new_tokens: int | None = None
    """The most tokens of an answer; by default it may fill the context."""
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this mass."""
    seed: int = 0
    k: int | Literal["auto"] | None = None
    """Drafts per forward, as in `mtp-jax generate`."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    options = parse(Chat, args, "chat")
    use_compilation_cache()
    from mtp_jax.train.signals import STOPS, leave, listening

    run = options.load(decoding_only=True)
    run.tokenizer.conventions.render([{"role": "user", "content": "Hello"}])  # a model without a template is refused
    answering, stopped = threading.Event(), threading.Event()

    def hear(number: int) -> None:
        if number == signal.SIGINT and answering.is_set():
            stopped.set()
        else:
            leave(number)

    messages: list[dict[str, str]] = [{"role": "system", "content": options.system}] if options.system else []
    with listening(hear, STOPS):
        for turn in itertools.count():
            try:
                said = input("you: " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if not said.strip():
                continue
            stopped.clear()
            answering.set()
            try:
                answer = _answer(run, options, [*messages, {"role": "user", "content": said}], turn, stopped)
            except ConfigError as error:  # the context is full, say
                print(f"{error} Begin again with a new conversation (Ctrl-D, and the same command).")
                continue
            finally:
                answering.clear()
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]


def _answer(run: LoadedRun, options: Chat, messages: list[dict[str, str]], turn: int, stopped: threading.Event) -> str:
    """Print an answer as it comes, then its speed. Returns it as far as it came."""
    from rich.console import Console

    from mtp_jax.decode.spans import print_span

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "k")
    spans = run.stream(messages, row=turn, **{name: getattr(options, name) for name in names})
    console, text = Console(highlight=False, emoji=False, soft_wrap=True), ""
    begun, before = time.perf_counter(), 0
    for span in spans:
        if span.kind != "prompt":
            print_span(console, span)
            text += span.text
        if spans.forwards < 2:  # reading the prompt, and compiling, are not in the speed
            begun, before = time.perf_counter(), spans.emitted
        if stopped.is_set() and spans.forwards >= 0:
            break
    speed = (spans.emitted - before) / (time.perf_counter() - begun)
    console.print(f"\n{spans.summary} {speed:,.1f} tokens/s", style="dim", markup=False)
    return text
