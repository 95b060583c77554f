"""Tokenizers with a chat template, and conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.data.store import Documents
from mtp_jax.data.tokenizers import HFTokenizer, load_tokenizer
from mtp_jax.data.tokenizers.conventions import FILE, Conventions

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<file>")
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{- bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\n"
    "{% generation %}\n{{ m.content + '<|im_end|>' }}\n{%- endgeneration %}\n{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What was thought is not in earlier turns, once others follow.
THINKING = (
    "{% for m in messages %}{% set said = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{{ said }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED_THINKING = THINKING.replace(
    "{{ said }}{{ '<|im_end|>\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ said }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ said }}{{ '<|im_end|>\n' }}{% endif %}",
)
# A space behind the colon, which becomes a token with the answer's first letter.
MERGING = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MERGES = [("Ġ", "h"), ("h", "e"), ("l", "l"), ("Ġh", "e"), ("!", "Ċ")]


def chat_tokenizer(
    directory: Path, template: str, *, begins: bool = False, stops: Sequence[str] = ("<|im_end|>",), **special: str
) -> HFTokenizer:
    """A byte-level BPE of a few merges in `directory`, with its conventions. `begins`: a text begins with `<s>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in MERGES:
        vocab.setdefault("".join(pair), len(vocab))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    # Without its expression, so that what is said and a newline behind it can be one token.
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    directory.mkdir(parents=True, exist_ok=True)
    tok.save(str(directory / "tokenizer.json"))
    ids = {text: len(vocab) + i for i, text in enumerate(SPECIAL)}
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", **special}
    found = Conventions(ids["<s>"] if begins else None, tuple(ids[stop] for stop in stops), template, special)
    (directory / FILE).write_bytes(found.to_bytes())
    loaded = load_tokenizer(f"hf:{directory}")
    assert isinstance(loaded, HFTokenizer) and all(loaded.special[text] == id for text, id in ids.items())
    return loaded


def turns(*texts: str, system: str = "") -> dict[str, Any]:
    """A record of messages: a user's and an assistant's in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def write_chats(file: Path, records: Sequence[Any]) -> Path:
    """As JSON lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def spelt(ids: np.ndarray, tokenizer: HFTokenizer) -> str:
    """Ids as text, with special tokens."""
    names = {id: text.encode() for text, id in tokenizer.special.items()}
    return b"".join(names.get(id) or tokenizer.decode_bytes([id]) for id in ids.tolist()).decode()


def supervised(documents: Documents, tokenizer: HFTokenizer) -> dict[str, list[str]]:
    """What of each document is supervised: the texts of its runs, by its name."""
    assert documents.mask is not None
    found = {}
    for i, name in enumerate(documents.names):
        mask = documents.mask_of(i)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        found[name] = [spelt(documents[i][a:b], tokenizer) for a, b in edges.reshape(-1, 2)]
    return found


ANSWERS = ["hello!", "yes,\nof course 🙂", "no", "he said: hello\n\nhe!", "naïve he", "x", "<think>hm</think>so"]


def record(i: int, count: int | None = None) -> dict[str, Any]:
    """Conversation `i`, of one to three answers, all different."""
    count = count or i % 3 + 1
    texts = [
        text
        for j in range(count)
        for text in (f"question {i}.{j}: hello?", f"{ANSWERS[(i + j) % len(ANSWERS)]} {i}.{j}")
    ]
    return turns(*texts, system="Be brief" * (i % 2))


RECORDS = [record(i) for i in range(60)]


def answers(record: dict[str, Any]) -> list[str]:
    """What the assistant says in a record."""
    return [message["content"] for message in record["messages"] if message["role"] == "assistant"]
