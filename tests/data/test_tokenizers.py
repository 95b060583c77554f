"""Tokenizers: what they promise, by kind; what files decide; the end of documents; the command that makes one."""

import dataclasses
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtp_jax
from mtp_jax import cli
from mtp_jax.commands.tokenizer import train_bpe
from mtp_jax.config import OptimizerConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.tokenizers import HFTokenizer, SentencePieceTokenizer, load_tokenizer, utf8
from mtp_jax.data.tokenizers.hf import byte_alphabet
from mtp_jax.runs.layout import clear_run, run_tokenizer
from mtp_jax.train import loop
from mtp_jax.validate import ConfigError
from support import REPOSITORY, tiny
from support.compilation import quick

STORIES = REPOSITORY.parent / "shared/data/stories260K/tokenizer.json"
TEXTS = [f"The {i}th of the small texts, naïve and héllo 🙂.\n" for i in range(50)]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def bpe():
    """The `tokenizer.json` of a byte-level BPE."""
    return train_bpe(iter(TEXTS), 320)


@pytest.fixture(scope="module")
def model():
    """The model file of a SentencePiece tokenizer with byte fallback, a control and a user-defined symbol."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **dict(sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=320, hard_vocab_limit=False),
        **dict(byte_fallback=True, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False),
        **dict(control_symbols=["<end>"], user_defined_symbols=["<user>"]),
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def tokenizers(bpe, model):
    found = {"bytes": load_tokenizer("bytes"), "hf": HFTokenizer(bpe), "sentencepiece": SentencePieceTokenizer(model)}
    return found | ({"stories": HFTokenizer(STORIES.read_bytes())} if STORIES.exists() else {})


def changed(bpe, **changes):
    """The file with other values."""
    return json.dumps({**json.loads(bpe), **changes}).encode()


def added(content, id, special=True):
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"id": id, "content": content, "special": special, **flags}


# What all promise

KINDS = ["bytes", "hf", "sentencepiece", "stories"]


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    if request.param not in tokenizers:
        pytest.skip("stories260K is not here")
    return tokenizers[request.param]


def test_text_survives(tokenizer):
    for text in [*TEXTS[:3], "Once upon a time 🙂", f"a {END}</s> b", "", "  two  spaces ", "\ttab\nline"]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and (ids >= 0).all() and (ids < tokenizer.vocab_size).all()
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_document not in ids
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)


def test_parts_joined_are_the_whole(tokenizer):
    """A streamed continuation is what it would be at once, whatever the tokens are cut at."""
    ids = tokenizer.encode("Once upon a time 🙂 there was, naïve.")
    whole = tokenizer.decode_bytes(ids)
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == whole
    assert whole.decode().removeprefix(" ") == tokenizer.decode(ids)


def test_a_batch_is_one_after_the_other(tokenizer):
    texts = [text.encode() for text in [*TEXTS[:5], ""]]
    batch = tokenizer.encode_batch(texts)
    assert len(batch) == 6
    for ids, text in zip(batch, texts, strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_special_and_unknown_ids_stand_for_nothing(tokenizer):
    ids = [*tokenizer.encode("hi")]
    odd = [-1, tokenizer.end_of_document, tokenizer.vocab_size, 10**9]
    assert tokenizer.decode_bytes([*odd, *ids, *odd]) == tokenizer.decode_bytes(ids)
    assert tokenizer.decode([*odd, *ids, *odd]) == "hi"
    assert tokenizer.decode_bytes([]) == b"" and tokenizer.decode([]) == ""


def test_what_is_not_utf8_is_kept_or_counted(tokenizer):
    text = b"a\xffb\xc3\xef\xbf\xbd"
    kept = tokenizer.name == "bytes"
    assert tokenizer.replaced(text) == (0 if kept else 2) and tokenizer.replaced(b"abc\xef\xbf\xbd") == 0
    assert tokenizer.decode_bytes(tokenizer.encode(text)).removeprefix(b" ") == (
        text if kept else "a\ufffdb\ufffd\ufffd".encode()
    )
    np.testing.assert_array_equal(tokenizer.encode("a\udcff"), tokenizer.encode(b"a\xff"))


def test_a_copy_of_its_files_is_the_same_tokenizer(tokenizer, tmp_path):
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    kind = tokenizer.name
    copy = load_tokenizer(f"{kind}:{tmp_path}" if tokenizer.files() else kind)
    assert copy.to_json() == tokenizer.to_json() == json.loads(json.dumps(tokenizer.to_json()))
    assert str(tmp_path) not in json.dumps(copy.to_json())
    assert copy.vocab_size == tokenizer.vocab_size and copy.end_of_document == tokenizer.end_of_document


# Any text, any bytes


@given(st.binary())
def test_bytes_keep_any_bytes(data):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.decode_bytes(tokenizer.encode_batch([data])[0]) == data


@settings(max_examples=300)
@given(
    st.lists(st.one_of(st.text(), st.sampled_from([END, "</s>", "<|", "endoftext", " ", "\r\n", "\0"]))).map("".join)
)
def test_a_byte_level_bpe_keeps_any_text(tokenizers, text):
    tokenizer = tokenizers["hf"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.end_of_document not in ids


@given(st.binary(), st.binary())
def test_replacements_are_counted(before, after):
    text, count = utf8(before + after)
    assert text == (before + after).decode("utf-8", "replace")
    assert (count == 0) == (text.encode() == before + after)


def test_the_alphabet_is_that_of_gpt2():
    from tokenizers import pre_tokenizers

    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["Ġ"] == ord(" ") and alphabet["Ċ"] == ord("\n") and alphabet["A"] == ord("A")


# What a file may ask for and does not get


def test_nothing_is_cut_off_padded_or_left_to_chance(bpe):
    """A tokenizer.json may hold the settings of some training that went before."""
    values = json.loads(bpe)
    other = changed(
        bpe,
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            **dict(strategy={"Fixed": 64}, direction="Right", pad_to_multiple_of=None),
            **dict(pad_id=0, pad_type_id=0, pad_token=END),
        },
        model={**values["model"], "dropout": 0.5},
    )
    np.testing.assert_array_equal(HFTokenizer(other).encode(TEXTS[0]), HFTokenizer(bpe).encode(TEXTS[0]))


def test_tokens_put_in_as_text_are_decoded_as_text(bpe):
    end, size = json.loads(bpe)["added_tokens"], HFTokenizer(bpe).vocab_size
    tokenizer = HFTokenizer(changed(bpe, added_tokens=[*end, added("é ü", size, special=False)]))
    ids = tokenizer.encode("aé üb")
    assert size in ids and tokenizer.vocab_size == size + 1
    assert tokenizer.decode(ids) == "aé üb"


# The end of documents


def test_the_end_of_documents_can_be_named(bpe, model):
    end, size = json.loads(bpe)["added_tokens"], HFTokenizer(bpe).vocab_size
    several = changed(bpe, added_tokens=[*end, added("<|turn|>", size), added("<|word|>", size + 1, special=False)])
    assert HFTokenizer(several).end_of_document == 0
    assert HFTokenizer(several, "<|turn|>").end_of_document == size
    assert HFTokenizer(several, "<|turn|>").to_json() != HFTokenizer(several).to_json()
    # The file has it as a word; documents may have it as one too.
    word = HFTokenizer(several, "<|word|>")
    assert word.end_of_document == size + 1 not in word.encode("a<|word|>b")
    assert word.decode(word.encode("a<|word|>b")) == "a<|word|>b"
    with pytest.raises(ConfigError, match=r"'<\|tunr\|>' and the tokenizer 'hf' has no such .* mean '<\|turn\|>'\?"):
        HFTokenizer(several, "<|tunr|>")

    assert SentencePieceTokenizer(model).to_json()["end_of_document"] == "</s>"
    named = SentencePieceTokenizer(model, "<end>")
    assert named.to_json()["end_of_document"] == "<end>" and named.end_of_document not in named.encode("a<end>b")
    with pytest.raises(ConfigError, match=r"is '<user>' and the tokenizer .* It has '</s>', '<end>', '<s>'\."):
        SentencePieceTokenizer(model, "<user>")
    with pytest.raises(ConfigError, match=r"'</s>' and the tokenizer is 'bytes', .* Leave end_of_document empty"):
        load_tokenizer("bytes", "</s>")


def test_an_end_that_is_not_plain_is_asked_for(bpe):
    values = json.loads(bpe)
    vocab = {{END: "<|other|>"}.get(token, token): id for token, id in values["model"]["vocab"].items()}
    other = changed(bpe, added_tokens=[added("<|other|>", 0)], model={**values["model"], "vocab": vocab})
    with pytest.raises(ConfigError, match=r"end_of_document is empty .* one of its special tokens: '<\|other\|>'\."):
        HFTokenizer(other)
    assert HFTokenizer(other, "<|other|>").end_of_document == 0


def test_an_end_that_text_can_say_is_refused():
    """A vocabulary of words that has the end as one of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tok = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens(["</s>"])
    with pytest.raises(ConfigError, match=r"'</s>' and the tokenizer 'hf' reads it in text too"):
        HFTokenizer(tok.to_str().encode())


