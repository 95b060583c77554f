"""SmolLM2-135M-Instruct, which people have: both ways in give one model, and its answers are those of `transformers`.

$MTP_JAX_TEST_SMOLLM2 names a directory with model.gguf and, in hf/, the same weights for transformers;
$MTP_JAX_TEST_PROMPTS a file of JSON lines with `messages`, of which the first 20 are asked in place of those below.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.interop.importing import import_run
from mtp_jax.state import split
from support.bpe import NASTY
from support.pretrained import published

pytestmark = pytest.mark.slow

NEW, TIE = 64, 1e-4
ASKED = [
    "What is the capital of France?",
    "Write a haiku about autumn.",
    "Write a Python function that reverses a string.",
    "Explain photosynthesis to a child of ten.",
    "List three uses of a paper clip.",
    "Translate 'good morning' into Spanish, French and German.",
    "What is 17 * 23? Show your steps.",
    "Summarise: The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Fix this: `for i in range(10) print(i)`",
    "Who wrote 'Pride and Prejudice', and when?",
    "Continue: 1, 1, 2, 3, 5, 8,",
    "Is a tomato a fruit?\n\nAnswer in one word.",
    "¿Qué es un agujero negro?",
    "日本の首都はどこですか。",
    "Write an email that declines an invitation, politely.",
    "Sort these words: pear, Apple, fig, 10, 9.",
    "What does `SELECT COUNT(*) FROM users;` do?",
    "Tell me a joke about mathematicians 🙂",
]


def questions():
    file = os.environ.get("MTP_JAX_TEST_PROMPTS")
    if not file:
        return [[{"role": "user", "content": text}] for text in ASKED]
    return [json.loads(line)["messages"] for line in Path(file).read_text().splitlines()[:20]]


@pytest.fixture(scope="module")
def smol():
    return published("MTP_JAX_TEST_SMOLLM2")


@pytest.fixture(scope="module")
def run(smol, tmp_path_factory):
    return mtp_jax.load(import_run(str(smol / "hf"), tmp_path_factory.mktemp("smollm2") / "run"))


def test_both_ways_in_give_the_same_model(smol, run, tmp_path):
    pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'mtp_jax[gguf]'")
    other = mtp_jax.load(import_run(str(smol / "model.gguf"), tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, split(run.model)[1], split(other.model)[1])
    assert run.config.model == other.config.model
    for text in [*NASTY, *ASKED, "<|im_start|>user\nHi<|im_end|>\n"]:
        for read in ("encode", "encode_special"):
            ids = getattr(run.tokenizer, read)(text).tolist()
            assert ids == getattr(other.tokenizer, read)(text).tolist(), text
            assert run.tokenizer.decode(ids) == other.tokenizer.decode(ids)
    ours, theirs = run.tokenizer.conventions, other.tokenizer.conventions
    assert (ours.bos, ours.stops) == (theirs.bos, theirs.stops)
    for messages in questions():
        assert ours.render(messages) == theirs.render(messages)


def test_answers_are_those_of_transformers(smol, run):
    torch = pytest.importorskip("torch", reason="the other side is transformers on torch")
    transformers = pytest.importorskip("transformers", reason="the other side is transformers on torch")
    torch.set_num_threads(1)  # a step is so short that threads would wait for each other
    model = transformers.AutoModelForCausalLM.from_pretrained(smol / "hf", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smol / "hf")
    prompts, answers = [], []
    for messages in questions():
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run.tokenizer.conventions.render(messages) == text
        prompts.append(run.encode(text, special=True))
        assert prompts[-1].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(prompts[-1][None].astype(np.int64))
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        answers.append(out[0, ids.shape[1] :].numpy())
    found = run.generate_tokens(prompts, max_new_tokens=NEW, temperature=0.0).tokens
    ties, gaps = 0, []
    for prompt, ours, theirs in zip(prompts, found, answers, strict=True):
        shared = min(len(ours), len(theirs))
        differ = np.flatnonzero(ours[:shared] != theirs[:shared])
        if not len(differ):
            assert len(ours) == len(theirs)
            continue
        before = np.concatenate([prompt, theirs[: differ[0]]]).astype(np.int64)
        with torch.inference_mode():
            best = model(torch.tensor(before[None])).logits[0, -1].topk(2).values
        gaps.append(float(best[0] - best[1]))
        ties += gaps[-1] < TIE
    print(
        f"{len(prompts) - len(gaps)} of {len(prompts)} answers are equal token for token; {ties} part at a tie; {gaps}"
    )
    assert ties == len(gaps)
