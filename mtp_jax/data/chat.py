"""Chat data: conversations as their base's own template writes them, with a loss mask of the answers.

A conversation is rendered once, and its ids are those of that text, as of a prompt that is answered. Which of them are
answers is found from ids: an answer begins behind those of the prompt before it, or where a `{% generation %}` tag of
the template begins, and ends with the first stop token in it. What the template writes behind that is no answer.

Where an answer's ids are others in the whole than behind its own prompt (the template writes earlier turns otherwise
once others follow, or a token goes across the border), each answer has a document of its own: the conversation up to
it, that answer alone supervised. A token that goes across the border there is cut in two: the prompt's ids are those
that decoding begins with, and the answer's those of the rest of the text.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.data.encoding import Encoded, Encoding, unreadable
from mtp_jax.data.held_out import divided
from mtp_jax.data.sources.base import DataError, Part, Record, Source, Unreadable
from mtp_jax.data.store import share
from mtp_jax.data.tokenizers import HFTokenizer, Tokenizer, utf8
from mtp_jax.validate import require

FORM = 1  # of masks: another one gives another store
FIELDS = ("messages", "conversations", "prompt", "response", "completion", "tools")
ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}
ROLES |= {"human": "user", "gpt": "assistant"}
ALMOST_ALL = 0.99
Message = dict[str, Any]


class Conversations:
    """Records of a source, each as the JSON of its messages: copies of a conversation are equal whatever stands beside
    it. What is no conversation is `Unreadable`.
    """

    def __init__(self, records: Source):
        self._records = records

    def fingerprint(self) -> dict[str, Any]:
        """That of the records."""
        return self._records.fingerprint()

    def parts(self, data_dir: Path) -> list[Part]:
        """Those of the records."""
        return self._records.parts(data_dir)

    def read(self, part: Part, data_dir: Path) -> Iterator[tuple[str, bytes]]:
        """The conversations of a part."""
        for name, record in self._records.read(part, data_dir):
            if isinstance(record, Record):
                try:
                    values = json.loads(record.decode("utf-8", "surrogateescape"))
                    yield name, Record.of(conversation(values), record.where)
                except (ValueError, RecursionError) as error:
                    yield name, Unreadable.because(f"{record.where}: {error}")
            else:
                yield name, record


def conversation(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a record: its `messages`, its `conversations`, or its `prompt` and `response` or `completion`.

    A message has `role` and `content`, or `from` and `value`; other keys are kept for the template.

    Raises `ValueError`, which says what is wrong with it.
    """
    if record.get("tools"):
        raise ValueError("it has tools, which are not rendered; describe them in a system message, and drop the field")
    name = next((name for name in ("messages", "conversations") if name in record), "")
    answer = next((name for name in ("response", "completion") if name in record), "")
    if name:
        found = record[name]
    elif "prompt" in record and answer:
        found = _turns(record["prompt"], "user") + _turns(record[answer], "assistant")
    else:
        raise ValueError(f"it has no messages, no conversations, and not both prompt and response: {', '.join(record)}")
    if not isinstance(found, list):
        raise ValueError(f"field {name!r} is no list of messages but {type(found).__name__}")
    messages = [_message(i, message) for i, message in enumerate(found)]
    _check_turns(messages)
    return messages


def _turns(value: Any, role: str) -> list[Any]:
    """A prompt or an answer: its text, or messages."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(i: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {i} is no JSON object but {type(message).__name__}")
    keys = ("from", "value") if "from" in message else ("role", "content")
    role, content = (message.get(key) for key in keys)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {i} has the {keys[0]} {role!r}; it can be {', '.join(ROLES)}")
    if isinstance(content, list):  # parts
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [text for text in parts if isinstance(text, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if content is None and (role != "assistant" or message.get("tool_calls")):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"message {i} has {keys[1]} that is no text but {type(content).__name__}")
    if ROLES[role] == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise ValueError(f"message {i}, an answer, is empty")
    rest = {key: value for key, value in message.items() if key not in keys and value is not None}
    return {"role": ROLES[role], "content": content, **rest}


def _check_turns(messages: Sequence[Message]) -> None:
    """Refuse what has no answer, or user and assistant out of turn. With tools the template decides."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"it has no message of the assistant; its roles are {', '.join(roles) or 'none'}")
    turns = roles[1:] if roles[0] in ("system", "developer") else roles
    if {"user", "assistant"}.issuperset(turns) or set(turns) & {"system", "developer"}:
        for i, role in enumerate(turns):
            if role != ("user", "assistant")[i % 2]:
                at = i + len(roles) - len(turns)
                raise ValueError(
                    f"message {at} is of {role}, and {('user', 'assistant')[i % 2]} is to speak: behind a system "
                    "message, if there is one, user and assistant take turns"
                )


