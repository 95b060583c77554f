"""Tokenizers of GGUF files: rebuilt from what the file says, they read and write text as the model's own does."""

import io
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtp_jax
from mtp_jax.commands.tokenizer import train_bpe
from mtp_jax.interop.importing import import_run
from support.bpe import BPE, NASTY, SPLITS, TEXTS
from support.gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Vocabulary, write_gguf
from support.pretrained import CONFIG, weights_of

pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'mtp_jax[gguf]'")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PADDING = 5


def imported(folder, vocabulary):
    config = {**CONFIG, "vocab_size": len(vocabulary.tokens)}
    file = write_gguf(folder / "model.gguf", weights_of(config), config=config, vocabulary=vocabulary)
    return mtp_jax.load(import_run(str(file), folder / "run"))


@pytest.fixture(scope="module")
def bpe():
    """A vocabulary and its merges: numbers of several digits, and a word that no merges make."""
    model = json.loads(train_bpe(iter(TEXTS), 480))["model"]
    words = [word for word in sorted(model["vocab"], key=model["vocab"].get) if word not in SPECIAL]
    assert any(word.isdigit() and len(word) > 1 for word in words)
    return [*words, "Ġquagga"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module", params=SPLITS)
def byte_level(request, bpe, tmp_path_factory):
    """(a run, the same in plain Python)"""
    words, merges = bpe
    tokens = [*words, "<tool>", *SPECIAL, *(f"[PAD{i}]" for i in range(PADDING))]
    types = [NORMAL] * len(words) + [USER] + [CONTROL] * len(SPECIAL) + [UNUSED] * PADDING
    ids = dict(eos_token_id=tokens.index("<|endoftext|>"), eot_token_id=tokens.index("<|im_end|>"))
    joined = [" ".join(pair) for pair in merges]
    vocabulary = Vocabulary(tokens, types, joined, pre=request.param, ids=ids)
    theirs = BPE({token: i for i, token in enumerate(tokens)}, merges, request.param, ["<tool>"], SPECIAL)
    return imported(tmp_path_factory.mktemp("model"), vocabulary), theirs


def agrees(byte_level, text):
    run, theirs = byte_level
    ids = run.tokenizer.encode(text)
    assert ids.tolist() == theirs.encode(text)
    assert run.tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if theirs.pre == "qwen2" else text)
    assert run.tokenizer.encode_special(text).tolist() == theirs.encode(text, special=True)
    assert not set(ids.tolist()) & {theirs.vocab[token] for token in SPECIAL}


def test_byte_level_text_is_cut_and_merged_as_published(byte_level):
    for text in [*NASTY, "<tool>x <tool> y", "a<|im_start|>user\nHi<|im_end|>\n<|im_start|>", "[PAD1]"]:
        agrees(byte_level, text)


ALPHABET = "abzé 日🙂'sSdl1٣½\n\r\t.,_<|>-\u0301\u00a0"


@settings(max_examples=200)
@given(st.text(st.sampled_from(ALPHABET), max_size=24))
def test_any_text_is(byte_level, text):
    agrees(byte_level, text)


def test_what_pads_the_table_is_no_token(byte_level):
    run, theirs = byte_level
    assert run.tokenizer.vocab_size == len(theirs.vocab) - PADDING == run.config.model.num_tokens
    kept = run.tokenizer.conventions
    assert kept.bos is None and [theirs.vocab[token] for token in (SPECIAL[0], SPECIAL[2])] == list(kept.stops)


# SentencePiece


def train(**options):
    """A processor of SentencePiece: BPE, as Llama 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    common = dict(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=480, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(**{**common, **options})
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def with_pieces(processor, *pieces):
    """The same with more pieces, likelier than all others."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.5)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def vocabulary_of(processor, **ids):
    def kind(i):
        kinds = {UNKNOWN: processor.is_unknown, CONTROL: processor.is_control, BYTE: processor.is_byte}
        return next((of for of, asks in kinds.items() if asks(i)), UNUSED if processor.is_unused(i) else NORMAL)

    every = range(processor.get_piece_size())
    tokens, scores = [processor.id_to_piece(i) for i in every], [processor.get_score(i) for i in every]
    ids = dict(bos_token_id=1, eos_token_id=2) | ids
    return Vocabulary(tokens, [kind(i) for i in every], scores=scores, model="llama", ids=ids)


PROCESSORS = {
    "llama 2": (lambda: train(), {}),
    "no space in front": (lambda: train(add_dummy_prefix=False), dict(add_space_prefix=False, add_bos_token=False)),
    "numbers": (lambda: train(split_digits=False, split_by_whitespace=False), dict(add_bos_token=True)),
    "no bytes": (lambda: train(byte_fallback=False, vocab_size=200, character_coverage=0.99), {}),
    # Pieces that could be put together to what is no text.
    "parts of control tokens": (
        lambda: with_pieces(train(), *"</>k", "</", "<s", "</s", "<u", "<un", "<unk", "<0", "<0x", "<0x4", "<0x41"),
        {},
    ),
}


@pytest.fixture(scope="module", params=PROCESSORS)
def sentence_piece(request, tmp_path_factory):
    """(a run, SentencePiece itself)"""
    make, ids = PROCESSORS[request.param]
    processor = make()
    return imported(tmp_path_factory.mktemp("model"), vocabulary_of(processor, **ids)), processor


def is_sentence_piece(sentence_piece, text):
    run, processor = sentence_piece
    ids, theirs = run.tokenizer.encode(text).tolist(), processor.encode(text)
    assert ids == theirs
    if processor.unk_id() not in theirs:
        assert run.tokenizer.decode(ids) == processor.decode(theirs)


def test_sentence_piece_reads_text_as_its_own_library(sentence_piece):
    for text in NASTY:
        is_sentence_piece(sentence_piece, text)


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab <>s/u nk0x41'\n▁é🙂12"), max_size=24))
def test_sentence_piece_reads_any_text_as_its_own_library(sentence_piece, text):
    is_sentence_piece(sentence_piece, text)


def test_sentence_piece_begins_with_bos_if_nothing_is_said(sentence_piece, request):
    run, processor = sentence_piece
    begins = request.node.callspec.params["sentence_piece"] != "no space in front"
    assert run.tokenizer.conventions.bos == (1 if begins else None) and run.tokenizer.conventions.stops == (2,)
    assert run.encode("a b").tolist() == [1] * begins + processor.encode("a b")
    # A text behind a special token is one of its own, as llama.cpp has it.
    assert run.encode("<s>a b</s>c", special=True).tolist() == [1, *processor.encode("a b"), 2, *processor.encode("c")]
    np.testing.assert_array_equal(run.tokenizer.encode_special("a b"), processor.encode("a b"))
