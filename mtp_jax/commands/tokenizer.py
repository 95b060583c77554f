"""`mtp-jax tokenizer train`: make a byte-level BPE from the training documents of a source."""

from __future__ import annotations

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
    if not args or args[0] in ("-h", "--help"):
        print("usage: mtp-jax tokenizer train --vocab-size N --out FILE [options]\n")
        print("mtp-jax tokenizer train --help lists the options.")
        return
    lookup({"train": _train}, args[0], "The command of mtp-jax tokenizer")(args[1:])


def _train(args: list[str]) -> None:
    options = parse(TokenizerOptions, args, "tokenizer train")
    out = Path(options.out).expanduser()
    require(
        options.vocab_size >= SMALLEST,
        f"--vocab-size is {options.vocab_size}; it must be at least {SMALLEST}: 256 bytes and {END}.",
    )
    require(not out.exists(), f"--out is {options.out} and exists; delete it, or give another file.")
    require(out.parent.is_dir(), f"--out is {options.out} and {out.parent} is no directory; make it first.")

    from mtp_jax.data.tokenizers import HFTokenizer

    documents = _Documents(options)
    data = train_bpe(iter(documents), options.vocab_size)
    require(
        documents.count > 0,
        f"The train split of source {options.source} has no documents. The split is by the hash of a document's "
        "content: change --valid-fraction, or give the source more (and smaller) documents.",
    )
    tokenizer = HFTokenizer(data)
    try:
        with out.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"--out is {options.out}, which cannot be written ({error}).") from error
    size, tokens = sum(map(len, documents.sample)), sum(map(len, tokenizer.encode_batch(documents.sample)))
    rate = f"{size / tokens:.2f} bytes per token on" if tokens else "its bytes per token are not known, for there are"
    fewer = f" (of {options.vocab_size:,}: the documents hold no more)" * (tokenizer.vocab_size < options.vocab_size)
    print(
        f"Trained on {documents.count:,} documents of {documents.bytes:,} bytes: {tokenizer.vocab_size:,} "
        f"tokens{fewer}, {rate} {len(documents.sample):,} held-out documents, in {out}"
    )


class _Documents:
    """The training documents of a source as text, with their count and bytes so far, and a sample of those held out."""

    def __init__(self, config: SourceConfig):
        """Raises `ConfigError` if there is no such source."""
        from mtp_jax.data.sources import load_source

        self.config, self.source = config, load_source(config)
        self.count = self.bytes = 0
        self.sample: list[bytes] = []

    def __iter__(self) -> Iterator[str]:
        from mtp_jax.data.preparation import cache_dir
        from mtp_jax.data.sources import documents, is_held_out
        from mtp_jax.data.tokenizers import utf8

        sampled = 0
        for _, text in documents(self.source, cache_dir(self.config) / "tfds"):
            if is_held_out(text, self.config.valid_fraction):
                if text and sampled < SAMPLE_BYTES:
                    self.sample.append(text)
                    sampled += len(text)
            elif text:
                self.count += 1
                self.bytes += len(text)
                yield utf8(text)[0]


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
