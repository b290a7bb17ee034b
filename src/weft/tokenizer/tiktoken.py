"""tiktoken's vocabularies: one line a token, base64 and rank, where the rank is both the id and the order of merging."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, processors

from weft.errors import UserError
from weft.files import read_text
from weft.tokenizer.huggingface import set_frame
from weft.tokenizer.special import guess_roles
from weft.tokenizer.splits import CL100K, GPT2, O200K, QWEN2, byte_level_split
from weft.tokenizer.token_text import bytes_to_symbols
from weft.tokenizer.tokenizer import Settings, Tokenizer


@dataclass(frozen=True)
class Encoding:
    """What a `.tiktoken` file leaves out: how text is cut, the special tokens and their ids, and whether a text begins with one."""

    pattern: str
    special: Mapping[str, int]
    bos: str | None = None


_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
_LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)  # fmt: skip

# Number of ranks -> encoding: every published file has its own.
_BY_SIZE = {
    50256: Encoding(GPT2, {"<|endoftext|>": 50256}),  # gpt2, r50k_base
    50280: Encoding(GPT2, {"<|endoftext|>": 50256}),  # p50k_base
    100256: Encoding(
        CL100K, {"<|endoftext|>": 100257, **{name: 100258 + index for index, name in enumerate(_FIM)}, "<|endofprompt|>": 100276}
    ),
    199998: Encoding(O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    128000: Encoding(CL100K, {name: 128000 + index for index, name in enumerate(_LLAMA3)}, bos="<|begin_of_text|>"),
    151643: Encoding(QWEN2, {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
}


def looks_like_ranks(head: bytes) -> bool:
    """Whether the first line of a file is `base64 rank`, as in Meta's `tokenizer.model` of Llama 3."""
    parts = head.split(b"\n", 1)[0].split()
    return len(parts) == 2 and parts[1].isdigit()


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and ranks of a file; raises UserError with the line that is not one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path, "tiktoken vocabulary").splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number}: '{line[:40]}' is not a token in base64 and its rank; fetch the file again.") from None
    if len(set(ranks.values())) != len(ranks):
        raise UserError(f"{path} gives two tokens the same rank; fetch the file again.")
    return ranks


def _merges(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others: tiktoken merges any two neighbours whose joint bytes are a token, lowest rank first."""
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((left, right))
    return merges


def from_tiktoken(path: Path, pattern: str | None = None) -> Tokenizer:
    """A vocabulary of ranks.

    pattern   the regular expression that cuts text; needed for a vocabulary that is none of the published ones.
    """
    ranks = read_ranks(path)
    known = _BY_SIZE.get(len(ranks))
    if known is None and pattern is None:
        sizes = ", ".join(map(str, sorted(_BY_SIZE)))
        raise UserError(
            f"{path} has {len(ranks)} tokens and is none of the published vocabularies (those have {sizes}); give the regular expression "
            "that it cuts text with as `pattern`."
        )
    encoding = known or Encoding(GPT2, {"<|endoftext|>": max(ranks.values()) + 1})
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{path} has no token for the byte 0x{missing[0]:02x}; a byte-level vocabulary needs all 256. Fetch the file again."
        )
    # Special tokens go into the model's vocabulary, where their ids can have gaps before them; no merge makes them.
    symbols = {bytes_to_symbols(token): rank for token, rank in ranks.items()}
    model = models.BPE(vocab=symbols | dict(encoding.special), merges=_merges(symbols), ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = byte_level_split([pattern or encoding.pattern])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(list(encoding.special))
    prefix = () if encoding.bos is None else (encoding.special[encoding.bos],)
    if prefix:
        set_frame(backend, prefix, ())
    return Tokenizer(backend, Settings(guess_roles(set(encoding.special)), prefix))
