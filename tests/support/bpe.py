"""Byte-level BPE in plain Python, from the published pre-tokenizers: what a tokenizer of a library must agree with."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TEXTS = [
    *(f"The {i}th of the small texts, naïve and héllo 🙂: {i * 37}, {2000 + i}.\n" for i in range(40)),
    *("It's what they're for; we'll see, I'VE said 12345 times. Salt, Salt.\n\n" for _ in range(8)),
    *("for i in range(10):\n    print(i ** 2)  # x\n\treturn\r\n" for _ in range(8)),
    *("a zebra, aaaa abab 日本語 مرحبا ﬁ <s> </s> <unk>" for _ in range(8)),
]
NASTY = [
    "", " ", "   ", "\n", "\n\n\n", " \n ", "\t\t x", "a\r\nb\r\n\r\nc", "Once upon a time", " leading", "trailing  ",
    "two  spaces   three", "it's I'VE we'll 'tis 'S it'Salt don'T y'all'd've", "12345 1,000.5 3.14e-10 x1y22z333",
    "1 2  3   4",
    "½ ² ٣٤٥ Ⅷ ①", "naïve héllo ü", "e\u0301 \u1e9b\u0323 ﬁ Å", "🙂🙂 👩\u200d👩\u200d👧 🇯🇵",
    "日本語のテキスト、中文。", "مرحبا بالعالم", "a quagga quagga,quagga quaggas", "!!! ... ??\n ,;\n\nx",
    "for i in range(10):\n    print(i ** 2)  # x\n\n\treturn\r\n",
    "<|endoftext|>", "x<|im_start|>y", "<s>", "a</s>b", "<unk>", "<0x0A>", "\u00a0nbsp\u2028sep\u3000wide", "x\0y",
    "▁▁ x", "a▁b", "aaaaaaaaa abababab", "http://a.b/c?d=e&f=1#g", "\ufeffbom", "_x_ __y__", "\u0085", "क्षत्रिय", "ไทย",
]  # fmt: skip

LETTERS, NUMBERS = r"\p{L}", r"\p{N}"
# Llama 3's and Qwen2's published expressions; SmolLM's is GPT-2's, behind a cut at each digit.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA, QWEN = WORDS + r"\p{N}{1,3}" + REST, WORDS + r"\p{N}" + REST
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": [LLAMA], "qwen2": [QWEN], "smollm": [r"\p{N}|[^\p{N}]+", GPT2]}


def cut(text: str, expression: str) -> list[str]:
    """What matches, one after another: `re` has no classes of letters, so those of this text are listed."""
    for name, letter in ((LETTERS, "L"), (NUMBERS, "N")):
        found = "".join(c for c in sorted(set(text)) if unicodedata.category(c)[0] == letter) or "\U0010ffff"
        listed = re.escape(found)
        expression = re.sub(r"\[(\^?[^\]]*?)" + re.escape(name), lambda m, s=listed: f"[{m[1]}{s}", expression)
        while f"{name}" in expression:
            at = expression.index(name)
            inside = expression.rfind("[", 0, at) > expression.rfind("]", 0, at)
            expression = expression[:at] + (listed if inside else f"[{listed}]") + expression[at + len(name) :]
    return re.findall(expression, text)


def alphabet() -> dict[int, str]:
    """The letter of each byte: its own where it is visible, and the next from U+0100 on where it is not."""
    found, more = {}, 256
    for byte in range(256):
        if chr(byte).isprintable() and byte not in (32, 160, 173):
            found[byte] = chr(byte)
        else:
            found[byte] = chr(more)
            more += 1
    return found


@dataclass(frozen=True)
class BPE:
    """A vocabulary, its merges and how text is cut. `added` stand for themselves, whatever the text; `special` where
    that is asked for. `whole`: a piece that is a token is that token, whatever the merges.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    pre: str
    added: Sequence[str] = ()
    special: Sequence[str] = ()
    letters: Mapping[int, str] = field(default_factory=alphabet)

    def encode(self, text: str, special: bool = False) -> list[int]:
        known = [*self.added, *(self.special if special else ())]
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, known)) + ")", text) if known else [text]:
            ids += [self.vocab[part]] if part in known else self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.pre == "qwen2" else text]
        for expression in SPLITS[self.pre]:
            pieces = [found for piece in pieces for found in cut(piece, expression)]
        return [id for piece in pieces for id in self._merge(piece)]

    def _merge(self, piece: str) -> list[int]:
        parts = [self.letters[byte] for byte in piece.encode()]
        if self.pre == "llama-bpe" and "".join(parts) in self.vocab:
            return [self.vocab["".join(parts)]]
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        while True:
            found = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
            if not found:
                return [self.vocab[part] for part in parts]
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
