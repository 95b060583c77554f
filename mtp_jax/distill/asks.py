"""What a base is asked: the user's turns of conversations, or the beginnings of documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_jax.data.chat import ROLES
from mtp_jax.data.config import SourceConfig
from mtp_jax.data.sources import RECORDS, documents, load_records, load_source
from mtp_jax.data.sources.base import Record, Unreadable

FIELDS = ("messages", "conversations", "prompt", "turns")
Message = dict[str, str]


@dataclass(frozen=True)
class Ask:
    """One thing that is asked: `messages` of a system and of the user, each of the latter to be answered, or a `text`
    to be continued. `key` is the hash of its content, and `error` says what is wrong with it, if something is.
    """

    name: str
    content: bytes
    messages: tuple[Message, ...] = ()
    text: bytes = b""
    error: str = ""

    @property
    def key(self) -> str:
        """The hash of what is asked: wherever it stands, it is answered alike."""
        return hashlib.sha256(self.content).hexdigest()


def asks(config: SourceConfig, data_dir: Path, *, chat: bool) -> Iterator[Ask]:
    """What a source asks, in its order; the first of equal ones alone.

    Records have `messages`, `conversations`, `turns` (the user's, as text) or a `prompt`: answers in them are left out.
    Without `chat`, and of sources that have no records, the text of each document is continued.

    Raises `ConfigError` and `DataError` as sources do.
    """
    records = chat and config.source in RECORDS
    source = load_records(config, FIELDS) if records else load_source(config)
    seen: set[bytes] = set()
    for name, document in documents(source, data_dir):
        found = _ask(name, document, records)
        digest = hashlib.sha256(found.content).digest()
        if digest not in seen:
            seen.add(digest)
            yield found


def _ask(name: str, document: bytes, record: bool) -> Ask:
    if isinstance(document, Unreadable):
        return Ask(name, document.why.encode(), error=document.why)
    if not record:
        error = "" if document.strip() else f"{name} is empty"
        return Ask(name, document, text=document, error=error)
    where = document.where if isinstance(document, Record) else name
    try:
        messages = questions(json.loads(document.decode("utf-8", "surrogateescape")))
    except (ValueError, RecursionError) as error:
        return Ask(name, document, error=f"{where}: {error}")
    return Ask(name, json.dumps(messages).encode(), tuple(messages))


def questions(record: Mapping[str, Any]) -> list[Message]:
    """The system's and the user's messages of a record. Raises `ValueError`, which says what is wrong with it."""
    if "turns" in record or "prompt" in record:
        given = record.get("turns", record.get("prompt"))
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, Sequence):
            raise ValueError(f"its turns or prompt are no list of texts but {type(given).__name__}")
        turns = [{"role": "user", "content": one} if isinstance(one, str) else one for one in given]
    else:
        turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"it has no list of messages, and no turns or prompt: {', '.join(record)}")
    found: list[Message] = []
    for i, turn in enumerate(turns):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(str(role), role)
        if role == "assistant":
            continue
        if role not in ("user", "system") or not isinstance(content, str) or not content.strip():
            raise ValueError(
                f"message {i} has the role {role!r} and {type(content).__name__} content that cannot be asked"
            )
        found.append({"role": role, "content": content})
    if not any(turn["role"] == "user" for turn in found):
        raise ValueError("it has no message of a user")
    return found
