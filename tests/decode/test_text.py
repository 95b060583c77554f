"""Text: how it is cut at stop strings."""

import numpy as np
import pytest

from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.decode import text
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Decoding
from mtp_jax.decode.text import continue_text, find_stop, held_back
from mtp_jax.validate import ConfigError
from support.decoding import VOCAB


class Letters(Tokenizer):
    """A tokenizer: id i is one letter, or, for every fourth, two."""

    name, vocab_size, end_of_document = "letters", VOCAB, 0

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) - 64

    def decode_bytes(self, ids):
        return b"".join(bytes([64 + i, 64 + i]) if i % 4 == 0 else bytes([64 + i]) for i in np.asarray(ids).tolist())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2}], ids=["greedy", "coupled"])
def test_text_is_cut_at_the_first_stop_string(model, options):
    texts, config = ["EAI", "DZZZ", "C", "GT" * 8], DecodeConfig(max_new_tokens=64, **options)
    whole = continue_text(model, Letters(), texts, config)
    assert all(len(string) >= 64 for string in whole)
    rng = np.random.default_rng(0)
    for _ in range(6):
        begins = [(row, int(rng.integers(0, 60)), int(rng.integers(1, 4))) for row in rng.integers(0, 4, 2)]
        stops = [whole[row][begin : begin + length] for row, begin, length in begins]
        out = continue_text(model, Letters(), texts, config, stops)
        for string, got in zip(whole, out, strict=True):
            ends = [(string.find(s) + len(s), string.find(s)) for s in stops if s in string]
            assert got == string[: min(ends)[1] if ends else None]
    assert continue_text(model, Letters(), texts, config, whole[2][5:9])[2] == whole[2][: whole[2].find(whole[2][5:9])]


def test_decoding_stops_soon_behind_a_stop_string(model, monkeypatch):
    forwards, advance, config = [], Decoding.advance, DecodeConfig(max_new_tokens=96, k=0)
    monkeypatch.setattr(Decoding, "advance", lambda self, most: forwards.append(most) or advance(self, most))
    whole = continue_text(model, Letters(), ["EAI"], config)[0]
    forwards.clear()
    continue_text(model, Letters(), ["EAI"], config, whole[:2])
    assert forwards == [text.FORWARDS]
    with pytest.raises(ConfigError, match="stop is ''; an empty string"):
        continue_text(model, Letters(), ["EAI"], config, "")


def test_the_stop_string_that_is_complete_first_counts():
    assert find_stop(b"xabcd", [b"abcd", b"bc"]) == 2
    assert find_stop(b"xabc", [b"bc", b"abc"]) == 1  # complete at one byte: the longest
    assert find_stop(b"xab", [b"abc"]) is None and held_back(b"xab", [b"abc", b"b!"]) == 2
    assert held_back(b"aab", [b"aac"]) == 0 and held_back(b"a", []) == 0
