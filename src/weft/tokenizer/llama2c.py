"""llama2.c's `tokenizer.bin`: the longest token's length (int32), then score (float32), length (int32) and text of every token."""

import struct
from pathlib import Path

from weft.errors import UserError
from weft.tokenizer.huggingface import set_frame
from weft.tokenizer.sentencepiece import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, Model, Piece, tokenizer_from_model
from weft.tokenizer.tokenizer import Settings, Tokenizer

_SPECIAL = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))


def from_llama2c(path: Path) -> Tokenizer:
    """A vocabulary of llama2.c, which is Llama 2's SentencePiece BPE: the first three ids are special, then come the 256 bytes."""
    data = path.read_bytes()
    pieces, at = [], 4
    try:
        longest = struct.unpack_from("<i", data)[0]
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            if not 0 <= length <= longest or at + 8 + length > len(data):
                raise ValueError("a token longer than the longest")
            pieces.append((data[at + 8 : at + 8 + length].decode(), score))
            at += 8 + length
    except (struct.error, ValueError) as error:
        raise UserError(f"{path} is not a llama2.c tokenizer ({error}); give its tokenizer.bin.") from None
    if len(pieces) < 259:
        raise UserError(f"{path} has {len(pieces)} tokens; a llama2.c tokenizer has three special ones and 256 bytes before all others.")
    entries = [Piece(name, 0.0, kind) for name, kind in _SPECIAL]
    entries += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    entries += [Piece(text.replace(" ", "▁"), score, NORMAL) for text, score in pieces[259:]]
    tokenizer = tokenizer_from_model(Model(tuple(entries), BPE, byte_fallback=True, remove_extra_whitespaces=False))
    set_frame(tokenizer.backend, (1,), ())
    settings = Settings({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, prefix=(1,))
    return Tokenizer(tokenizer.backend, settings, tokenizer.text_encoder)
