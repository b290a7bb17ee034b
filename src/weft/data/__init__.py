"""From raw text to batches: sources, memory-mapped shards, packing and mixtures.

    sources     text, JSONL and Parquet files as documents, with errors that name file, row and column
    prepare     documents through a tokenizer into shards, with a held-out split
    shards      the folder on disk: token files, document offsets, loss masks, one manifest
    store       reading it back: a stream of tokens cut into documents
    windows     how the stream is cut into rows (pack, best_fit, pad, stream)
    packing     rows as tensors: tokens, targets, positions, segments, loss mask
    mixture     several stores by weight, with the epochs of each
    batches     what a trainer holds: `batch(step)`, a pure function of the step and the seed

Only `packing` and `batches` import torch.
"""
