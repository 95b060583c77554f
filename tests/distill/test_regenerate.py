"""A base's own answers: sampled as decoding samples, whatever is beside them, kept as they were sampled, continued."""

import contextlib
import copy
import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax import cli, distributed
from mtp_jax.commands.distill import RegenerateOptions
from mtp_jax.data.config import SourceConfig
from mtp_jax.data.store import SPLITS, Store
from mtp_jax.distill import regenerate as module
from mtp_jax.distill.asks import Ask, asks, questions
from mtp_jax.distill.regenerate import Regenerate, _next_turn, _Talk, regenerate
from mtp_jax.distributed import Distributed
from mtp_jax.interop.importing import import_run
from mtp_jax.runs.base import open_base
from mtp_jax.runs.lock import one_maker
from mtp_jax.validate import BusyError, ConfigError
from support import pretrained
from support.processes import free_port

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = Regenerate(max_new_tokens=12, max_prompt_tokens=64, batch_size=3, valid_fraction=0.3)
END = 257


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
    pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
    root = tmp_path_factory.mktemp("base")
    source = pretrained.write(root / "source", max_position_embeddings=128)[0]
    run = mtp_jax.load(import_run(str(source), root / "run"))
    # Random weights end seldom: with these, every tenth token does.
    stops = (END, *range(0, 250, 10))
    run.tokenizer.conventions = dataclasses.replace(run.tokenizer.conventions, stops=stops)
    return run, open_base(root / "run")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(asks(SourceConfig(str(path)), path.parent, chat=True))


@pytest.fixture(scope="module")
def todo(tmp_path_factory):
    users = [{"messages": [{"role": "user", "content": f"What is {i}?"}]} for i in range(10)]
    return write(tmp_path_factory.mktemp("asks") / "asks.jsonl", users)


@pytest.fixture(scope="module")
def straight(base, todo, tmp_path_factory):
    """A store that was made in one go, three answers at a time."""
    return regenerate(*base, todo, tmp_path_factory.mktemp("own") / "store", CONFIG)


def contents(store):
    return {file.name: file.read_bytes() for file in store.iterdir() if file.is_file()}


def rows(store):
    """(name, ids, mask) of every document."""
    opened = Store.open(store)
    return {
        docs.names[i]: (docs[i], np.asarray(docs.mask_of(i)))
        for docs in (getattr(opened, split) for split in SPLITS)
        for i in range(len(docs))
    }


