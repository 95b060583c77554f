"""Regeneration: a base's own answers, as it samples them, as a token store with a loss mask.

A head learns the law that it will draft for from texts of that law. What is asked is answered by our decoder, many at a
time, each slot refilled as an answer ends. Ids stay as they were sampled: text that is encoded again has others. An
answer that is cut by `max_new_tokens` has no end.

Each answer depends on what is asked and the seed alone. Conversations that are done are appended to
`.NAME.partial/answers-P.jsonl` by process P at once, so a kill loses what is in flight, and the same command goes on,
with any number of processes. In the end the first process makes the store of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from mtp_jax.data.encoding import Encoded
from mtp_jax.data.held_out import is_held_out, require_both
from mtp_jax.data.parts import PartWriter, join
from mtp_jax.data.preparation import FORMAT
from mtp_jax.data.store import MANIFEST, SPLITS, TOKENIZER_DIR
from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.slots import Slots
from mtp_jax.distill.asks import Ask, Message
from mtp_jax.distributed import all_done, from_all, on_first
from mtp_jax.runs.base import Base
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.runs.lock import one_maker
from mtp_jax.runs.paths import replace_file
from mtp_jax.validate import ConfigError, at_least, fraction, require, typed

FORWARDS = 16  # between two looks at what has ended


@dataclass(frozen=True)
class Regenerate:
    """How answers are sampled. `max_prompt_tokens` is the longest that a conversation may be before an answer, and how
    much of a document is read where text is continued is `prompt_tokens`."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    max_prompt_tokens: int = 1024
    prompt_tokens: int = 32
    seed: int = 0
    batch_size: int = 64
    valid_fraction: float = 0.05

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "max_new_tokens", "max_prompt_tokens", "prompt_tokens", "batch_size")
        fraction(self, "valid_fraction")
        DecodeConfig(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def law(self) -> dict[str, Any]:
        """What decides the answers, as JSON values."""
        names = ("temperature", "top_k", "top_p", "max_new_tokens", "max_prompt_tokens", "prompt_tokens", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class _Talk:
    """A conversation on its way: its ids so far, 1 for each that was sampled, and what was said; `heard` messages of
    what is asked are among that. `rows` are documents that are done."""

    ask: Ask
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    said: list[Message] = field(default_factory=list)
    heard: int = 0
    ended: bool = False
    rows: list[tuple[np.ndarray, np.ndarray, bool]] = field(default_factory=list)

    def hear(self) -> None:
        """Listen up to the user's next question."""
        rest = self.ask.messages[self.heard :]
        count = 1 + next((i for i, message in enumerate(rest) if message["role"] == "user"), len(rest) - 1)
        self.said += rest[:count]
        self.heard += count

    def add(self, tokens: np.ndarray, sampled: bool) -> None:
        self.ids = np.concatenate([self.ids, np.asarray(tokens, np.int32)])
        self.mask = np.concatenate([self.mask, np.full(len(tokens), sampled, np.uint8)])


def regenerate(
    run: LoadedRun,
    base: Base,
    todo: Sequence[Ask],
    out: str | os.PathLike[str],
    config: Regenerate,
    *,
    source: str = "",
    log: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> Path:
    """Answer what is asked and make a store of it; returns its path.

    Args:
      run: the base's model, on one of this process's devices (or a tensor axis of them).
      base: which run that is.
      todo: what is asked, alike on every process; each answers its share.
      out: the directory to make, which all processes see.
      config: the law that is sampled, and how many at a time.
      source: what was asked, for the manifest.
      log: told what was made.
      progress: told how many are done, of those that there were and this process's share of the rest, and how many
        tokens were sampled.

    Raises:
      BusyError: another command makes it.
      ConfigError: `out` is there, or holds answers of another base or law; or nothing could be answered.
    """
    path = Path(os.path.expanduser(out)).absolute()
    scratch = path.with_name(f".{path.name}.partial")
    require(not path.exists(), f"{path} exists; give another --out, or delete it.")
    made_of = {"tokenizer": run.tokenizer.to_json(), "sampled": config.law, "base": base.reference()}
    require_both((ask.content for ask in todo if not ask.error), config.valid_fraction)
    with one_maker(path):
        _begin(scratch, made_of)
        known = _answered(scratch)
        from_all("")  # all have read what there is, and none has answered more
        index, count = jax.process_index(), jax.process_count()
        left = [ask for ask in todo if ask.key not in known][index::count]
        done, tokens, whole = len(known), 0, len(known) + len(left)
        progress(done, whole, 0)
        with (scratch / f"answers-{index}.jsonl").open("a") as file:
            for record in _answers(run, left, config):
                file.write(json.dumps(record) + "\n")
                file.flush()
                done, tokens = done + 1, tokens + sum(sum(row["mask"]) for row in record["rows"])
                progress(done, whole, tokens)
        all_done()
        made = {**made_of, "source": source}
        said = on_first(lambda: _finish(scratch, path, todo, run.tokenizer, made, config.valid_fraction))
    if index == 0:
        log(said)
    return path


def _begin(scratch: Path, made_of: dict[str, Any]) -> None:
    """Make the directory of what is in flight, or go on with what is there."""
    asked, wanted = scratch / "asked.json", json.dumps(made_of, indent=1, sort_keys=True)

    def there() -> str:
        if not asked.exists():
            scratch.mkdir(parents=True, exist_ok=True)
            replace_file(epath.Path(asked), wanted)
        return asked.read_text()

    require(
        on_first(there) == wanted,
        f"{scratch} holds answers of another base or of other sampling settings: {asked} says which. Give the same, or "
        f"another --out, or delete {scratch}.",
    )


def _answered(scratch: Path) -> dict[str, dict[str, Any]]:
    """What earlier starts have answered, by the key of what was asked. Half a line, which a kill leaves, is dropped."""
    found = {}
    for file in sorted(scratch.glob("answers-*.jsonl")):
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data and file.name == f"answers-{jax.process_index()}.jsonl":
            os.truncate(file, len(whole))
        found |= {record["key"]: record for record in map(json.loads, whole.splitlines())}
    return found


def _answers(run: LoadedRun, todo: Sequence[Ask], config: Regenerate) -> Iterator[dict[str, Any]]:
    """The records of what is asked, as they are done."""
    if not todo:
        return
    opened = [(ask, *_open(run, ask, config)) for ask in todo]
    with jax.set_mesh(run.mesh):
        slots = Slots(
            run.decoder,
            size=min(config.batch_size, len(todo)),
            max_prompt=_longest(opened, min(config.max_prompt_tokens, run.config.model.context_length - 1)),
            max_new=min(config.max_new_tokens, run.config.model.context_length - 1),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_tokens=run.stop_tokens,
        )
    waiting, live = iter(opened), {}

    def submit(talk: _Talk) -> str:
        """Put a conversation into the queue, or say why it cannot be."""
        room = run.config.model.context_length - len(talk.ids)
        if len(talk.ids) > config.max_prompt_tokens or room < 1:
            return (
                f"{talk.ask.name}: {len(talk.ids)} tokens come before an answer; at most {config.max_prompt_tokens} "
                "are read (--max-prompt-tokens), and the context must hold an answer too"
            )
        digest = hashlib.sha256(f"{config.seed} {talk.ask.key} {talk.heard}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        live[slots.submit(talk.ids, seed=seed, max_new_tokens=min(config.max_new_tokens, room))] = talk
        return ""

    while True:
        failed = []
        with jax.set_mesh(run.mesh):
            while len(live) < 2 * config.batch_size and (one := next(waiting, None)) is not None:
                ask, talk, problem = one
                if problem := problem or submit(talk):
                    failed.append({"key": ask.key, "rows": [], "error": problem})
            busy = slots.busy
            stepped = slots.step(FORWARDS) if busy else {}
        yield from failed
        if not busy:
            return
        for number, step in stepped.items():
            talk = live[number]
            talk.add(step.tokens, sampled=True)
            if not step.finished:
                continue
            del live[number]
            more, problem = False, "" if step.finite else f"{talk.ask.name}: the law of an answer is not finite"
            try:
                more = not problem and _next_turn(run, talk)
                problem = problem or (submit(talk) if more else "")
            except ConfigError as error:
                problem = f"{talk.ask.name}: {error}"
            if not more or problem:
                # Of a conversation that cannot go on, what was answered stays; a question behind it goes.
                last = int(np.max(np.flatnonzero(talk.mask), initial=-1)) + 1 if step.finite else 0
                rows = talk.rows + [(talk.ids[:last], talk.mask[:last], talk.ended)] * bool(last)
                found = [{"ids": ids.tolist(), "mask": mask.tolist(), "ended": ended} for ids, mask, ended in rows]
                yield {"key": talk.ask.key, "rows": found, "error": problem}


def _longest(opened: Sequence[tuple[Ask, _Talk, str]], most: int) -> int:
    """The tokens that come before an answer, at most: a slot that held more would be read for nothing. What comes
    before a later turn is not known yet."""
    if any(talk.heard < len(talk.ask.messages) for _, talk, _ in opened):
        return most
    return max((len(talk.ids) for _, talk, _ in opened if len(talk.ids) <= most), default=1)


def _open(run: LoadedRun, ask: Ask, config: Regenerate) -> tuple[_Talk, str]:
    """A conversation before its first answer, or what is wrong with it."""
    talk, problem = _Talk(ask), ask.error
    if not problem and ask.messages:
        try:
            talk.hear()
            talk.add(run.encode(run.tokenizer.conventions.render(talk.said), special=True), sampled=False)
        except ConfigError as error:
            problem = str(error)
    elif not problem:
        # No token has more bytes than this in any text that is worth going on with.
        ids = run.tokenizer.encode_prompt(ask.text[: 64 * config.prompt_tokens])[: config.prompt_tokens]
        talk.add(ids, sampled=False)
    return talk, problem


def _next_turn(run: LoadedRun, talk: _Talk) -> bool:
    """Go on to the next question behind an answer that has ended; False if there is none, or the answer was cut.

    Raises `ConfigError` if the template refuses the answer.
    """
    talk.ended, render = int(talk.ids[-1]) in run.stop_tokens, run.tokenizer.conventions.render
    if not talk.ended or talk.heard == len(talk.ask.messages):
        return False
    begin = int(np.flatnonzero(np.diff(talk.mask, prepend=0) == 1)[-1])
    answer, before = run.tokenizer.decode(talk.ids[begin:-1]), render(talk.said)
    talk.said.append({"role": "assistant", "content": answer})
    talk.hear()
    whole = render(talk.said)
    rest = whole.removeprefix(before + answer)
    tail = run.tokenizer.encode_special(rest)
    if rest != whole and tail[:1].tolist() == talk.ids[-1:].tolist():
        talk.add(tail[1:], sampled=False)  # what was sampled stays, and what the template writes behind it is new
        return True
    # The template writes this answer otherwise once others follow: it is the last one of a document.
    talk.rows.append((talk.ids, talk.mask, True))
    talk.ids, talk.mask = np.zeros(0, np.int32), np.zeros(0, np.uint8)
    talk.add(run.encode(whole, special=True), sampled=False)
    return True


def _finish(
    scratch: Path, path: Path, todo: Sequence[Ask], tokenizer: Tokenizer, made_of: dict[str, Any], valid_fraction: float
) -> str:
    """Make the store of all answers, in the order in which they were asked, and say what was made."""
    known, store, part = _answered(scratch), scratch / "store", scratch / "part"
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    for folder in (store, part):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    failed, ended, total = [], 0, 0
    with PartWriter(part, dtype, masked=True) as writer:
        for ask in todo:
            record = known[ask.key]
            failed += [record["error"]] * bool(record["error"])
            for i, row in enumerate(record["rows"]):
                ended, total = ended + row["ended"], total + 1
                split = "valid" if is_held_out(ask.content, valid_fraction) else "train"
                name = ask.name if len(record["rows"]) == 1 else f"{ask.name}#{i}"
                writer.write(Encoded(split, name, np.array(row["ids"]), np.array(row["mask"], np.uint8)))
        writer.finish()
    why = f"; the first: {failed[0]}" if failed else ""
    require(total > 0, f"None of {len(todo)} could be answered{why}.")
    splits = {split: join([part], split, store, dtype, True) for split in SPLITS}
    for name, data in tokenizer.files().items():
        (store / TOKENIZER_DIR).mkdir(exist_ok=True)
        (store / TOKENIZER_DIR / name).write_bytes(data)
    counts = {"answers": total, "ended": ended, "failed": len(failed)}
    manifest = {"format": FORMAT, "valid_fraction": valid_fraction, "dtype": dtype.str, "mask": True}
    manifest |= {"splits": splits, **made_of, **counts}
    (store / MANIFEST).write_text(json.dumps(manifest, indent=2))
    store.rename(path)
    shutil.rmtree(scratch)
    tokens = sum(entry["supervised"] for entry in splits.values())
    parts = " and ".join(f"{entry['documents']:,} {split}" for split, entry in splits.items())
    said = (
        f"{tokens:,} tokens of the base's own in {total:,} documents ({parts}), {ended:,} of which ended by themselves"
    )
    said += f"; {len(failed):,} could not be answered{why}" if failed else ""
    return f"Wrote {said}, in {path}"
