"""From documents to batches: sources, tokenizers, a token store that is made once, and batches numbered by step.

    store = prepare(DataConfig(source="stdlib"))
    for batch in batches(store.train, seq_len=256, window=4, batch_size=16, seed=0, start=step): ...

Batch n depends on the store, the sizes, the seed and n alone, so a step's number is all that a checkpoint needs to say
about data, and any number of hosts reads the same batches.
"""

from mtp_jax.data.batches import Batch, Sequences, batches, held_out_batches
from mtp_jax.data.mixture import MixedDocuments, Mixture
from mtp_jax.data.preparation import prepare
from mtp_jax.data.sources import SOURCES, DataError, Part, Source, documents, load_source
from mtp_jax.data.store import Documents, Store
from mtp_jax.data.tokenizers import (
    TOKENIZERS,
    ByteTokenizer,
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    utf8,
)

__all__ = [
    "SOURCES",
    "TOKENIZERS",
    "Batch",
    "ByteTokenizer",
    "DataError",
    "Documents",
    "HFTokenizer",
    "MixedDocuments",
    "Mixture",
    "Part",
    "SentencePieceTokenizer",
    "Sequences",
    "Source",
    "Store",
    "Tokenizer",
    "batches",
    "documents",
    "held_out_batches",
    "load_source",
    "load_tokenizer",
    "prepare",
    "utf8",
]
