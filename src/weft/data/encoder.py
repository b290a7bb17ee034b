"""What preparing data needs of a tokenizer, and how text becomes the ids of one document."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from weft.errors import UserError

# Words, digits, code, spaces, marks, several scripts and every short UTF-8 length: tokenizers that agree on all of it are, in
# practice, the same one.
PROBES = (
    "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs!",
    "def f(x: int = 0) -> list[str]:\n    return [f'{x!r}\\t']  # 3.14159e-10\n\n\tpass",
    "Zwölf Boxkämpfer jagen Viktor; où êtes-vous, señor? Łódź, İstanbul, ελληνικά, русский, עברית, العربية, हिन्दी",
    "日本語の文章と中文字符 한국어 👩‍👩‍👧‍👦 e\u0301 \u00a0\u200b\ufeff 0123456789 1000000",
    "".join(chr(code) for code in range(1, 384)),
)


class TextTokenizer(Protocol):
    """The part of a tokenizer that data preparation uses.

    `encode` frames a text as the tokenizer's own settings say, `encode_batch` adds nothing. Two more methods are used where they exist:
    `token_bytes(id) -> bytes`, the text of a token, for exact byte counts, and `save(folder)`, to keep the tokenizer with the data.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Marks:
    """Ids put before and after every document; None puts nothing there."""

    bos: int | None = None
    eos: int | None = None


def choose_marks(tokenizer: TextTokenizer, bos: bool | None = None, eos: bool = True) -> Marks:
    """The marks of a tokenizer's documents: its first end token, and a BOS where the tokenizer's own settings put one.

    bos   True or False forces it; None does as the settings say, but never puts an end token, which stands between documents already.
    Raises UserError where a BOS is forced and there is none.
    """
    ends = [int(token) for token in tokenizer.eos_ids]
    start = None if tokenizer.bos_id is None else int(tokenizer.bos_id)
    if bos and start is None:
        raise UserError("a BOS was asked for, but this tokenizer has none; leave it out or use a tokenizer that has one.")
    wanted = bos if bos is not None else start not in ends and tokenizer.encode("")[:1] == [start]
    return Marks(start if wanted else None, ends[0] if eos and ends else None)


def fingerprint(tokenizer: TextTokenizer) -> str:
    """Hexadecimal SHA-256 that says which tokenizer made a shard, whatever file format it was read from.

    It is over what the tokenizer does: the size of its vocabulary, its special ids, the ids of `PROBES`, and the bytes of text of
    every id where the tokenizer tells them.
    """
    facts = [tokenizer.vocab_size, tokenizer.bos_id, list(tokenizer.eos_ids), tokenizer.encode_batch(list(PROBES))]
    state = hashlib.sha256(json.dumps(facts).encode())
    for text in _token_texts(tokenizer) or ():
        state.update(len(text).to_bytes(4, "little") + text)
    return state.hexdigest()


def byte_table(tokenizer: TextTokenizer) -> np.ndarray | None:
    """UTF-8 bytes of text that each id stands for, int32 [vocab_size]; None where the tokenizer does not tell."""
    texts = _token_texts(tokenizer)
    return None if texts is None else np.array([len(text) for text in texts], dtype=np.int32)


def _token_texts(tokenizer: TextTokenizer) -> list[bytes] | None:
    token_bytes = getattr(tokenizer, "token_bytes", None)
    return None if token_bytes is None else [token_bytes(token) for token in range(tokenizer.vocab_size)]


def join_pair(prompt: list[int], joint: list[int], completion: list[int]) -> list[int]:
    """Ids of a completion as a model will have to write them after `prompt`.

    They come from the joint text where its ids begin with the prompt's (no mark of a text's beginning is then added in the middle),
    and from the completion alone where the two would merge over the border.
    """
    return joint[len(prompt) :] if joint[: len(prompt)] == prompt else completion
