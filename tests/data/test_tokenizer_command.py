"""`mtp-jax tokenizer train`: of which documents it learns, what words, and what it refuses."""

import itertools
import json
import random
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from mtp_jax import cli
from mtp_jax.commands.tokenizer import END, LONGEST, bounded
from mtp_jax.data.held_out import is_held_out
from mtp_jax.data.tokenizers import load_tokenizer

HELD_OUT, TRAINING = 17, 43


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    # Words that only held-out documents have must not become tokens.
    for word, held_out, count in (("heldoutword", True, HELD_OUT), ("trainingword", False, TRAINING)):
        texts = (f"{word} {END} {i}\n" * 20 for i in itertools.count())
        fitting = (text for text in texts if is_held_out(text.encode(), 0.3) == held_out)
        for i, text in enumerate(itertools.islice(fitting, count)):
            (tmp_path / "corpus" / f"{word}{i}.txt").write_text(text)
    (tmp_path / "corpus" / "empty.txt").write_text("")
    return ["--source", f"{tmp_path}/corpus/*.txt", "--valid-fraction", "0.3"]


def command(*args):
    cli.main(["tokenizer", "train", *map(str, args)])


def test_a_tokenizer_is_made_of_the_training_documents(corpus, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    command(*corpus, "--vocab-size", 300, "--out", first)
    (line,) = capsys.readouterr().out.splitlines()
    size = sum(file.stat().st_size for file in tmp_path.glob("corpus/trainingword*.txt"))
    assert re.fullmatch(
        rf"Trained on {TRAINING} documents of {size:,} bytes: 300 tokens, \d\.\d\d bytes per token on {HELD_OUT} "
        rf"held-out documents, in {first}",
        line,
    )
    command(*corpus, "--vocab-size", 300, "--out", second)
    assert first.read_bytes() == second.read_bytes()
    tokenizer = load_tokenizer(f"hf:{first}")
    assert tokenizer.vocab_size == 300 and tokenizer.to_json()["end_of_document"] == END
    tokens = [tokenizer.decode_bytes([i]) for i in range(300)]
    assert b"trainingword" in tokens and not any(b"held" in token for token in tokens)
    assert {bytes([i]) for i in range(256)} < set(tokens)

    command(*corpus, "--vocab-size", 10_000, "--out", tmp_path / "all.json")
    assert "of 10,000: the documents hold no more" in capsys.readouterr().out


WORDS = ["".join(random.Random(i).choices("ACGT", k=LONGEST)) for i in range(8)]
LONG_WORDS = {
    "DNA": "".join(WORDS * 20),
    "digits": "0123456789" * 500,
    "rulers and minified code": ("=" * 3000) + "_-" * 2000 + "function(){};" * 200,
    "blank lines": "\n" * 4000 + "text" + " " * 4000,
    "no spaces between words": "".join(chr(0x4E00 + i % 3000) for i in range(9000)),
    "marks": "\u0301" * 3000,
}


@pytest.mark.parametrize("name", LONG_WORDS)
def test_words_that_are_learned_are_short(name):
    """By GPT-2's own pattern, of which each piece is a word."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = list(bounded(LONG_WORDS[name]))
    assert "".join(pieces) == LONG_WORDS[name]
    whole, cut = (
        max(end - begin for piece in found for _, (begin, end) in gpt2.pre_tokenize_str(piece))
        for found in ([LONG_WORDS[name]], pieces)
    )
    assert whole > LONGEST and cut <= LONGEST + 1  # a space goes in front


@given(st.text(st.sampled_from("ab1 _-.\n\t\u0301漢é"), max_size=600))
def test_text_of_short_words_is_learned_as_it_is(text):
    longest = max((len(m[0]) for m in re.finditer(r"[^\W_]+|\s+|(?:[^\w\s]|_)+", text)), default=0)
    assert longest > LONGEST or list(bounded(text)) == [text]


def test_a_word_of_any_length_is_learned_in_pieces_and_a_line_says_so(tmp_path, capsys):
    (tmp_path / "dna.txt").write_text("@".join("".join(WORDS[i % 8 :] * 12) for i in range(40)))
    source = ["--source", tmp_path / "dna.txt", "--separator", "@", "--valid-fraction", 0.2]
    command(*source, "--vocab-size", 300, "--out", tmp_path / "dna.json")
    _, cuts = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Words of more than 256 characters, .* in pieces of 256: [\d,]+ cuts\.", cuts)
    tokenizer = load_tokenizer(f"hf:{tmp_path}/dna.json")
    assert len(tokenizer.encode(LONG_WORDS["DNA"].encode())) < len(LONG_WORDS["DNA"]) / 2
    made = json.loads((tmp_path / "dna.json").read_text())
    assert made["pre_tokenizer"]["type"] == "ByteLevel", "what it encodes it encodes whole, as any other tokenizer"


def test_what_cannot_be_made_is_refused(corpus, tmp_path, capsys):
    (tmp_path / "there.json").write_text("mine")
    for options, message in (
        (["--vocab-size", 256, "--out", tmp_path / "new.json"], "--vocab-size is 256; it must be at least 257"),
        (["--vocab-size", 300, "--out", tmp_path / "there.json"], "exists; delete it"),
        (["--vocab-size", 300, "--out", tmp_path / "no/new.json"], "is no directory; make it first"),
        (["--vocab-size", 300, "--out", tmp_path / "new.json", "--valid-fraction", 1 - 1e-9], "has no documents"),
        (["--vocab-size", 300, "--out", tmp_path / "new.json", "--source", "texts"], "did you mean 'text'"),
    ):
        with pytest.raises(SystemExit):
            command(*corpus, *options)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists() and (tmp_path / "there.json").read_text() == "mine"
    with pytest.raises(SystemExit):
        cli.main(["tokenizer", "trane"])
    assert "did you mean 'train'" in capsys.readouterr().err
    cli.main(["tokenizer"])
    assert "usage: mtp-jax tokenizer train" in capsys.readouterr().out


def test_the_command_needs_no_jax_compilation(corpus, tmp_path):
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", lambda *args, **options: pytest.fail("compiled"))
        command(*corpus, "--vocab-size", 257, "--out", tmp_path / "bytes.json")
    assert load_tokenizer(f"hf:{tmp_path}/bytes.json").vocab_size == 257
