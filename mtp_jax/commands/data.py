"""`mtp-jax data prepare | show`: make a token store from documents, and look into it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from mtp_jax.commands import console, parse
from mtp_jax.commands.distill import hidden_command, regenerate_command
from mtp_jax.data.config import DataConfig, SourceConfig
from mtp_jax.decode.spans import visible
from mtp_jax.registry import lookup
from mtp_jax.validate import ConfigError, at_least, require

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True, kw_only=True)
class Prepare(SourceConfig):
    """Tokenise documents once, into a directory. What an interruption leaves is continued by the same command.

    Training reads the directory with `--data.source DIR`.
    """

    out: str
    """The directory to make."""
    tokenizer: str = DataConfig.tokenizer
    """bytes, hf:tokenizer.json or sentencepiece:FILE.model."""
    end_of_document: str = DataConfig.end_of_document
    """The token that ends a document; by default the tokenizer's own."""
    base: str = ""
    """The run directory of an imported model: its tokenizer, instead of one that is named."""
    chat: bool = False
    """Records of messages, of conversations, or of prompt and response, as the base's chat template writes them."""
    processes: int = 0
    """How many processes tokenise; 0 for one on each core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "processes")
        require(
            self.source not in ("store", "mixture"),
            f"--source is {self.files}, which was prepared before; train on it with --data.source {self.files}.",
        )
        for name in ("tokenizer", "end_of_document") if self.base else ():
            require(
                getattr(self, name) == getattr(DataConfig, name),
                f"--{name.replace('_', '-')} is {getattr(self, name)!r} and --base {self.base}, whose own it is; leave "
                "one of them out.",
            )
        require(
            bool(self.base) or not self.chat,
            "--chat is given and --base is not: conversations are written by a model's own template. Give the run "
            "directory of an imported one, --base RUN (mtp-jax import MODEL --out RUN).",
        )

    def based(self) -> Prepare:
        """With the tokenizer of the base by its name. Raises `ConfigError` if that is no run directory."""
        if not self.base:
            return self
        from mtp_jax.runs.layout import read_config, run_tokenizer

        try:
            config = read_config(self.base)
        except ConfigError as error:
            raise ConfigError(
                f"--base is {self.base!r}; it must be a run directory, which `mtp-jax import MODEL --out RUN` makes. "
                f"{error}"
            ) from error
        named = {"tokenizer": run_tokenizer(self.base, config).name, "end_of_document": config.data.end_of_document}
        return dataclasses.replace(self, base="", chat=False, **named)

    def config(self) -> DataConfig:
        """The source, the tokenizer and the split as training names them."""
        own = ("out", "processes", "base", "chat")
        return DataConfig(**{name: value for name, value in vars(self).items() if name not in own})


@dataclass(frozen=True)
class Show:
    """Print what is in a token store: counts, lengths, documents, and batches as the model sees them."""

    store: Annotated[str, tyro.conf.Positional]
    """The directory of the store."""
    split: Literal["train", "valid"] = "train"
    """Which documents."""
    documents: int = 2
    """How many documents are printed."""
    characters: int = 400
    """How much of each."""
    batches: int = 1
    """How many batches are printed."""
    batch_size: int = 4
    seq_len: int = 128
    window: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "documents", "batches", "seed")
        at_least(self, 1, "characters", "batch_size", "seq_len", "window")


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: mtp-jax data prepare --source 'stories/*.txt' --out DIR [options]")
        print("       mtp-jax data regenerate --base RUN --source prompts.jsonl --out DIR [options]")
        print("       mtp-jax data hidden --base RUN --source DIR --out DIR [options]")
        print("       mtp-jax data show DIR [options]\n\nmtp-jax data NAME --help lists the options.")
        return
    lookup(COMMANDS, args[0], "The data command")(args[1:])


def _prepare(args: list[str]) -> None:
    options = parse(Prepare, args, "data prepare")
    options, chat = options.based(), options.chat
    from rich.console import Console
    from rich.progress import Progress

    from mtp_jax.data.preparation import prepare

    lines: list[str] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenising", total=None)

        def progress(done: int, total: int, size: int) -> None:
            so_far = f"tokenising: {size / 1e6:,.1f} MB, part {done} of {total}"
            bar.update(task, completed=done, total=total, description=so_far)

        made = {"out": options.out, "processes": options.processes or _cores(), "chat": chat}
        store = prepare(options.config(), lines.append, **made, progress=progress)
    print(*lines or [f"{store.path} was prepared before."], sep="\n")
    # A store is read with the tokenizer and the split that it was made with.
    same = {name: getattr(options, name) for name in ("tokenizer", "end_of_document", "valid_fraction")}
    same = {"source": options.out} | {name: v for name, v in same.items() if v != getattr(DataConfig, name)}
    flags = (f"--data.{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in same.items())
    print("Train on it:", *flags)


def _cores() -> int:
    """Those that this process may use, where the system says it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _show(args: list[str]) -> None:
    options = parse(Show, args, "data show")
    from mtp_jax.data.batches import batches
    from mtp_jax.data.store import Store, share

    store = Store.open(options.store)
    documents, tokenizer = getattr(store, options.split), store.tokenizer()
    documents.require_some()
    terminal = console()

    def say(text: Any = "", **style: Any) -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=True, **style)

    say(f"{store.path}: source {store.manifest['source']}, tokenizer {store.manifest['tokenizer']['name']}")
    for split, counts in store.manifest["splits"].items():
        of_them = f", {counts['supervised']:,} of them supervised ({share(counts)})" if store.masked else ""
        say(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens{of_them}")
    say(f"\nLength of the {options.split} documents in tokens", style="bold")
    say(histogram(documents.lengths))
    for index in range(min(options.documents, len(documents))):
        say(f"\nDocument {index}: {documents.names[index]}, {len(documents[index]):,} tokens", style="bold")
        if documents.mask is not None:
            shown = supervision(documents[index], documents.mask_of(index), tokenizer)
            say(_coloured(shown, options.characters, brackets=terminal.no_color or not terminal.color_system))
            continue
        text = tokenizer.decode(documents[index])
        say(visible(text[: options.characters]) + ("..." if len(text) > options.characters else ""))
    if store.masked:
        return
    sizes = {name: getattr(options, name) for name in ("seq_len", "window", "batch_size", "seed")}
    for number, batch in zip(range(options.batches), batches(documents, **sizes), strict=False):
        say(f"\nBatch {number}: documents end at ¶; a token that has fewer than {options.window} targets says how many",
            style="bold")  # fmt: skip
        for row in range(options.batch_size):
            say(f"[{row}] {_marked(batch, row, tokenizer, options.window)}")


def supervision(ids: np.ndarray, mask: np.ndarray, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """A document as pieces of text, special tokens by their names, and whether they are supervised."""
    names = {id: text for text, id in getattr(tokenizer, "special", {}).items()}
    pairs = zip(ids.tolist(), mask.tolist(), strict=True)
    for supervised, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = b"".join(names[id].encode() if id in names else tokenizer.decode_bytes([id]) for id, _ in group)
        yield text.decode("utf-8", "replace"), bool(supervised)


def _coloured(pieces: Iterable[tuple[str, bool]], characters: int, brackets: bool) -> Any:
    """The first `characters` of a document; what is supervised is green, or in brackets where there are no colours."""
    from rich.text import Text

    shown, left = Text(), characters
    for text, supervised in pieces:
        part, left = visible(text[:left]), left - len(text)
        shown.append(f"⟦{part}⟧" if supervised and brackets else part, "bold green" if supervised else None)
        if left < 0:
            return shown.append("...")
    return shown


def histogram(lengths: np.ndarray, width: int = 50) -> str:
    """Counts by powers of two, as lines with bars."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers)
    lines = []
    for power in range(powers.min(), len(counts)):
        bar = "█" * -(-width * counts[power] // counts.max())
        lines.append(f"{'<=' if power else '  '} {2**power:>11,}  {counts[power]:>11,}  {bar}")
    return "\n".join(lines)


def _marked(batch: Any, row: int, tokenizer: Any, window: int) -> str:
    """A sequence as text; incomplete windows say how many targets they have, ends of documents are shown."""
    shown, pending = "", []
    for token, valid in zip(batch["tokens_BT"][row], batch["valid_BTW"][row].sum(-1), strict=True):
        pending.append(int(token))
        is_end = token == tokenizer.end_of_document
        if is_end or valid < window:
            shown += visible(tokenizer.decode(pending)) + ("¶\n    " if is_end else str(valid).translate(SUBSCRIPTS))
            pending = []
    return shown + visible(tokenizer.decode(pending))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "prepare": _prepare,
    "regenerate": regenerate_command,
    "hidden": hidden_command,
    "show": _show,
}
