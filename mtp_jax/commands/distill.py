"""`mtp-jax data regenerate | hidden`: data that is made with a base."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mtp_jax.commands import parse, use_compilation_cache
from mtp_jax.config import MeshConfig
from mtp_jax.data.config import SourceConfig
from mtp_jax.distributed import Distributed, connect
from mtp_jax.validate import ConfigError, at_least, require

if TYPE_CHECKING:
    from mtp_jax.runs.base import Base
    from mtp_jax.runs.loading import LoadedRun


@dataclass(frozen=True, kw_only=True)
class RegenerateOptions(SourceConfig):
    """Let a base answer what a source asks, and make a token store of it, with a loss mask of what it sampled.

    Records of JSON lines or Parquet have messages, conversations, turns or a prompt; answers in them are left out.
    Of other sources, and with --text, the beginning of each document is continued. What an interruption leaves is
    continued by the same command; several processes share the work (--distributed as for training).
    """

    base: str
    """The run directory of an imported model, or of a trained one."""
    out: str
    """The directory to make."""
    text: bool = False
    """Continue documents, and do not chat."""
    temperature: float = 0.7
    """Of sampling: that at which the head will draft."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together have this probability."""
    max_new_tokens: int = 512
    """Tokens of an answer, at most. One that is cut has no end."""
    max_prompt_tokens: int = 1024
    """Tokens before an answer, at most; what is longer is left out and counted."""
    prompt_tokens: int = 32
    """How much of a document is read where it is continued."""
    seed: int = 0
    batch_size: int = 64
    """Answers at a time."""
    limit: int | None = None
    """Ask no more than so many, the first of the source."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed.from_environment)


@dataclass(frozen=True, kw_only=True)
class HiddenOptions:
    """Compute the hidden states of a base over a token store once, so that heads are trained without its trunk.

    The directory is a store itself: train on it with --base RUN --data.source DIR.
    """

    base: str
    """The run directory of an imported model, or of a trained one."""
    source: str
    """The store: a directory of `data prepare` or `data regenerate`."""
    out: str
    """The directory to make."""
    seq_len: int | None = None
    """Tokens in a row, as training will have it (data.seq_len); by default the base's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of what is kept; by default what the base computes in."""
    taps: tuple[int, ...] = ()
    """Layers, counted from 1, whose outputs are kept too, for heads with head.taps."""
    temperature: float | None = None
    """Of the base's law whose normaliser is kept, for losses against it; by default that of the texts, or 1."""
    batch_size: int = 8
    """Rows at a time."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


def regenerate_command(args: list[str]) -> None:
    """`mtp-jax data regenerate`."""
    options = parse(
        RegenerateOptions,
        args,
        "data regenerate",
    )
    connect(options.distributed)
    use_compilation_cache()
    from mtp_jax.data.preparation import cache_dir
    from mtp_jax.distill.asks import asks
    from mtp_jax.distill.regenerate import Regenerate, regenerate

    names = {field.name for field in dataclasses.fields(Regenerate)}
    config = Regenerate(**{name: value for name, value in vars(options).items() if name in names})
    require(not os.path.lexists(os.path.expanduser(options.out)), f"{options.out} exists; give another --out.")
    run, base = _base(options.base, decoding_only=True)
    require(
        options.text or bool(run.tokenizer.conventions.template) or options.source not in ("jsonl", "parquet"),
        f"The base {options.base} has no chat template, which conversations are written by. Give --text and --field "
        "to continue text, or import a model that has one.",
    )
    source = SourceConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SourceConfig)})
    todo = list(asks(source, cache_dir(source) / "tfds", chat=not options.text))
    todo = todo[: options.limit]
    bad = [ask for ask in todo if ask.error]
    if len(bad) > max(1, options.max_bad * len(todo)):
        raise ConfigError(
            f"{len(bad)} of {len(todo)} cannot be asked (the first: {bad[0].error}), and max_bad is "
            f"{options.max_bad:g}. Mend them, or set --max-bad to the share that may be left out."
        )
    with _progress("answering", "documents") as tell:
        regenerate(run, base, todo, options.out, config, source=source.files or source.source, log=print, progress=tell)
    fraction = options.valid_fraction
    split = "" if fraction == SourceConfig.valid_fraction else f" --data.valid-fraction {fraction:g}"
    print(f"Train on it: --base {options.base} --data.source {options.out}{split}")


def hidden_command(args: list[str]) -> None:
    """`mtp-jax data hidden`."""
    options = parse(HiddenOptions, args, "data hidden")
    use_compilation_cache()
    from mtp_jax.data.store import Store
    from mtp_jax.distill.hidden import cache_hidden

    require(not os.path.lexists(os.path.expanduser(options.out)), f"{options.out} exists; give another --out.")
    store = Store.open(options.source)
    run, base = _base(options.base, MeshConfig(-1, 1, 1))
    length = options.seq_len or run.config.data.seq_len
    with _progress("caching", "rows") as tell:
        names = "dtype", "taps", "temperature", "batch_size"
        made = {"seq_len": length, **{name: getattr(options, name) for name in names}}
        cache_hidden(run, base, store, options.out, **made, log=print, progress=lambda done, of: tell(done, of, 0))
    fraction = store.manifest["valid_fraction"]
    split = "" if fraction == SourceConfig.valid_fraction else f" --data.valid-fraction {fraction:g}"
    print(f"Train on it: --base {options.base} --data.source {options.out} --data.seq-len {length}{split}")


def _base(path: str, mesh: MeshConfig | None = None, decoding_only: bool = False) -> tuple[LoadedRun, Base]:
    from mtp_jax.runs.base import open_base
    from mtp_jax.runs.loading import load

    base = open_base(path)
    return load(path, base.step, mesh, decoding_only=decoding_only), base


@contextlib.contextmanager
def _progress(what: str, of: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar with the time that is left; where there is no terminal, a line for each tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, begun = Console(stderr=True), time.monotonic()
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("left")]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, tenth, first = bar.add_task(what), -1, None

        def tell(done: int, total: int, tokens: int) -> None:
            nonlocal tenth, first
            first = done if first is None else first
            seconds = time.monotonic() - begun
            rate = f", {tokens / seconds:,.0f} tokens/s" if tokens else ""
            text = f"{what}: {done:,} of {total:,} {of}{rate}"
            bar.update(task, completed=done, total=total, description=text)
            if not console.is_terminal and 10 * done // max(1, total) > tenth:
                tenth = 10 * done // max(1, total)
                left = seconds * (total - done) / max(1, done - first)
                print(f"{text}, {left:.0f} s left" if done > first else text, flush=True)

        yield tell
