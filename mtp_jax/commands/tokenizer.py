"""`mtp-jax tokenizer train`: make a byte-level BPE from the training documents of a source."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mtp_jax.commands import parse
from mtp_jax.data.config import SourceConfig
from mtp_jax.registry import lookup
from mtp_jax.validate import ConfigError, require

END = "<|endoftext|>"
SMALLEST = 257  # all bytes, and the end of a document
SAMPLE_BYTES = 2**20
LONGEST = 256  # characters of a word
# GPT-2's words are of letters, of digits, of white space, or of what is left.
LONG = re.compile(rf"([^\W_]{{{LONGEST}}}(?=[^\W_])|\s{{{LONGEST}}}(?=\s)|(?:[^\w\s]|_){{{LONGEST}}}(?=[^\w\s]|_))")


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(SourceConfig):
    """Make a tokenizer for --data.tokenizer hf:OUT from the training documents of a source.

    It is a byte-level BPE in the file format of Hugging Face: any text survives it, and <|endoftext|> ends documents.
    The source and the split are named as in `data.*` of the run.
    """

    vocab_size: int
    """How many tokens, with the 256 bytes and <|endoftext|>. Give a model as many, or more."""
    out: str
    """The file to write, such as tokenizer.json."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: mtp-jax tokenizer train --vocab-size N --out FILE [options]; --help behind it lists the options")
        return
    lookup({"train": _train}, args[0], "The command of mtp-jax tokenizer")(args[1:])


def _train(args: list[str]) -> None:
    options = parse(TokenizerOptions, args, "tokenizer train")
    out = Path(os.path.expanduser(options.out))
    require(
        options.vocab_size >= SMALLEST,
        f"--vocab-size is {options.vocab_size}; it must be at least {SMALLEST}: 256 bytes and {END}.",
    )
    require(not out.exists(), f"--out is {options.out} and exists; delete it, or give another file.")
    require(out.parent.is_dir(), f"--out is {options.out} and {out.parent} is no directory; make it first.")

    from etils import epath

    from mtp_jax.data.held_out import divided, is_one_sided
    from mtp_jax.data.preparation import cache_dir
    from mtp_jax.data.sources import documents, load_source
    from mtp_jax.data.tokenizers import HFTokenizer, utf8
    from mtp_jax.runs.paths import check_writable, replace_file

    check_writable(epath.Path(out), "Give another --out.")
    source, cache, fraction = load_source(options), cache_dir(options) / "tfds", options.valid_fraction
    count, size, sample, sampled, cut = 0, 0, [], 0, 0
    inside = is_one_sided((text for _, text in documents(source, cache)), fraction)

    def training_documents() -> Iterator[str]:
        nonlocal count, size, sampled, cut
        for document in documents(source, cache):
            for split, _, text in divided(*document, fraction, inside) if document[1] else ():
                if split == "train":
                    count += 1
                    size += len(text)
                    words = list(bounded(utf8(text)[0]))
                    cut += len(words) - 1
                    yield from words
                elif sampled < SAMPLE_BYTES:
                    sample.append(text)
                    sampled += len(text)

    data = train_bpe(training_documents(), options.vocab_size)
    require(
        count > 0,
        f"The train split of source {options.source} has no documents. The split is by the hash of a document's "
        "content: change --valid-fraction, or give the source more (and smaller) documents.",
    )
    tokenizer = HFTokenizer(data)
    try:
        replace_file(epath.Path(out), data)
    except OSError as error:
        raise ConfigError(f"--out is {options.out}, which cannot be written ({error}).") from error
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    rate = f"{sampled / tokens:.2f} bytes per token on" if tokens else "bytes per token are not known, for there are"
    fewer = f" (of {options.vocab_size:,}: the documents hold no more)" * (tokenizer.vocab_size < options.vocab_size)
    print(
        f"Trained on {count:,} documents of {size:,} bytes: {tokenizer.vocab_size:,} tokens{fewer}, {rate} "
        f"{len(sample):,} held-out documents, in {out}"
    )
    if cut:
        print(
            f"Words of more than {LONGEST} characters, as text without white space has them, were learned in pieces "
            f"of {LONGEST}: {cut:,} cuts."
        )


def bounded(text: str) -> Iterator[str]:
    """A text in pieces none of which has a word of more than `LONGEST` characters: as a rule in one.

    Without white space a word may have megabytes, and the time of a merge grows with the square of its length.
    """
    begin, block = 0, LONGEST // 2
    # A long word fills a block. To look for white space in blocks is a hundred times as fast as the pattern.
    if any(len(text[i : i + block].split(None, 1)) < 2 for i in range(0, len(text), block)):
        for word in LONG.finditer(text):
            yield text[begin : word.end()]
            begin = word.end()
    yield text[begin:]


def train_bpe(texts: Iterator[str], vocab_size: int) -> bytes:
    """The `tokenizer.json` of a byte-level BPE: GPT-2's words, every byte, and `<|endoftext|>` as id 0.

    The same texts, in any order, give the same bytes. They are read once, and their words are kept.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    # The stubs of the library say that these cannot be set.
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tok.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # type: ignore[reportCallIssue]
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok.to_str(pretty=True).encode()