def test_an_end_among_the_pieces_of_a_unigram_is_refused():
    from tokenizers import Tokenizer, models

    tok = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    tok.add_special_tokens(["</s>"])
    with pytest.raises(ConfigError, match=r"reads it in text too.*'sentencepiece:PATH'"):
        HFTokenizer(tok.to_str().encode())


def make(model, pre_tokenizer, decoder, **options):
    from tokenizers import Tokenizer

    tok = Tokenizer(model)
    tok.pre_tokenizer, tok.decoder = pre_tokenizer, decoder
    trainer = model.get_trainer()
    for name, value in {"special_tokens": ["<unk>", "</s>"], "show_progress": False, **options}.items():
        setattr(trainer, name, value)
    tok.train_from_iterator(TEXTS, trainer)
    return HFTokenizer(tok.to_str().encode())


def test_other_decoders_stream_as_well():
    """They trim at the ends of what they decode, and each token alone has ends."""
    from tokenizers import decoders, models, pre_tokenizers

    text, space = "the small texts of 3", pre_tokenizers.Whitespace()
    for tokenizer, streamed in (
        (make(models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), decoders.Metaspace()), b" " + text.encode()),
        (make(models.WordPiece(unk_token="<unk>"), space, decoders.WordPiece()), b" " + text.encode()),
        (
            make(models.BPE(), pre_tokenizers.ByteLevel(False), decoders.Sequence([decoders.ByteLevel()])),
            text.encode(),
        ),
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == tokenizer.decode_bytes(ids) == streamed