@dataclass(frozen=True)
class Answer:
    """A conversation up to an answer: its `ids`, and `mask`, 1 where they are of that answer.

    `stops`: whether a stop token is among them. `cut`: whether a token had gone across a border of it, so that the ids
    are not those of the whole text.
    """

    ids: np.ndarray
    mask: np.ndarray
    stops: bool
    cut: bool

    @property
    def end(self) -> int:
        """Behind the last of its ids that is supervised."""
        return int(np.flatnonzero(self.mask)[-1]) + 1


class ChatEncoding(Encoding):
    """Conversations as a base's template and tokenizer write them, with a mask of its answers.

    Documents end as the template ends them. One of several answers with a document each is called `NAME#i` by the
    number of its message.
    """

    masked, divisible = True, False
    counted = ("conversations", "answers", "split_conversations", "cut_answers", "unended_answers")

    def __init__(self, tokenizer: Tokenizer):
        """Raises `ConfigError` if the tokenizer has no special tokens in text, or no template that can be used."""
        found = tokenizer.conventions
        require(
            isinstance(tokenizer, HFTokenizer) and bool(found.template),
            f"The tokenizer {tokenizer.name!r} has no chat template, which conversations are written by. Import a base "
            "that has one (mtp-jax import MODEL --out RUN; a chat model's tokenizer_config.json has chat_template) "
            "and give --base RUN, or prepare plain text without --chat.",
        )
        assert isinstance(tokenizer, HFTokenizer)
        found.render([{"role": "user", "content": "Hello"}])  # a template that is wrong is refused at once
        self.tokenizer, self._special = tokenizer, tokenizer.special
        self._bos = self._special.get(found.special.get("bos_token", "")) if found.bos is None else found.bos
        self._stops = np.array(tokenizer.stop_tokens)
        # Those that make turns: an answer that quotes one would end, or be another's.
        ends = (self._bos, tokenizer.end_of_document, *self._stops)
        self._control = [text for text, id in self._special.items() if id in ends or text in found.template]
        template = hashlib.sha256(found.template.encode("utf-8", "surrogatepass")).hexdigest()
        self.identity = {"mask": True, "chat": {"template": template, "form": FORM}}

    def encode(
        self, documents: Sequence[tuple[str, bytes]], valid_fraction: float, inside: bool, counts: collections.Counter
    ) -> Iterator[Encoded]:
        """The rows of conversations. Raises `DataError` if the template begins them with BOS twice."""
        for name, document in documents:
            where = getattr(document, "where", name)
            try:
                rows, answers = self.rows(json.loads(utf8(document)[0]))
            except ValueError as error:
                unreadable(counts, f"{where}: {error}")
                continue
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            ((split, *_),) = divided(name, document, valid_fraction, inside)
            counts["replaced"] += utf8(document)[1]
            counts["conversations"] += 1
            counts["answers"] += len(answers)
            counts["split_conversations"] += rows[0][0] != ""
            counts["cut_answers"] += sum(answer.cut for answer in answers)
            counts["unended_answers"] += sum(not answer.stops for answer in answers)
            for suffix, ids, mask in rows:
                yield Encoded(split, name + suffix, ids, mask)

    def told(self, counts: collections.Counter, splits: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The share that is supervised, what was split, and warnings of masks that are seldom meant."""
        whole = {name: sum(entry[name] for entry in splits.values()) for name in ("supervised", "tokens")}
        said = [f"{whole['supervised']:,} of the tokens are supervised ({share(whole)})"]
        if counts["split_conversations"]:
            said.append(
                f"{counts['split_conversations']:,} of {counts['conversations']:,} conversations have a document for "
                "each answer, for the template or the tokenizer writes answers otherwise once others follow"
            )
        if counts["cut_answers"]:
            said.append(f"a token across the border of {counts['cut_answers']:,} answers was cut")
        warnings = []
        if whole["supervised"] > ALMOST_ALL * whole["tokens"]:
            warnings.append(
                f"{share(whole)} of the tokens are supervised, prompts too then; look at them with `mtp-jax data show`."
            )
        if counts["unended_answers"]:
            ends = ", ".join(repr(self._named(id)) for id in self._stops)
            warnings.append(
                f"{counts['unended_answers']:,} of {counts['answers']:,} answers have no supervised token that ends "
                f"them (the base stops at {ends}); the template does not "
                "write one, or has it outside of its generation tags."
            )
        return said, warnings

    def rows(self, messages: Sequence[Message]) -> tuple[list[tuple[str, np.ndarray, np.ndarray]], list[Answer]]:
        """The documents of a conversation as (suffix of the name, ids, mask), and its answers.

        Raises `ValueError`, which says why it cannot be written.
        """
        for i, message in enumerate(messages):
            said = json.dumps(message, ensure_ascii=False)
            quoted = next((text for text in self._control if text in said), None)
            if quoted:
                raise ValueError(
                    f"message {i} contains {quoted!r}, which the template writes around messages; reword it"
                )
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [self._answer(messages[: i + 1]) for i in numbers]
        last = answers[-1]
        ends_it = len(messages) == numbers[-1] + 1 and not last.cut
        ids = last.ids if ends_it else self._ids(self.tokenizer.conventions.render(messages, answer=False))
        mask = np.zeros(len(ids), np.uint8)
        for answer in answers:
            if not np.array_equal(ids[: answer.end], answer.ids[: answer.end]):
                found = zip(numbers, answers, strict=True)
                return [(f"#{i}", answer.ids, answer.mask) for i, answer in found], answers
            mask[: answer.end] |= answer.mask[: answer.end]
        return [("", ids, mask)], answers

    def _answer(self, messages: Sequence[Message]) -> Answer:
        """The last message, an answer, behind those before it."""
        conventions = self.tokenizer.conventions
        text, tagged = conventions.answers(messages)
        if tagged is None:
            prompt = conventions.render(messages[:-1])
            if not text.startswith(prompt):
                raise ValueError(
                    f"message {len(messages) - 1}: the template begins an answer that is asked for otherwise "
                    f"({prompt[-40:]!r}) than one that is there, so what the model is to say is not to be found; put "
                    "generation tags into the template"
                )
            spans = [(len(prompt), len(text))]
        else:
            before = conventions.answers(messages[:-1])[1] or []
            spans = [(begin, end) for begin, end in tagged[len(before) :] if begin < end]
        ids, borders, cut = self._cut(text, list(itertools.chain(*spans)))
        mask, stops = np.zeros(len(ids), np.uint8), False
        for begin, end in zip(borders[::2], borders[1::2], strict=True):
            at = np.flatnonzero(np.isin(ids[begin:end], self._stops))
            mask[begin : begin + at[0] + 1 if len(at) else end] = 1
            stops |= bool(len(at))
        if not mask.any():
            raise ValueError(
                f"message {len(messages) - 1}: the template writes nothing of this answer"
                + (" inside of its generation tags" if tagged is not None else "")
            )
        return Answer(ids, mask, stops, cut)

    def _cut(self, text: str, places: Sequence[int]) -> tuple[np.ndarray, list[int], bool]:
        """The ids of `text`, the number of ids before each of `places` in it, in characters, and whether a token lay
        across one: then the texts between are encoded each for itself.
        """
        ids = self._ids(text)
        before = [self._ids(text[:place]) if place < len(text) else ids for place in places]
        if all(np.array_equal(ids[: len(some)], some) for some in before):
            return ids, [len(some) for some in before], False
        rest = (text[begin:end] for begin, end in itertools.pairwise([*places, len(text)]))
        parts = [self._ids(text[: places[0]]), *map(self.tokenizer.encode_special, rest)]
        joined = np.concatenate(parts)
        if self.tokenizer.decode_bytes(joined) != self.tokenizer.decode_bytes(ids):
            raise ValueError("a token goes across the border of an answer, and this tokenizer cannot write them apart")
        return joined, np.cumsum([len(part) for part in parts])[:-1].tolist(), True

    def _ids(self, text: str) -> np.ndarray:
        """As of a prompt. Raises `DataError` if they begin with BOS twice."""
        ids, bos = self.tokenizer.encode_prompt(text, special=True), self._bos
        if bos is not None and bos in ids[:1]:
            own = self._named(bos)
            added = self.tokenizer.conventions.bos == bos and not text.startswith(own)
            if bos in ids[1:2] or (added and own in text):
                raise DataError(
                    f"the template has {own} behind another one, as the model has never seen it: it must write "
                    "it once, before all else (white space too). Mend the base's chat_template and import it again."
                )
        return ids

    def _named(self, id: int) -> str:
        return next((text for text, known in self._special.items() if known == id), str(id))
