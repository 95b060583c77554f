"""Spans of text: which parts of a continuation were accepted drafts, for the terminal and for a page."""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mtp_jax.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["prompt", "target", "draft"]
STYLES: dict[Kind, str | None] = {"prompt": "dim", "target": None, "draft": "bold green"}
PAGE = '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.3">{code}</pre>'


@dataclass(frozen=True)
class Span:
    """A piece of text, and where it comes from: the prompt, the target's own choice, or an accepted draft."""

    text: str
    kind: Kind


class Spans:
    """A prompt and what continues it as spans, in the order in which they come; iterate over it once.

    A character has the kind of its last byte. What may be the beginning of a stop string waits for the next forward.

    Args:
      tokenizer: of the tokens.
      prompt: token ids.
      forwards: for each forward, the first of which is prefill, (the new tokens, how many of them were accepted
        drafts), as `mtp_jax.decode.generate.stream` gives them.
      stops: what ends the text and is cut off, in bytes.
      k: the drafts per forward, for the summary; None: it is not said.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Any,
        forwards: Iterable[tuple[Any, int]],
        stops: Sequence[bytes] = (),
        k: Any = None,
    ):
        self._tokenizer, self._prompt, self._parts, self._stops, self._k = tokenizer, prompt, forwards, stops, k
        self.forwards, self.emitted, self.drafts = -1, 0, 0

    def __iter__(self) -> Iterator[Span]:
        from mtp_jax.decode.text import find_stop, held_back  # JAX comes with it, and `visible` does without

        yield Span(self._tokenizer.decode(self._prompt), "prompt")
        # Half a character at the end of one forward is finished by the next.
        text = codecs.getincrementaldecoder("utf-8")("replace")
        raw, shown = b"", 0  # how many bytes of it were given
        kinds: list[Kind] = []  # of each byte
        for tokens, accepted in self._parts:
            self.forwards += 1
            self.emitted, self.drafts = self.emitted + len(tokens), self.drafts + accepted
            drafts, own = (self._tokenizer.decode_bytes(part) for part in (tokens[:accepted], tokens[accepted:]))
            raw += drafts + own
            kinds.extend(itertools.repeat("draft", len(drafts)))
            kinds.extend(itertools.repeat("target", len(own)))
            stop = find_stop(raw, self._stops)
            end = len(raw) - held_back(raw, self._stops) if stop is None else stop
            yield from _spans(raw, kinds, range(shown, end), text)
            shown = max(shown, end)
            if stop is not None:
                break
        else:
            yield from _spans(raw, kinds, range(shown, len(raw)), text)
        if rest := text.decode(b"", final=True):
            yield Span(rest, "target")

    @property
    def summary(self) -> str:
        """Counts of what was iterated over, in words."""
        per_forward = (self.emitted - 1) / max(1, self.forwards)
        return (
            f"[{self.emitted} tokens, {self.drafts} of them accepted drafts; {self.forwards} forwards after prefill, "
            f"{per_forward:.2f} tokens per forward{'' if self._k is None else f', k = {self._k}'}]"
        )


def _spans(raw: bytes, kinds: list[Kind], indices: range, text: codecs.IncrementalDecoder) -> Iterator[Span]:
    for _, group in itertools.groupby(indices, kinds.__getitem__):
        first, *rest = group
        if part := text.decode(raw[first : first + len(rest) + 1]):
            yield Span(part, kinds[first])


@dataclass(frozen=True, repr=False)
class Completion:
    """A prompt and its continuation. A notebook shows it in colour: accepted drafts are green."""

    spans: tuple[Span, ...]
    summary: str

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return "".join(span.text for span in self.spans)

    def __str__(self) -> str:
        return f"{visible(self.text)}\n{self.summary}"

    __repr__ = __str__  # what a terminal shows in place of the page

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), record=True, force_jupyter=False, highlight=False, emoji=False)
        for span in self.spans:
            print_span(console, span)
        console.print(f"\n{self.summary}", style=STYLES["prompt"], markup=False, soft_wrap=True)
        return console.export_html(inline_styles=True, code_format=PAGE)


def print_span(console: Console, span: Span) -> None:
    """Print a span in its style, without a line end."""
    console.print(visible(span.text), style=STYLES[span.kind], end="", markup=False, soft_wrap=True)


def picture(console: Console, title: str) -> str:
    """What a console has recorded, as an SVG in which long lines go on in the next one. It loads no fonts."""
    from rich.console import Console as NewConsole
    from rich.text import Text

    wrapped = NewConsole(record=True, width=console.width, file=io.StringIO())
    wrapped.print(Text.from_ansi(console.export_text(styles=True)))
    return re.sub(r"\s*@font-face \{.*?\}", "", wrapped.export_svg(title=title), flags=re.DOTALL)


def visible(text: str) -> str:
    """`text` with control characters as escapes: what a model writes must not command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
