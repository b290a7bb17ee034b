"""Small real tokenizers and stores that the data tests share."""

import functools

import numpy as np
import tokenizers

from weft.data.encoder import Marks
from weft.data.store import Part, TokenStore


class ByteTokenizer:
    """UTF-8 bytes as ids 2 … 257, BOS 1, EOS 0; `frames` puts a BOS before a text, as Llama's settings do."""

    vocab_size = 258
    eos_ids = (0,)

    def __init__(self, bos_id: int | None = None, lossy: bool = False) -> None:
        self.bos_id = bos_id
        self.lossy = lossy

    def encode(self, text: str) -> list[int]:
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`lossy` drops spaces, as a tokenizer that changes its text does."""
        return [[byte + 2 for byte in (text.replace(" ", "") if self.lossy else text).encode()] for text in texts]

    def token_bytes(self, index: int) -> bytes:
        return bytes([index - 2]) if index >= 2 else b""

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(index) for index in ids).decode("utf-8", "replace")


@functools.cache
def byte_level_bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE of 300 entries with GPT-2's pre-tokenizer."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat and then the other cat sat there\n\n    indented text, too\n"] * 20, trainer)
    return made


def store_of(lengths: list[int], parts: int = 1, masked: bool = False, seed: int = 0, marks: Marks | None = None) -> TokenStore:
    """Documents of the given lengths; the token at position p of the stream has the id p + 1, so that every token is its own name."""
    made, start = [], 1
    cuts = np.array_split(np.array(lengths, dtype=np.int64), parts)
    random = np.random.default_rng(seed)
    for chunk in (cut for cut in cuts if len(cut)):
        total = int(chunk.sum())
        tokens = np.arange(start, start + total, dtype=np.uint32)
        bits = np.packbits(random.integers(0, 2, total).astype(bool)) if masked else None
        made.append(Part(tokens, np.cumsum(chunk), 3 * chunk, chunk, bits))
        start += total
    return TokenStore(made, marks or Marks())
