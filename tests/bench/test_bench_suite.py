"""Suites of prompts: what a line may be, who is measured with whom; nothing is compiled while time is taken."""

import gzip
import json

import jax
import numpy as np
import pytest

from mtp_jax import cli
from mtp_jax.bench import decode as bench
from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.session import Session
from mtp_jax.bench.suite import NO_CATEGORY, chosen_records, read_suite
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Decoding
from mtp_jax.interop.importing import import_run
from mtp_jax.runs.loading import load
from mtp_jax.sweep.costs import untrained
from mtp_jax.validate import ConfigError
from support import pretrained, tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


def ask(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def suite(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# Reading


def test_a_line_is_a_text_or_a_conversation(tmp_path):
    turns = {"turns": ["Who?", "And why?"], "category": "writing ", "question_id": 81}
    path = suite(tmp_path / "a.jsonl", {"prompt": " x = ", "category": "code"}, ask("Hello"), turns)
    first, second, third = read_suite(path)
    assert (first.prompt, first.category, first.where) == (" x = ", "code", f"{path}, line 1")
    assert (second.prompt, second.category) == ([{"role": "user", "content": "Hello"}], NO_CATEGORY)
    assert third.prompt == [{"role": "user", "content": "Who?"}] and third.category == "writing", "the first turn"
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(b"\xef\xbb\xbf\n" + (tmp_path / "a.jsonl").read_bytes())
    assert [record.prompt for record in read_suite(f"{path}.gz")] == [first.prompt, second.prompt, third.prompt]
    assert read_suite(f"{path}.gz")[0].where == f"{path}.gz, line 2"


BAD = {
    "not JSON": (b"{", "is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "is not JSON"),
    "an array": (b'[{"prompt": "a"}]', r"is no JSON object but list\. .*jq -c"),
    "no prompt": (
        b'{"text": "a", "category": "b"}',
        r"has none of the fields prompt, messages, turns.*'text', 'category'",
    ),
    "two prompts": (b'{"prompt": "a", "turns": ["b"]}', "has prompt and turns of the fields .*give exactly one"),
    "a number": (b'{"prompt": 3}', "prompt is int; it must be a string"),
    "an empty prompt": (b'{"prompt": " "}', "prompt is empty"),
    "an empty list": (b'{"turns": []}', "turns must be a list with something in it"),
    "a string of turns": (b'{"turns": "abc"}', "turns must be a list"),
    "an empty turn": (b'{"turns": [""]}', "first turn is empty"),
    "an empty message": (b'{"messages": [{"role": "user", "content": ""}]}', "last message is empty"),
    "an answer": (b'{"messages": [{"role": "assistant", "content": "a"}]}', "must be the user's"),
    "a category": (b'{"prompt": "a", "category": 3}', "category is 3; it must be a string"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_is_no_record_is_named(tmp_path, name):
    line, words = BAD[name]
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ConfigError, match=f"a.jsonl, line 3:? .*{words}"):
        read_suite(str(tmp_path / "a.jsonl"))


def test_a_suite_that_is_not_there_is_refused_before_a_run_is_loaded(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"BenchConfig\.suite is .*no such file\. Give one with a JSON object a line"):
        bench.check(BenchConfig(suite=f"{tmp_path}/a.jsonl"), tiny.train_config())
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="in which there is nothing"):
        bench.check(BenchConfig(suite=f"{tmp_path}/a.jsonl"), tiny.train_config())
    with pytest.raises(ConfigError, match=r"suite is 'a' and files is 'b'; give one of them"):
        BenchConfig(suite="a", files="b")


# Choosing


def test_of_each_category_so_many_as_are_asked_for(tmp_path):
    lines = [ask(f"{category} {i}", category=category) for i in range(9) for category in ("code", "chat")]
    records = read_suite(suite(tmp_path / "a.jsonl", *lines, ask("chat 9", category="chat")))

    def chosen(**options):
        return [record.prompt[0]["content"] for record in chosen_records(records, BenchConfig(suite="s", **options))]

    assert chosen() == [f"code {i}" for i in range(9)] + [f"chat {i}" for i in range(10)]
    assert [text[:4] for text in chosen(prompts=3)] == ["code"] * 3 + ["chat"] * 3
    assert chosen(prompts=3, seed=1) != chosen(prompts=3) == chosen(prompts=3)
    batches = chosen(batch_sizes=(1, 2, 4))
    assert [text[:4] for text in batches] == ["code"] * 8 + ["chat"] * 8, "no batch is of two categories"
    with pytest.raises(ConfigError, match=r"by the 12, and 'code' has 9 in 's', of which 24 are asked for.*smaller"):
        chosen(batch_sizes=(4, 3))


# A model


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A tiny pretrained model with a chat template, as a run."""
    root = tmp_path_factory.mktemp("imported")
    directory, *_ = pretrained.write(root / "hf", max_position_embeddings=128)
    import_run(str(directory), root / "run")
    return root / "run"


def test_conversations_go_through_the_template_and_texts_do_not(imported, tmp_path):
    run, config = (
        load(imported),
        BenchConfig(suite=suite(tmp_path / "a.jsonl", ask("Hi"), {"prompt": "Hi"}), new_tokens=8),
    )
    chat, text = bench.chosen_prompts(run, config)
    assert run.tokenizer.decode(chat[1]) == run.tokenizer.decode(run.conversation([{"role": "user", "content": "Hi"}]))
    assert chat[1].tolist() == run.conversation([{"role": "user", "content": "Hi"}]).tolist()
    assert text[1].tolist() == run.encode("Hi").tolist() and chat[0] == text[0] == NO_CATEGORY


@pytest.mark.parametrize(
    "record, new_tokens, words",
    [
        (
            {"prompt": "x" * 100},
            40,
            r"line 2: the prompt has 101 tokens and new_tokens is 40, 141 .* holds 128",
        ),
        (ask("x" * 200), 4, r"line 2: The conversation has \d+ tokens, and the context holds 128\. Leave the line out"),
        ({"messages": [{"role": "tool", "content": "x"}, *ask("x")["messages"]]}, 4, r"line 2: .*no tools here"),
    ],
)
def test_a_prompt_that_the_run_cannot_take_is_named(imported, tmp_path, record, new_tokens, words):
    config = BenchConfig(suite=suite(tmp_path / "a.jsonl", ask("fine"), record), new_tokens=new_tokens)
    with pytest.raises(ConfigError, match=words):
        bench.chosen_prompts(load(imported), config)


def test_a_suite_is_measured_by_category(imported, tmp_path, capsys):
    path = suite(tmp_path / "a.jsonl", *(ask("x" * n, category=c) for c, n in (("code", 3), ("chat", 40), ("code", 5))))
    options = ("--new-tokens", "6", "--temperatures", "0", "--repetitions", "1")
    cli.main(["bench", "decode", str(imported), "--suite", path, *options])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    dtypes = dict.fromkeys(row["dtype"] for row in found["rows"])
    expected = [(dtype, *of) for dtype in dtypes for of in (("code", 2), ("chat", 1), (None, 3))]
    assert [(row["dtype"], row["category"], row["prompts"]) for row in found["by_category"]] == expected
    assert found["prompts"] == 3 and found["prompt_lengths"][1] - found["prompt_lengths"][0] == 37
    assert all(row["tokens_per_second"] > 0 and row["block_efficiency"] == 1 for row in found["by_category"])
    assert "By category of a.jsonl" in out and "mean of categories" in out


class Compilations:
    """How many programs JAX has compiled, those in the persistent cache too, and traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, event, *_, **__):
        self.count += event in ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_trace_duration")


@pytest.fixture
def compilations():
    counted = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counted)
    yield counted
    jax.monitoring.unregister_event_duration_listener(counted)


@pytest.mark.slow
def test_nothing_is_compiled_while_time_is_taken(tmp_path, monkeypatch, compilations):
    """Prompts of four buckets, some with a cache that attention reads in part; k = 0, 2 and the plain table."""
    model = tiny.model_config(vocab_size=258, num_layers=1, context_length=2048)
    run = untrained(tiny.train_config(model, tiny.head_config(window=3, rank=2)))
    lengths = {"a": (5, 100, 600, 40), "b": (9, 30, 550, 300)}
    path = suite(tmp_path / "a.jsonl", *({"prompt": "x" * n, "category": c} for c, of in lengths.items() for n in of))
    config = BenchConfig(suite=path, new_tokens=600, temperatures=(0.0,), ks=(0, 2), repetitions=1, batch_sizes=(1, 2))
    decode, during = Session.decode, []

    def counted(self, cell, first, forwards=2**31 - 1):
        before = compilations.count
        out = decode(self, cell, first, forwards)
        during.append(compilations.count - before)
        return out

    monkeypatch.setattr(Session, "decode", counted)
    monkeypatch.setattr(Session, "trial", lambda self, cell: dict.fromkeys(self.models, 1.0))
    jax.clear_caches()
    found = bench.bench_decode(run, config)
    assert len(during) == 3 * (8 + 4) and compilations.count > 20
    assert during == [0] * len(during)
    assert {row["category"] for row in found["by_category"]} == {"a", "b", None}


def test_all_parts_of_a_cache_that_may_be_read_are_known():
    """Whatever a batch of these shapes reads is among them, whichever row ends first."""
    with tiny.mesh():
        decoder = untrained(tiny.train_config(tiny.model_config(vocab_size=258, context_length=4096))).decoder

        def programs(new, *lengths):
            return Decoding(decoder, [np.ones(n, int) for n in lengths], DecodeConfig(new, k=1)).programs

        assert programs(8, 100) == [None] and programs(900, 100) == programs(900, 100, 20) == [512, None]
        assert programs(1100, 700) == [1024, None] and programs(1100, 700, 20) == [512, 1024, None]
