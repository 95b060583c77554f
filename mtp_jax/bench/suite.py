"""Suites of prompts for the decode benchmark: JSON lines, each a prompt or a conversation, and its category."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_jax.bench.config import BenchConfig
from mtp_jax.data.paths import matching
from mtp_jax.data.sources.files import Files
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.validate import ConfigError, require

FIELDS = "prompt", "messages", "turns"
NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Record:
    """A line of a suite: a text to continue, or a conversation to answer. `where` names file and line."""

    where: str
    category: str
    prompt: str | list[Mapping[str, Any]]

    def encode(self, run: LoadedRun, new_tokens: int) -> np.ndarray:
        """The ids of the prompt. Raises `ConfigError` if the run cannot read it, or has no room for the answer."""
        try:
            ids = run.encode(self.prompt) if isinstance(self.prompt, str) else run.conversation(self.prompt)
        except ConfigError as error:
            raise ConfigError(f"{self.where}: {error} Leave the line out, or give another run.") from error
        context = run.config.model.context_length
        require(
            len(ids) + new_tokens <= context,
            f"{self.where}: the prompt has {len(ids)} tokens and new_tokens is {new_tokens}, {len(ids) + new_tokens} "
            f"together; the context holds {context}. Lower --new-tokens, or leave the line out.",
        )
        return ids


def read_suite(path: str) -> list[Record]:
    """The records of a file, which may be compressed, or of the files that a glob matches.

    Raises:
      ConfigError: there is no such file or nothing in it; or a line is no record: the message names it.
      DataError: a file cannot be read, or is no text.
    """
    root, names = matching(path)
    require(
        bool(names),
        f"BenchConfig.suite is {path!r} and there is no such file. Give one with a JSON object a line, such as "
        '{"prompt": "...", "category": "code"}.',
    )
    files, records = Files(root, tuple(names)), []
    for name in names:
        for number, line in enumerate(files.content(name).removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
            if line.strip():
                records.append(_record(f"{root / name}, line {number}", line))
    require(bool(records), f"BenchConfig.suite is {path!r}, in which there is nothing. Give a file with prompts.")
    return records


def chosen_records(records: Sequence[Record], config: BenchConfig) -> list[Record]:
    """Of each category at most `config.prompts`, chosen by the seed, and so many that they fill batches of each size:
    no batch is of two categories. Raises `ConfigError` where a category has too few for one."""
    whole, chosen = math.lcm(*config.batch_sizes), []
    for category in dict.fromkeys(record.category for record in records):
        own = [record for record in records if record.category == category]
        count = min(config.prompts, len(own)) // whole * whole
        require(
            count > 0,
            f"BenchConfig.batch_sizes is {config.batch_sizes}, which takes prompts of one category by the {whole}, and "
            f"{category!r} has {len(own)} in {config.suite!r}, of which {config.prompts} are asked for. Give smaller "
            "batches, or more prompts.",
        )
        order = np.random.default_rng(config.seed).permutation(len(own))
        chosen += [own[i] for i in sorted(order[:count])]
    return chosen


def _record(where: str, line: bytes) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error}). Mend it, or leave it out.") from error
    require(
        isinstance(values, dict),
        f"{where} is no JSON object but {type(values).__name__}. A suite has one object a line (jq -c '.[]' makes "
        "them of an array).",
    )
    given = [name for name in FIELDS if values.get(name) is not None]
    require(
        len(given) == 1,
        f"{where} has {' and '.join(given) or 'none'} of the fields {', '.join(FIELDS)}; give exactly one. It has "
        f"{', '.join(map(repr, values)) or 'nothing'}.",
    )
    category = values.get("category")
    require(
        category is None or isinstance(category, str),
        f"{where}: category is {category!r}; it must be a string, or not be there.",
    )
    name = " ".join((category or "").split()) or NO_CATEGORY
    return Record(where, name, _prompt(where, given[0], values[given[0]]))


def _prompt(where: str, field: str, value: Any) -> str | list[Mapping[str, Any]]:
    """What is continued or answered, checked."""
    if field == "prompt":
        require(isinstance(value, str), f"{where}: prompt is {type(value).__name__}; it must be a string.")
        require(bool(value.strip()), f"{where}: prompt is empty. Give a text, or leave the line out.")
        return value
    require(isinstance(value, list) and bool(value), f"{where}: {field} must be a list with something in it.")
    messages = value if field == "messages" else [{"role": "user", "content": value[0]}]
    last = messages[-1]
    require(
        isinstance(last, dict) and last.get("role") == "user",
        f"{where}: the last of the messages must be the user's, which is answered. Leave those behind it out.",
    )
    content = last.get("content")
    require(
        isinstance(content, str) and bool(content.strip()),
        f"{where}: the user's {'first turn' if field == 'turns' else 'last message'} is empty, or no text. Give one, "
        "or leave the line out.",
    )
    return list[Mapping[str, Any]](messages)