def test_an_answer_is_what_decoding_gives_and_nothing_else_is_supervised(base, todo, straight):
    run, _ = base
    found, ended = rows(straight), 0
    assert list(found) and set(found) == {ask.name for ask in todo}
    for ask in todo:
        ids, mask = found[ask.name]
        prompt = run.conversation(ask.messages)
        np.testing.assert_array_equal(ids[: len(prompt)], prompt)
        assert mask.tolist() == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        digest = module.hashlib.sha256(f"0 {ask.key} 1".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        again = run.generate_tokens([prompt], temperature=0.7, max_new_tokens=12, seed=[seed])
        np.testing.assert_array_equal(ids[len(prompt) :], again.tokens[0])
        inside, last = ids[len(prompt) : -1], int(ids[-1])
        assert not set(inside.tolist()) & set(run.stop_tokens)
        assert last in run.stop_tokens or len(inside) == 11  # a cut answer has no end
        ended += last in run.stop_tokens
    manifest = Store.open(straight).manifest
    assert (manifest["answers"], manifest["ended"], manifest["failed"]) == (10, ended, 0) and 0 < ended < 10
    assert manifest["base"] == base[1].reference() and manifest["sampled"]["temperature"] == 0.7
    assert manifest["splits"]["train"]["documents"] > 0 < manifest["splits"]["valid"]["documents"]


@pytest.mark.parametrize("size", [1, 16])
def test_answers_do_not_depend_on_how_many_are_made_at_a_time(base, todo, straight, tmp_path, size):
    made = regenerate(*base, todo, tmp_path / "store", dataclasses.replace(CONFIG, batch_size=size))
    assert contents(made) == contents(straight)


def test_a_kill_loses_what_is_in_flight_and_the_same_command_goes_on(base, todo, straight, tmp_path, monkeypatch):
    real, made = module._answers, []

    def killed(*args):
        for record in real(*args):
            if len(made) == 4:
                raise KeyboardInterrupt
            made.append(record["key"])
            yield record

    monkeypatch.setattr(module, "_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        regenerate(*base, todo, tmp_path / "store", CONFIG)
    half = tmp_path / ".store.partial" / "answers-0.jsonl"
    assert len(half.read_text().splitlines()) == 4
    with half.open("a") as file:
        file.write('{"key": "0123')  # the line that the kill cut
    asked = []
    monkeypatch.setattr(module, "_answers", lambda run, left, config: (asked.append(left), real(run, left, config))[1])
    told = []
    regenerate(*base, todo, tmp_path / "store", CONFIG, progress=lambda done, total, tokens: told.append((done, total)))
    assert {ask.key for ask in asked[0]} == {ask.key for ask in todo} - set(made)
    assert told[0] == (4, 10) and told[-1] == (10, 10)
    assert contents(tmp_path / "store") == contents(straight) and not half.exists()


def test_processes_share_what_is_asked(base, todo, straight, tmp_path, monkeypatch):
    """Each answers its part, and the first one joins them. Here they come one after the other, and none has read what
    the other has written since both began."""
    real, reads = module._answered, iter((True, True, False))
    monkeypatch.setattr(module, "_answered", lambda scratch: {} if next(reads) else real(scratch))
    monkeypatch.setattr(module, "from_all", lambda text: [text])
    monkeypatch.setattr(module, "all_done", lambda: None)
    monkeypatch.setattr(module, "one_maker", lambda path: contextlib.nullcontext())
    monkeypatch.setattr(module, "on_first", lambda work: work() if jax.process_index() == 0 else wanted)
    made_of = {"tokenizer": base[0].tokenizer.to_json(), "sampled": CONFIG.law, "base": base[1].reference()}
    wanted = json.dumps(made_of, indent=1, sort_keys=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        if index == 1:  # the first process makes the directory
            monkeypatch.setattr(jax, "process_index", lambda: 0)
            module._begin(tmp_path / ".store.partial", made_of)
            monkeypatch.setattr(jax, "process_index", lambda: 1)
        regenerate(*base, todo, tmp_path / "store", CONFIG, progress=lambda d, total, t: shares.append(total))
        if index == 1:
            assert not (tmp_path / "store").exists()
    assert shares[0] == shares[-1] == 5
    assert contents(tmp_path / "store") == contents(straight)


class Client:
    """A coordinator's client whose second process comes late, or whose coordinator is gone."""

    def __init__(self, errors):
        self.errors, self.asked = iter(errors), []

    def key_value_set(self, key, value):
        self.own = key

    def blocking_key_value_get(self, key, milliseconds):
        self.asked.append(key.rpartition("/")[2])
        if key != self.own and (error := next(self.errors)):
            raise jax.errors.JaxRuntimeError(error)
        return "done"


def test_processes_wait_for_one_that_works_longer_and_not_for_a_dead_coordinator(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for errors in (["DEADLINE_EXCEEDED: timed out"] * 3 + [""], ["UNAVAILABLE: failed to connect"]):
        client = Client(errors)
        monkeypatch.setattr(distributed, "_client", lambda client=client: client)
        with contextlib.nullcontext() if not errors[-1] else pytest.raises(RuntimeError, match="UNAVAILABLE"):
            distributed.all_done()
        assert client.asked == ["0", *["1"] * len(errors)]


def test_answers_of_another_law_are_not_mixed(base, todo, tmp_path):
    (tmp_path / ".store.partial").mkdir()
    (tmp_path / ".store.partial" / "asked.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"\.store\.partial holds answers of another base or of other sampling"):
        regenerate(*base, todo, tmp_path / "store", CONFIG)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there exists; give another --out"):
        regenerate(*base, todo, tmp_path / "there", CONFIG)


def test_a_second_start_is_refused_while_the_first_one_lives(base, todo, straight, tmp_path):
    with one_maker(tmp_path / "own"), pytest.raises(BusyError, match=r"Another command makes .*own: it holds .*\.lock"):
        regenerate(*base, todo, tmp_path / "own", CONFIG)
    assert contents(regenerate(*base, todo, tmp_path / "own", CONFIG)) == contents(straight)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_slots_are_as_long_as_what_is_asked(base, todo, tmp_path):
    """A prompt that is longer than what is read counts for nothing; what comes before a later turn is not known."""
    run, _ = base
    opened = [(ask, *module._open(run, ask, CONFIG)) for ask in todo]
    lengths = [len(talk.ids) for _, talk, _ in opened]
    assert module._longest(opened, 1000) == max(lengths) < 64
    opened[0][1].ids = np.zeros(2000, np.int32)
    assert module._longest(opened, 1000) == max(lengths[1:])
    two = [{"role": "user", "content": text} for text in ("a", "b")]
    (longer,) = write(tmp_path / "two.jsonl", [{"messages": two}])
    assert module._longest([*opened, (longer, *module._open(run, longer, CONFIG))], 1000) == 1000


def test_the_command_reads_the_processes_of_the_environment(monkeypatch):
    for name, value in (("COORDINATOR", "localhost:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"MTP_JAX_{name}", value)
    options = RegenerateOptions(source="asks.jsonl", base="base", out="own")
    assert options.distributed == Distributed("localhost:1", 2, 1)


def talk_of(run, messages, answer, end=END):
    talk = _Talk(Ask("x", b"x", tuple(messages)))
    talk.hear()
    talk.add(run.encode(run.tokenizer.conventions.render(talk.said), special=True), sampled=False)
    talk.add(np.append(run.encode(answer)[1:], end), sampled=True)
    return talk


def test_the_next_question_comes_behind_the_ids_that_were_sampled(base):
    run, tokenizer = base[0], copy.copy(base[0].tokenizer)
    template = pretrained.TEMPLATE.replace("{{ m.role }}: ", "{{ m.role }}:")  # as it begins an answer
    tokenizer.conventions = dataclasses.replace(tokenizer.conventions, template=template)
    run = dataclasses.replace(run, tokenizer=tokenizer)
    messages = [{"role": "system", "content": "be kind"}, *({"role": "user", "content": c} for c in ("one", "two"))]
    talk = talk_of(run, messages, "1")
    before = talk.ids.copy()
    assert _next_turn(run, talk) and talk.heard == 3 and not talk.rows
    said = [*messages[:2], {"role": "assistant", "content": "1"}, messages[2]]
    np.testing.assert_array_equal(talk.ids, run.conversation(said))
    np.testing.assert_array_equal(talk.ids[: len(before)], before)
    assert int(talk.mask.sum()) == 2  # the answer and its end
    talk.add(np.array([5, END]), sampled=True)
    assert not _next_turn(run, talk) and talk.ended


def test_an_answer_that_the_template_writes_otherwise_ends_a_document(base):
    """Here it ended with another token than the template writes."""
    run, _ = base
    messages = [{"role": "user", "content": c} for c in ("one", "two")]
    talk = talk_of(run, messages, "1", end=10)
    first = talk.ids.copy()
    assert _next_turn(run, talk) and len(talk.rows) == 1
    np.testing.assert_array_equal(talk.rows[0][0], first)
    said = [messages[0], {"role": "assistant", "content": "1"}, messages[1]]
    np.testing.assert_array_equal(talk.ids, run.conversation(said))
    assert not talk.mask.any()


def test_an_answer_that_was_cut_is_not_gone_on_from(base):
    run, _ = base
    talk = talk_of(run, [{"role": "user", "content": c} for c in ("one", "two")], "1", end=5)
    assert not _next_turn(run, talk) and not talk.ended


def test_what_cannot_be_answered_is_counted(base, tmp_path):
    records = [{"prompt": "a" * 100}, {"text": "no"}, {"prompt": " "}, *({"prompt": f"{i}"} for i in range(9))]
    lines = []
    todo = write(tmp_path / "asks.jsonl", records)
    store = regenerate(*base, todo, tmp_path / "store", CONFIG, log=lines.append)
    manifest = Store.open(store).manifest
    assert manifest["failed"] == 3 and "; 3 could not be answered; the first: " in lines[0]
    assert "tokens come before an answer; at most 64 are read (--max-prompt-tokens)" in lines[0]


def test_of_a_conversation_that_cannot_go_on_what_was_answered_stays(base, tmp_path):
    """Here the next question is longer than what is read."""
    records = [{"turns": [f"{i}", "a" * 100]} for i in range(12)]
    store = regenerate(*base, write(tmp_path / "asks.jsonl", records), tmp_path / "store", CONFIG)
    found, manifest = rows(store), Store.open(store).manifest
    assert len(found) == 12 and 0 < manifest["failed"] < 12  # a cut answer is not gone on from
    for ids, mask in found.values():
        assert mask[-1] and len(ids) < 64


def test_questions_are_those_of_the_user_and_equal_ones_are_asked_once(tmp_path):
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "s"}
    answered = [system, user, {"role": "assistant", "content": "x"}, {"role": "user", "content": "more"}]
    assert questions({"messages": answered}) == [system, user, answered[3]]
    assert questions({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}]}) == [user]
    assert questions({"prompt": "hi"}) == questions({"turns": ["hi"]}) == [user]
    for record, words in (
        ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool'"),
        ({"messages": [system]}, "no message of a user"),
        ({"messages": "hi"}, "no list of messages"),
    ):
        with pytest.raises(ValueError, match=words):
            questions(record)
    todo = write(tmp_path / "asks.jsonl", [{"prompt": "hi"}, {"turns": ["hi"]}, {"messages": [user]}, {"prompt": "ho"}])
    assert [len(ask.messages) for ask in todo] == [1, 1] and len({ask.key for ask in todo}) == 2


def test_text_is_continued(base, tmp_path):
    run, _ = base
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"Once upon a time there were {i}")
    todo = list(asks(SourceConfig(f"{tmp_path}/*.txt"), tmp_path, chat=False))
    store = regenerate(*base, todo, tmp_path / "store", dataclasses.replace(CONFIG, prompt_tokens=6))
    for ids, mask in rows(store).values():
        np.testing.assert_array_equal(ids[:6], run.encode("Once upon")[:6])
        assert not mask[:6].any() and mask[6:].all()


@pytest.mark.slow
def test_the_command_makes_a_store_that_is_trained_on(base, tmp_path, capsys):
    source = tmp_path / "asks.jsonl"
    write(source, [{"prompt": f"{i}"} for i in range(12)])
    own, states, run_dir = (str(tmp_path / name) for name in ("own", "states", "run"))
    where = ["--base", str(base[1].path)]
    options = ["--max-new-tokens", "8", "--max-prompt-tokens", "64", "--batch-size", "4", "--valid-fraction", "0.3"]
    cli.main(["data", "regenerate", *where, "--source", str(source), "--out", own, *options])
    cli.main(["data", "hidden", *where, "--source", own, "--out", states, "--seq-len", "64"])
    said = capsys.readouterr().out
    assert "answering: 12 of 12 documents" in said and f"--data.source {states} --data.seq-len 64" in said
    experiment = tmp_path / "head.py"
    experiment.write_text(
        "from mtp_jax import *\n"
        "CONFIG = TrainConfig(head=HeadConfig(window=3, rank=2, factors='lowrank', factor_width=4, target='ntp', "
        "encoder='token'), optimizer=OptimizerConfig(warmup_steps=0), steps=2, eval_batches=1, "
        "data=DataConfig(seq_len=64, batch_size=8, valid_fraction=0.3))\n"
    )
    cli.main(["train", str(experiment), *where, "--data.source", states, "--run-dir", run_dir])
    assert "reads hidden states of" in capsys.readouterr().out
    run = mtp_jax.load(run_dir)
    assert run.config.head.temperature == 0.7 and isinstance(run.generate("hi", max_new_tokens=3), str)


@pytest.mark.slow
def test_two_real_processes_make_the_store_that_one_makes(base, tmp_path):
    """Each answers its part, on a device of its own; the first one makes the store."""
    asked = tmp_path / "asks.jsonl"
    write(asked, [{"messages": [{"role": "user", "content": f"What is {i}?"}]} for i in range(10)])
    options = ["--base", str(base[1].path), "--source", str(asked), "--max-new-tokens", "12", "--valid-fraction", "0.3"]

    def start(out, index, count, port):
        where = {"MTP_JAX_COORDINATOR": f"localhost:{port}", "MTP_JAX_PROCESS_ID": str(index)}
        several = {**where, "MTP_JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
        command = [sys.executable, "-m", "mtp_jax", "data", "regenerate", *options, "--out", str(tmp_path / out)]
        return subprocess.Popen(command, env={**os.environ, **several}, text=True, stdout=subprocess.PIPE)

    for out, count in (("one", 1), ("two", 2)):
        port = free_port()
        running = [start(out, index, count, port) for index in range(count)]
        said = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0] * count, said
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shares = [re.search(r"of (\d+) documents", text)[1] for text in said]
    assert sum(map(int, shares)) == 10 and "0" not in shares and "Wrote" in said[0] and "Wrote" not in said[1]
