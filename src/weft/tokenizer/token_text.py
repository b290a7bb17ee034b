"""What text a token stands for: GPT-2's byte alphabet, SentencePiece's marked spaces and byte tokens, WordPiece's prefixes."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import tokenizers

SPACE_MARK = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Style = Literal["byte_level", "sentencepiece", "wordpiece", "suffix", "other"]


def _byte_alphabet() -> dict[int, str]:
    # Radford et al. 2019: bytes that print keep their Latin-1 character; the others take the characters from U+0100 on, in order.
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in prints)
    return {byte: chr(byte) for byte in prints} | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def bytes_to_symbols(data: bytes) -> str:
    """Bytes in GPT-2's alphabet, one printing character a byte."""
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


def symbols_to_bytes(symbols: str) -> bytes | None:
    """The inverse of `bytes_to_symbols`; None where a character is not of that alphabet."""
    try:
        return bytes(CHAR_TO_BYTE[char] for char in symbols)
    except KeyError:
        return None


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list of the JSON objects it consists of."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    nested = next((state[key] for key in ("decoders", "normalizers", "pretokenizers") if key in state), None)
    return [state] if nested is None else list(nested)


class TokenText:
    """The bytes of every token of one vocabulary.

    `exact` says that a text is the bytes of its tokens put together (byte-level and SentencePiece vocabularies), so decoding can go
    token by token; elsewhere the decoder of the `tokenizers` library decides about spaces.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.added = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
        self._cache: dict[int, bytes] = {}
        parts = _parts(backend.decoder)
        kinds = {part["type"] for part in parts}
        self.style: Style = "other"
        if "ByteLevel" in kinds:
            self.style = "byte_level"
        elif "WordPiece" in kinds:
            self.style = "wordpiece"
            self._prefix = next(part["prefix"] for part in parts if part["type"] == "WordPiece")
        elif "BPEDecoder" in kinds:
            self.style = "suffix"
            self._suffix = next(part["suffix"] for part in parts if part["type"] == "BPEDecoder")
        elif "Metaspace" in kinds or any(part["type"] == "Replace" and part["pattern"] == {"String": SPACE_MARK} for part in parts):
            self.style = "sentencepiece"
        self.exact = self.style in ("byte_level", "sentencepiece")
        self.drops_first_space = self.style == "sentencepiece" and any(
            (part["type"] == "Strip" and part["content"] == " " and part["start"] > 0)
            or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            for part in parts
        )
        self._byte_tokens = "ByteFallback" in kinds

    @cached_property
    def num_ids(self) -> int:
        """One more than the highest id: the number of rows an embedding table needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def of(self, index: int) -> bytes:
        """UTF-8 bytes of a token, part of a character where the token is; empty for an id without a token."""
        found = self._cache.get(index)
        if found is None:
            found = self._cache[index] = self._compute(index)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens among them spelled out."""
        if not self.exact:
            return self.backend.decode([index for index in ids if 0 <= index < self.num_ids], skip_special_tokens=False)
        data = b"".join(map(self.of, ids))
        return (data.removeprefix(b" ") if self.drops_first_space else data).decode("utf-8", "replace")

    def _compute(self, index: int) -> bytes:
        # An added token is matched in the text as it is written, so it stands for itself: 'ü' is U+00FC, not the byte 0xFC.
        if index in self.added:
            return self.added[index].encode()
        token = self.backend.id_to_token(index) if index >= 0 else None
        if token is None:
            return b""
        if self.style == "byte_level":
            data = symbols_to_bytes(token)
            return token.encode() if data is None else data
        if self.style == "sentencepiece":
            byte = _BYTE_TOKEN.fullmatch(token) if self._byte_tokens else None
            return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()
        if self.style == "wordpiece":
            return (token[len(self._prefix) :] if token.startswith(self._prefix) else " " + token).encode()
        if self.style == "suffix":
            return (token[: -len(self._suffix)] + " " if token.endswith(self._suffix) else token).encode()
        return token.encode()
