"""Data, from documents to batches: sources, tokenizers, a token store that is made once, and batches numbered by step.

    store = prepare(DataConfig(source="stdlib"))
    for batch in batches(store.train, seq_len=256, window=4, batch_size=16, seed=0, start=step): ...

Batch n depends on the store, the sizes, the seed and n alone, so a step's number is all that a checkpoint needs to say
about data, and any number of hosts reads the same batches.
"""
