"""Conventions of a pretrained model around text: what begins it, what ends an answer, how a conversation is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mtp_jax.validate import ConfigError, require

FILE = "conventions.json"
MARKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # what Unicode has for a program's own use, and no text
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Conventions:
    """`bos`: the id that begins every text, exactly once; None if none does. `stops`: the ids that end an answer; none:
    the end of a document. `template`: how a conversation is written, in Jinja; `special`: the tokens that it may name.
    """

    bos: int | None = None
    stops: tuple[int, ...] = ()
    template: str = ""
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As the file `conventions.json` of a tokenizer's directory."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Conventions:
        """The inverse of `to_bytes`."""
        values = json.loads(data)
        return cls(values["bos"], tuple(values["stops"]), values["template"], values["special"])

    def render(self, messages: Messages, *, answer: bool = True) -> str:
        """A conversation as the model was trained on it, special tokens in it as text.

        Args:
          messages: each with a `role` and its `content`.
          answer: whether it ends where the assistant's answer begins.

        Raises:
          ConfigError: the model has no template, it has an error, or refuses such messages: with its line.
        """
        require(bool(self.template), "The model has no chat template; continue plain text, or import a model with one.")
        require(
            isinstance(messages, Sequence) and not isinstance(messages, str | bytes),
            f"The messages are {messages!r}; they must be a list, such as [{{'role': 'user', 'content': 'Hello'}}].",
        )
        for i, message in enumerate(messages):
            require(
                isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message,
                f"Message {i} is {message!r}; it must be a dictionary with a role and its content, such as "
                "{'role': 'user', 'content': 'Hello'}.",
            )
        try:
            import jinja2  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError("A chat template needs jinja2: pip install 'mtp_jax[hf]'.") from error
        return self._render(messages, answer)

    def answers(self, messages: Messages) -> tuple[str, list[tuple[int, int]] | None]:
        """A whole conversation as `render` has it, and where in it, in characters, `{% generation %}` tags enclose what
        the model says; None if the template has no such tags.

        Raises `ConfigError` as `render` does, and if marks at the tags change the text: a filter around them, say.
        """
        text = self.render(messages, answer=False)
        if not _compiled(self.template).environment.has_generation:  # type: ignore[attr-defined]
            return text, None
        begin, end = [mark for mark in MARKS if mark not in text][:2]
        spans, rest = [], self._render(messages, False, generation_begins=begin, generation_ends=end)
        whole = ""
        for i, piece in enumerate(re.split(f"[{begin}{end}]", rest)):
            spans += [(len(whole), len(whole) + len(piece))] * (i % 2)
            whole += piece
        require(
            whole == text and re.sub(f"[^{begin}{end}]", "", rest) == (begin + end) * len(spans),
            "The chat template changes what its generation tags enclose, or has them one in another, so that they say "
            "nothing of the text. Take the tags out of the template: the answers are then found without them.",
        )
        return text, spans

    def _render(self, messages: Messages, answer: bool, **marks: str) -> str:
        import jinja2

        try:
            values = {"generation_begins": "", "generation_ends": "", **marks, **self.special}
            return _compiled(self.template).render(messages=list(messages), add_generation_prompt=answer, **values)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"The chat template is wrong in line {error.lineno}: {error}.") from error
        except Exception as error:  # whatever a template of others stumbles over
            raise ConfigError(f"The chat template does not render these messages: {error}.") from error


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    """A chat template of Jinja. Its `{% generation %}` tags write the variables `generation_begins` and
    `generation_ends` around what they enclose.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Generation(Extension):
        """`{% generation %}`: what the model says, in templates that were written for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            self.environment.has_generation = True  # type: ignore[attr-defined]
            begin, end = (
                nodes.Output([nodes.Name(f"generation_{name}", "load")], lineno=line) for name in ("begins", "ends")
            )
            return [begin, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    environment.has_generation = False  # type: ignore[attr-defined]
    return environment.from_string(text)


def read_conventions(directory: Path, ids: Mapping[str, int], begins: Sequence[int]) -> Conventions:
    """What the files of a Hugging Face directory say.

    Args:
      directory: has config.json, and tokenizer_config.json, generation_config.json and chat_template.jinja if it has.
      ids: those of the special tokens, by their text.
      begins: the ids that the tokenizer itself puts in front of a text.
    """

    def read(name: str) -> dict[str, Any]:
        path = directory / name
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}). Get the model's files again.") from error

    config, tokenizer, generation = (
        read(f"{name}.json") for name in ("config", "tokenizer_config", "generation_config")
    )
    special = {
        name: value if isinstance(value, str) else value["content"]
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (value := tokenizer.get(name))
    }
    bos = ids.get(special.get("bos_token", ""), config.get("bos_token_id"))
    wanted = tokenizer.get("add_bos_token")
    begins_with = bos if wanted or (wanted is None and bos is not None and list(begins[:1]) == [bos]) else None
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    file = directory / "chat_template.jinja"
    template = file.read_text() if file.exists() else tokenizer.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = next((one["template"] for one in template if one.get("name") == "default"), "")
    return Conventions(begins_with, tuple(stops), template, special)