def test_stories260k():
    if not STORIES.exists():
        pytest.skip("stories260K is not here")
    tokenizer = load_tokenizer(f"hf:{STORIES}")
    assert tokenizer.vocab_size == 512 and tokenizer.end_of_document == 2
    # The ids that its model was trained on, without the <s> in front.
    assert tokenizer.encode("Once upon a time").tolist() == [403, 407, 261, 378]
    assert tokenizer.decode_bytes([403, 407]) == b" Once upon" and tokenizer.decode([403, 407]) == "Once upon"
    assert tokenizer.decode_bytes(tokenizer.encode("🙂")[-4:]) == "🙂".encode()


# Mistakes


def test_files_that_are_missing_or_something_else_are_refused(tmp_path, model, bpe, monkeypatch):
    (tmp_path / "tokenizer.json").write_bytes(model)
    (tmp_path / "tokenizer.model").write_bytes(bpe)
    for name, message in {
        "hf": r"is 'hf'; give the path of its file too, such as 'hf:models/tokenizer.json'",
        f"hf:{tmp_path}/none.json": r"none.json cannot be read \(FileNotFoundError\)\. Give the path of a",
        f"hf:{tmp_path}": r"is not a tokenizer.json of Hugging Face: .* 'sentencepiece:PATH'",
        f"sentencepiece:{tmp_path}/none": r"none cannot be read .* Give the path of a tokenizer.model",
        f"sentencepiece:{tmp_path}": r"is not a model of SentencePiece. A tokenizer.json is named 'hf:PATH'",
        "hff:x": r"is 'hff'; did you mean 'hf'\? It can be bytes, hf, sentencepiece",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(name)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'mtp_jax[sentencepiece]'")):
        load_tokenizer(f"sentencepiece:{tmp_path}")


# Stores and runs


@pytest.fixture
def quick_compilation():
    """Faster code would take longer to compile."""
    with quick():
        yield


@pytest.fixture
def config(tmp_path, bpe):
    """A run of two steps on 40 small files, with a tokenizer.json of 320 tokens."""
    (tmp_path / "corpus").mkdir()
    for i, text in enumerate(TEXTS[:40]):
        (tmp_path / "corpus" / f"{i}.txt").write_text(text * 3)
    (tmp_path / "tokenizer.json").write_bytes(bpe)
    data = DataConfig(f"{tmp_path}/corpus/*.txt", tokenizer=f"hf:{tmp_path}/tokenizer.json", valid_fraction=0.2)
    data = dataclasses.replace(data, batch_size=8, seq_len=16, cache_dir=f"{tmp_path}/cache")
    config = tiny.train_config(
        tiny.model_config(vocab_size=320, num_layers=1), tiny.head_config(window=2, rank=2), steps=2
    )
    return dataclasses.replace(
        config, data=data, optimizer=OptimizerConfig(warmup_steps=0), eval_every=2, checkpoint_every=2, log_every=1
    )


def test_a_store_does_not_depend_on_where_the_file_is(config, tmp_path):
    store = prepare(config.data)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "other.json")
    other = prepare(dataclasses.replace(config.data, tokenizer=f"hf:{tmp_path}/other.json"))
    assert other.sha256 == store.sha256 and other.manifest["tokenizer"] == store.manifest["tokenizer"]
    tokenizer = load_tokenizer(config.data.tokenizer)
    for i, name in enumerate(store.train.names):
        assert store.train[i][-1] == tokenizer.end_of_document
        assert tokenizer.decode(store.train[i]) == (tmp_path / "corpus" / name).read_text()


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(config, tmp_path, capsys, quick_compilation):
    run_dir, file = tmp_path / "run", tmp_path / "tokenizer.json"
    loop.train(config, run_dir)
    assert (run_dir / "tokenizer" / "tokenizer.json").read_bytes() == file.read_bytes()
    file.unlink()
    moved = run_dir.rename(tmp_path / "moved")
    run = mtp_jax.load(moved)
    assert run.tokenizer.to_json() == run.meta["tokenizer"] and run.meta["tokenizer"]["name"] == "hf"
    cli.main(["generate", str(moved), "--held-out", "1", "--prompt-tokens", "4", "--max-new-tokens", "4"])
    assert "forwards after prefill" in capsys.readouterr().out
    loop.train(dataclasses.replace(config, steps=3), moved, resume=True)
    assert mtp_jax.load(moved).step == 3
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot be read"):
        loop.train(config, tmp_path / "another")
    with pytest.raises(ConfigError, match=r"--resume: data.end_of_document is '<\|endoftext\|>' and the run in"):
        data = dataclasses.replace(config.data, end_of_document=END)
        loop.train(dataclasses.replace(config, data=data), moved, resume=True)

    # Its copy is held to what the checkpoints say.
    copy = moved / "tokenizer" / "tokenizer.json"
    copy.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="was trained with the tokenizer"):
        mtp_jax.load(moved)
    clear_run(moved)
    assert list(moved.iterdir()) == []


def test_a_directory_without_a_copy_takes_what_the_config_names(config, tmp_path):
    assert run_tokenizer(tmp_path, config).name == config.data.tokenizer


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(config, tmp_path):
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    with pytest.raises(ConfigError, match=r"vocab_size is 300 and the tokenizer 'hf:.*' has 320 tokens; set .* 320 or"):
        loop.train(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()
