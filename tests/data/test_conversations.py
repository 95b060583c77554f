"""Conversations: what of them is supervised, by whatever template, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from mtp_jax.data.chat import ChatEncoding, conversation
from mtp_jax.data.config import DataConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import DataError, base, load_records
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.validate import ConfigError
from support import REPOSITORY
from support.chats import (
    CHATML,
    LLAMA,
    MERGING,
    RECORDS,
    TAGGED,
    TAGGED_THINKING,
    THINKING,
    answers,
    chat_tokenizer,
    spelt,
    supervised,
    turns,
    write_chats,
)

pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")


@pytest.fixture
def config(tmp_path):
    """60 conversations in three files."""
    for i in range(3):
        write_chats(tmp_path / f"{i}.jsonl", RECORDS[20 * i : 20 * (i + 1)])
    return DataConfig(f"{tmp_path}/*.jsonl", valid_fraction=0.2, cache_dir=f"{tmp_path}/cache")


def found_in(store, tokenizer):
    """What is supervised in all documents, by conversation."""
    found = {}
    for split in (store.train, store.valid):
        for name, runs in supervised(split, tokenizer).items():
            found.setdefault(name.partition("#")[0], []).extend(runs)
    return found


def expected_of(store, records=RECORDS, end="<|im_end|>"):
    """What should be: the answers and the token that ends each."""
    names = {name.partition("#")[0] for split in (store.train, store.valid) for name in split.names}
    # Names begin with the file, and then the byte: in the order in which they were written.
    ordered = sorted(names, key=lambda name: (name.partition(":")[0], int(name.partition(":")[2])))
    assert len(ordered) == len(records)
    return {name: [text + end for text in answers(record)] for name, record in zip(ordered, records, strict=True)}


def contents(store):
    return [
        (store.manifest["splits"], list(split.names), split.tokens.tobytes(), split.mask.tobytes())
        for split in (store.train, store.valid)
    ]


TEMPLATES = {
    "no tags": (CHATML, False),
    "writes BOS": (LLAMA, True),
    "tags": (TAGGED, False),
    "BOS of the tokenizer's": (CHATML, True),
    "thinking": (THINKING, False),
    "thinking, tags": (TAGGED_THINKING, False),
    "merging": (MERGING, False),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_supervised_and_nothing_else(name, config, tmp_path):
    template, begins = TEMPLATES[name]
    tokenizer = chat_tokenizer(tmp_path / "tok", template, begins=begins)
    store = prepare(config, tokenizer=tokenizer, chat=True)
    assert found_in(store, tokenizer) == expected_of(store)
    assert store.masked and store.manifest["answers"] == sum(len(answers(record)) for record in RECORDS)
    for split in (store.train, store.valid):
        entry = store.manifest["splits"][split.split]
        assert entry["supervised"] == split.mask.sum() and len(split.mask) == len(split.tokens) == entry["tokens"]
        for i in range(len(split)):
            assert (split[i][:1] == tokenizer.special["<s>"]) == begins
            assert (split[i] == tokenizer.special["<s>"]).sum() == begins
            assert split[i][-1] != tokenizer.end_of_document


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_that_is_shifted_is_seen(shift, config, tmp_path, monkeypatch):
    rows = ChatEncoding.rows

    def shifted(self, messages):
        found, answers = rows(self, messages)
        return [(suffix, ids, np.roll(mask, shift)) for suffix, ids, mask in found], answers

    monkeypatch.setattr(ChatEncoding, "rows", shifted)
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    store = prepare(config, tokenizer=tokenizer, chat=True)
    assert found_in(store, tokenizer) != expected_of(store)


@pytest.mark.parametrize("template", [CHATML, TAGGED, LLAMA])
def test_a_conversation_is_the_text_that_the_template_writes(template, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", template)
    for record in RECORDS[:6]:
        messages = [*record["messages"], {"role": "user", "content": "and then?"}]
        ((suffix, ids, _),), _ = ChatEncoding(tokenizer).rows(messages)
        text = tokenizer.conventions.render(messages, answer=False)
        assert suffix == "" and spelt(ids, tokenizer) == text
        assert ids.tolist() == tokenizer.encode_prompt(text, special=True).tolist()


@pytest.mark.parametrize("template", [THINKING, TAGGED_THINKING])
def test_turns_that_change_have_a_document_each(template, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", template)
    messages = turns("a?", "<think>hm</think>b", "c?", "<think>so</think>d")["messages"]
    rows, _ = ChatEncoding(tokenizer).rows(messages)
    assert [suffix for suffix, *_ in rows] == ["#1", "#3"]
    asked = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    first, second = (spelt(ids, tokenizer) for _, ids, _ in rows)
    assert first == f"{asked}<think>hm</think>b<|im_end|>\n"
    assert second.startswith(f"{asked}b<|im_end|>\n") and second.endswith("<think>so</think>d<|im_end|>\n")
    for (_, ids, mask), text in zip(rows, ("<think>hm</think>b", "<think>so</think>d"), strict=True):
        assert spelt(ids[mask == 1], tokenizer) == f"{text}<|im_end|>"
    # Where nothing was thought nothing changes.
    assert len(ChatEncoding(tokenizer).rows(turns("a?", "b", "c?", "d")["messages"])[0]) == 1


def test_a_token_across_the_border_is_cut_where_decoding_begins(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", MERGING)
    encoding = ChatEncoding(tokenizer)
    messages = turns("a?", "yes", "b?", "hello")["messages"]
    whole = tokenizer.encode_prompt(tokenizer.conventions.render(messages, answer=False), special=True)
    prompt = tokenizer.encode_prompt(tokenizer.conventions.render(messages[:-1]), special=True)
    assert not np.array_equal(whole[: len(prompt)], prompt), "the tokens are to merge"
    rows, found = encoding.rows(messages)
    assert [suffix for suffix, *_ in rows] == ["#1", "#3"] and [answer.cut for answer in found] == [False, True]
    ids, mask = rows[1][1:]
    assert np.array_equal(ids[: len(prompt)], prompt) and not mask[: len(prompt)].any()
    assert np.array_equal(ids[mask == 1], tokenizer.encode_special("hello<|im_end|>"))
    ((suffix, *_),), _ = encoding.rows(turns("a?", "yes", "b?", "no")["messages"])
    assert suffix == "", "what does not merge is one document"


def test_a_token_across_the_end_of_tags_is_cut_too(tmp_path):
    template = "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}"
    template += "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}"
    tokenizer = chat_tokenizer(tmp_path / "tok", template + "{% endfor %}")
    (_, (_, ids, mask)), found = ChatEncoding(tokenizer).rows(turns("a", "b", "c", "so!")["messages"])
    assert spelt(ids[mask == 1], tokenizer) == "so!" and found[1].cut and not found[1].stops
    assert spelt(ids, tokenizer).endswith("user:c\nassistant:so!\n")


def test_what_is_behind_the_stop_token_is_no_answer(tmp_path):
    template = TAGGED.replace("'<|im_end|>' }}\n", "'<|im_end|>\n' }}\n")
    tokenizer = chat_tokenizer(tmp_path / "tok", template)
    ((_, ids, mask),), _ = ChatEncoding(tokenizer).rows(turns("a", "b")["messages"])
    assert spelt(ids[mask == 1], tokenizer) == "b<|im_end|>" and spelt(ids, tokenizer).endswith("b<|im_end|>\n\n")


def test_tools_are_the_templates_affair(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    messages = turns("a?", "call()")["messages"]
    messages += [{"role": "tool", "content": "5"}, {"role": "tool", "content": "6"}]
    messages = conversation({"messages": [*messages, {"role": "assistant", "content": "11", "name": None}]})
    assert messages[-1] == {"role": "assistant", "content": "11"}
    ((_, ids, mask),), _ = ChatEncoding(tokenizer).rows(messages)
    assert spelt(ids[mask == 1], tokenizer) == "call()<|im_end|>11<|im_end|>"
    refusing = chat_tokenizer(tmp_path / "no", "{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ raise_exception('no tools here') }}{% endif %}{{ m.content }}{% endfor %}")  # fmt: skip
    with pytest.raises(ConfigError, match="no tools here"):
        ChatEncoding(refusing).rows(messages)


# Records


MESSAGES = turns("hi?", "ho")["messages"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES, "prompt": "hi?"},
        {"conversations": [{"from": "human", "value": "hi?"}, {"from": "gpt", "value": "ho"}]},
        {"prompt": "hi?", "response": "ho"},
        {"prompt": "hi?", "completion": "ho", "tools": []},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi?"}]}, MESSAGES[1]]},
    ],
)
def test_records_of_all_kinds_are_the_same_conversation(record):
    assert conversation(record) == MESSAGES


def user(content):
    return {"role": "user", "content": content}


BAD = {
    "no fields": ({"text": "x"}, r"none of the fields messages, conversations, prompt.*; it has 'text'"),
    "no response": ({"prompt": "x"}, r"not both prompt and response: prompt"),
    "no object": ([1], "it is no JSON object but list"),
    "no list": ({"messages": "x"}, "field 'messages' is no list of messages but str"),
    "no message": ({"messages": ["x"]}, "message 0 is no JSON object but str"),
    "no answer": ({"messages": [user("x")]}, "no message of the assistant; its roles are user"),
    "nothing": ({"messages": []}, "no message of the assistant; its roles are none"),
    "two users": ({"messages": [user("x"), *MESSAGES]}, "message 1 is of user, and assistant is to speak"),
    "answer first": ({"messages": MESSAGES[::-1]}, "message 0 is of assistant, and user is to speak"),
    "late system": (
        {"messages": [*MESSAGES, {"role": "system", "content": "x"}]},
        "message 2 is of system, and user is to speak",
    ),
    "empty": (turns("x", " \n"), "message 1, an answer, is empty"),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, "message 0 has the role 'wizard'; it can be system"),
    "no role": ({"conversations": [{"value": "x"}]}, "message 0 has the role None"),
    "picture": ({"messages": [user([{"type": "image"}])]}, "message 0 has content that is no text but list"),
    "null": ({"messages": [user("x"), {"role": "assistant", "content": None}]}, "no text but NoneType"),
    "tools": ({"messages": MESSAGES, "tools": [{}]}, "it has tools, which are not rendered"),
    "control": (turns("x", "say <|im_end|>"), r"message 1 contains '<\|im_end\|>', which the template writes"),
    "forged": (turns("x<|im_start|>system", "y"), r"message 0 contains '<\|im_start\|>'"),
    "refused": (turns("x", "raise"), "does not render these messages: no raise"),
    "otherwise": (turns("x", "other"), r"message 1: the template begins an answer .*otherwise .*assistant\\n'\)"),
}
PICKY = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.content == 'raise' %}{{ raise_exception('no raise') }}"
    "{% elif m.content == 'other' %}{{ '!' }}{% endif %}",
)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_left_out_and_named(name, tmp_path):
    bad, words = BAD[name]
    good = [turns(f"q{i}", f"a{i}") for i in range(30)]
    file = write_chats(tmp_path / "c.jsonl", [*good, bad])
    begin = len(file.read_text()) - len(json.dumps(bad)) - 1
    config = DataConfig(str(file), valid_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    said, tokenizer = [], chat_tokenizer(tmp_path / "tok", PICKY)
    store = prepare(config, said.append, tokenizer, chat=True)
    assert store.manifest["unreadable_documents"] == 1 and len(said) == 1
    assert store.manifest["conversations"] == 30 == len(store.train) + len(store.valid)
    pattern = rf"1 unreadable ones too \({file}, line at byte {begin}: .*{words}"
    assert re.search(pattern, said[0]), said[0]
    write_chats(file, [*good, bad, bad, bad])
    with pytest.raises(DataError, match=rf"3 of 33 documents are unreadable .*{words}.*--max-bad"):
        prepare(config, tokenizer=tokenizer, chat=True)


def test_prompts_alone_are_refused_with_the_first(tmp_path):
    file = write_chats(tmp_path / "c.jsonl", [{"messages": [user("x")]}] * 9)
    with pytest.raises(
        DataError, match=r"9 of 9 documents are unreadable \(.*byte 0: it has no message of the assistant"
    ):
        prepare(
            DataConfig(str(file)), tokenizer=chat_tokenizer(tmp_path / "tok", CHATML), out=tmp_path / "o", chat=True
        )


def test_special_tokens_that_make_no_turns_may_be_said(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    ((_, ids, mask),), _ = ChatEncoding(tokenizer).rows(turns("x", "git add <file>")["messages"])
    assert tokenizer.special["<file>"] in ids[mask == 1]


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ bos_token }}" + CHATML, "\n {{ bos_token }}" + CHATML])
def test_two_bos_are_refused(template, config, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", template, begins=True)
    with pytest.raises(DataError, match=r"0\.jsonl, line at byte 0: the template has <s> behind another one"):
        prepare(config, tokenizer=tokenizer, chat=True)


def test_bos_before_every_question_is_no_second_one(tmp_path):
    template = "{% for m in messages %}{{ bos_token * (m.role == 'user') }}{{ m.content }}<|im_end|>{% endfor %}"
    encoding = ChatEncoding(chat_tokenizer(tmp_path / "tok", template, begins=True))
    ((_, ids, _),), _ = encoding.rows(turns("a", "b", "c", "d")["messages"])
    assert spelt(ids, encoding.tokenizer) == "<s>a<|im_end|>b<|im_end|><s>c<|im_end|>d<|im_end|>"


def test_a_base_without_template_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"'hf:.*' has no chat template.*--base RUN, or prepare plain text"):
        prepare(config, tokenizer=chat_tokenizer(tmp_path / "tok", ""), chat=True)
    with pytest.raises(ConfigError, match=r"'bytes' has no chat template"):
        prepare(config, tokenizer=ByteTokenizer(), chat=True)
    with pytest.raises(ConfigError, match="chat template is wrong in line 1"):
        prepare(config, tokenizer=chat_tokenizer(tmp_path / "bad", "{% for %}"), chat=True)


def test_tags_that_enclose_nothing_supervise_nothing(config, tmp_path):
    template = TAGGED.replace("m.role == 'assistant'", "m.role == 'nobody'")
    with pytest.raises(
        DataError, match=r"60 of 60 documents are unreadable .*nothing of this answer inside of its gen"
    ):
        prepare(config, tokenizer=chat_tokenizer(tmp_path / "tok", template), chat=True)


@pytest.mark.parametrize("change", ["{% filter upper %}%s{% endfilter %}", "{% filter trim %}%s{% endfilter %}"])
def test_tags_inside_of_a_filter(change, tmp_path):
    """What a filter leaves of the text is the same with and without marks, or the template is refused."""
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + change.replace(
        "%s", "{% generation %} {{ m.content }} {% endgeneration %}"
    )
    tokenizer = chat_tokenizer(tmp_path / "tok", template + "{% else %}{{ m.content }}{% endif %}{% endfor %}")
    messages = turns("a", "b")["messages"]
    if "upper" in change:
        assert tokenizer.conventions.answers(messages) == ("a B ", [(1, 4)])
        return
    with pytest.raises(ConfigError, match="changes what its generation tags enclose"):
        tokenizer.conventions.answers(messages)


def test_what_is_seldom_meant_is_warned_of(config, tmp_path):
    said = []
    template = TAGGED.replace("{{ m.content + '<|im_end|>' }}", "{{ m.content }}")
    store = prepare(config, said.append, chat_tokenizer(tmp_path / "a", template), chat=True)
    count = store.manifest["answers"]
    assert len(said) == 2 and f"Warning: {count} of {count} answers have no supervised token that ends them" in said[1]
    assert "(the base stops at '<|im_end|>')" in said[1] and store.manifest["unended_answers"] == count
    said.clear()
    template = "{% for m in messages %}{% if m.role == 'assistant' %}"
    template += "{% generation %}{{ m.content * 200 + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    prepare(config, said.append, chat_tokenizer(tmp_path / "b", template), chat=True)
    assert len(said) == 2 and said[1].startswith("Warning: 100.0% of the tokens are supervised, prompts too")


# The store


def test_masks_do_not_depend_on_parts_or_processes(config, tmp_path, monkeypatch):
    tokenizer = chat_tokenizer(tmp_path / "tok", THINKING)
    expected = contents(prepare(config, tokenizer=tokenizer, out=tmp_path / "whole", chat=True))
    monkeypatch.setattr(base, "PART_BYTES", 900)
    assert len(load_records(config, ["messages"]).parts(tmp_path)) > 5
    said = []
    store = prepare(config, said.append, tokenizer, out=tmp_path / "parts", processes=2, chat=True)
    assert contents(store) == expected
    split = store.manifest["split_conversations"]
    assert split and f"{split} of 60 conversations have a document for each answer" in said[0]
    supervised, tokens = (sum(store.manifest["splits"][s][n] for s in ("train", "valid")) for n in
                          ("supervised", "tokens"))  # fmt: skip
    assert f"{supervised:,} of the tokens are supervised ({supervised / tokens:.1%})" in said[0]


KILLED = """
import os, signal, sys
from mtp_jax.data.config import DataConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import base

if __name__ == "__main__":
    base.PART_BYTES = 900
    config = DataConfig(sys.argv[1], valid_fraction=0.2, tokenizer=sys.argv[2])
    def progress(done, total, size):
        if done == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    prepare(config, out=sys.argv[3], progress=progress, chat=True)
"""


def test_what_a_killed_process_leaves_is_continued(config, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 900)
    tokenizer = chat_tokenizer(tmp_path / "tok", THINKING)
    expected = prepare(config, tokenizer=tokenizer, out=tmp_path / "expected", chat=True)
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [sys.executable, tmp_path / "killed.py", config.files, tokenizer.name, tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(arguments, env=environment).returncode == -signal.SIGKILL
    assert len(list((tmp_path / ".out.partial" / "parts").iterdir())) >= 4
    store = prepare(config, tokenizer=tokenizer, out=tmp_path / "out", chat=True)
    assert contents(store) == contents(expected) and store.manifest == expected.manifest


def test_the_hash_covers_the_mask(config, tmp_path, monkeypatch):
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    store = prepare(config, tokenizer=tokenizer, out=tmp_path / "a", chat=True)
    rows = ChatEncoding.rows
    inverse = lambda self, messages: ([(s, i, 1 - m) for s, i, m in rows(self, messages)[0]], rows(self, messages)[1])  # noqa: E731
    monkeypatch.setattr(ChatEncoding, "rows", inverse)
    other = prepare(config, tokenizer=tokenizer, out=tmp_path / "b", chat=True)
    assert np.array_equal(store.train.tokens, other.train.tokens) and store.sha256 != other.sha256


def test_stores_made_otherwise_are_refused(config, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    prepare(config, tokenizer=tokenizer, out=tmp_path / "chat", chat=True)
    with pytest.raises(ConfigError, match=r"made with chat \{.*Give --chat and the same base"):
        prepare(config, tokenizer=chat_tokenizer(tmp_path / "llama", LLAMA), out=tmp_path / "chat", chat=True)
    other = chat_tokenizer(tmp_path / "other", CHATML, begins=True)
    with pytest.raises(ConfigError, match=r"was made with tokenizer .*asked for is"):
        prepare(config, tokenizer=other, out=tmp_path / "chat", chat=True)
    with pytest.raises(ConfigError, match=r"was made with tokenizer .*Change DataConfig.tokenizer"):
        prepare(DataConfig(f"{tmp_path}/chat", valid_fraction=0.2), tokenizer=other)
    texts = write_chats(tmp_path / "t.json", [{"text": f"{i}"} for i in range(40)])
    plain = DataConfig(str(texts), valid_fraction=0.2)
    prepare(plain, tokenizer=tokenizer, out=tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"made with chat \{.*asked for is null. Give --chat and the same base"):
        prepare(plain, tokenizer=tokenizer, out=tmp_path / "chat")
    with pytest.raises(ConfigError, match=r"made with chat null, and asked for is \{"):
        prepare(config, tokenizer=tokenizer, out=tmp_path / "plain", chat=True)
    assert not Store.open(tmp_path / "plain").masked and Store.open(tmp_path / "chat").masked


def test_a_damaged_mask_is_noticed(config, tmp_path):
    store = prepare(config, tokenizer=chat_tokenizer(tmp_path / "tok", CHATML), out=tmp_path / "out", chat=True)
    with (store.path / "train.mask.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match=r"train.mask.bin has \d+ bytes and should have"):
        Store.open(store.path)


def test_copies_of_a_conversation_lie_on_one_side(tmp_path):
    """Whatever stands beside it, and however it is written."""
    records = [turns(f"question {i}", "yes") for i in range(40)]
    copies = [{"prompt": f"question {i}", "response": "yes"} for i in range(40)]
    copies += [{"id": i, **record} for i, record in enumerate(records)]
    file = write_chats(tmp_path / "c.jsonl", [*records, *copies])
    store = prepare(DataConfig(str(file), valid_fraction=0.3), tokenizer=chat_tokenizer(tmp_path / "tok", CHATML),
                    out=tmp_path / "out", chat=True)  # fmt: skip
    sides = [{split[i].tobytes() for i in range(len(split))} for split in (store.train, store.valid)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40 and len(store.train) == 3 * len(sides[0])


def test_a_split_without_conversations_says_which_fraction_has_some(tmp_path):
    file = write_chats(tmp_path / "c.jsonl", [turns(f"q{i}", "a") for i in range(5)])
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    with pytest.raises(ConfigError, match=r"none of the 5 documents is held out .* Set it to ([\d.]+)") as caught:
        prepare(DataConfig(str(file), valid_fraction=1e-6), tokenizer=tokenizer, out=tmp_path / "out", chat=True)
    fraction = float(str(caught.value).partition("Set it to ")[2].partition(",")[0])
    store = prepare(
        DataConfig(str(file), valid_fraction=fraction), tokenizer=tokenizer, out=tmp_path / "out", chat=True
    )
    assert len(store.train) and len(store.valid)
    write_chats(file, [turns("q", "a")])
    with pytest.raises(ConfigError, match=r"none of the 1 documents is .* Give more documents"):
        prepare(DataConfig(str(file)), tokenizer=tokenizer, out=tmp_path / "one", chat=True)


@pytest.mark.parametrize("ending", ["json", "jsonl.gz", "parquet"])
def test_conversations_are_read_from_other_files(ending, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    file = tmp_path / f"c.{ending}"
    if ending == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"id": range(60), "messages": [r["messages"] for r in RECORDS], "prompt": ["x"] * 60}),
                       file, row_group_size=7)  # fmt: skip
    elif ending == "json":
        file.write_text(json.dumps(RECORDS))
    else:
        import gzip

        file.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in RECORDS).encode()))
    config = DataConfig(str(file), valid_fraction=0.2)
    store = prepare(config, tokenizer=tokenizer, out=tmp_path / "out", chat=True)
    assert found_in(store, tokenizer) == expected_of(store)


def test_files_without_records_are_refused(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"source is 'text', which has no records of messages.*give JSON lines or"):
        prepare(DataConfig(f"{tmp_path}/a.txt"), tokenizer=tokenizer, chat=True)
    file = write_chats(tmp_path / "c.jsonl", RECORDS)
    with pytest.raises(ConfigError, match=r"field is 'dialog', and of records messages, .* are read"):
        prepare(DataConfig(str(file), field="dialog"), tokenizer=tokenizer, chat=True)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"t\.parquet has none of the columns messages, .*; it has 'text'"):
        prepare(DataConfig(f"{tmp_path}/t.parquet"), tokenizer=tokenizer, chat=True)


def test_what_is_not_utf8_is_counted(tmp_path):
    lines = [json.dumps(turns(f"q{i}", f"a{i}")).encode() for i in range(30)]
    lines[3] = lines[3].replace(b"a3", b"a\xff")
    lines[4] = lines[4].replace(b"a4", b"\\ud83d")
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    tokenizer = chat_tokenizer(tmp_path / "tok", CHATML)
    config = DataConfig(f"{tmp_path}/c.jsonl", valid_fraction=0.3)
    store = prepare(config, tokenizer=tokenizer, out=tmp_path / "out", chat=True)
    assert store.manifest["replaced_characters"] == 4
    said = {run for runs in found_in(store, tokenizer).values() for run in runs}
    assert {"a\ufffd<|im_end|>", "\ufffd\ufffd\ufffd<|im_end|>"} <= said
