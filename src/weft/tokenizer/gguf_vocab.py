"""The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` metadata."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from weft.errors import UserError, unknown
from weft.tokenizer.huggingface import ids_of, set_frame, word_piece
from weft.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    Model,
    Piece,
    SentencePieceEncoder,
    library_backend,
    marked_spaces,
    score_merges,
    space_decoder,
)
from weft.tokenizer.splits import GGUF_SPLITS
from weft.tokenizer.token_text import SPACE_MARK
from weft.tokenizer.tokenizer import Settings, TextEncoder, Tokenizer

_KEY = "tokenizer.ggml."
_ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "sep_token": "seperator_token_id",  # so spelled in the format
    "mask_token": "mask_token_id",
}
# Ids that the kinds of vocabulary have where the file does not say.
_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
    "bert": {"cls_token": 101, "sep_token": 102, "unk_token": 100, "pad_token": 0, "mask_token": 103},
    "t5": {"eos_token": 1, "unk_token": 2, "pad_token": 0},
    "gpt2": {},
}
# Before `tokenizer.ggml.pre` existed, the architecture was all a file said.
_PRE_BY_ARCHITECTURE = {
    "gpt2": "gpt-2",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
    "falcon": "falcon",
    "mpt": "mpt",
    "qwen2": "qwen2",
}

_log = logging.getLogger(__name__)


class _Vocab:
    """The lists of one file, checked: a text, a kind and a score for every id, each text once."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise UserError("the GGUF file has no tokenizer (tokenizer.ggml.tokens is missing); give a file with one, or a tokenizer.json.")
        self.kinds = self._numbers("token_type", len(tokens), NORMAL)
        self.scores = self._numbers("scores", len(tokens), None) or [-float(index) for index in range(len(tokens))]
        self.tokens = self._distinct(tokens)

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(_KEY + name, default)

    def _numbers(self, name: str, count: int, default: int | None) -> list[Any]:
        values = self.get(name)
        if values is None:
            return [] if default is None else [default] * count
        if not isinstance(values, list) or len(values) != count:
            raise UserError(f"the GGUF file has {count} tokens, but {_KEY}{name} does not have as many entries; fetch the file again.")
        return values

    @staticmethod
    def _distinct(tokens: Sequence[str]) -> list[str]:
        # A text that stands twice, or an empty one, would leave an id without a token; only the last of them can be encoded.
        last = {token: index for index, token in enumerate(tokens)}
        return [token if token and last[token] == index else f"[UNUSED_{index}]" for index, token in enumerate(tokens)]

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def of_kind(self, *kinds: int) -> list[int]:
        return [index for index, kind in enumerate(self.kinds) if kind in kinds]

    def roles(self, model: str) -> dict[str, str]:
        ids = {role: self.get(key, _DEFAULT_IDS[model].get(role)) for role, key in _ROLE_KEYS.items()}
        return {role: self.tokens[index] for role, index in ids.items() if isinstance(index, int) and 0 <= index < len(self.tokens)}


def _add_marked_tokens(backend: tokenizers.Tokenizer, vocab: _Vocab, tokens: Sequence[str], strip_after: Sequence[str] = ()) -> None:
    """Control tokens as special ones, user-defined tokens as text that is never cut."""
    backend.add_tokens(
        [
            AddedToken(tokens[index], special=vocab.kinds[index] != USER_DEFINED, normalized=False, rstrip=tokens[index] in strip_after)
            for index in vocab.of_kind(CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )


def _byte_level(vocab: _Vocab) -> tuple[tokenizers.Tokenizer, bool]:
    """`gpt2`: byte-level BPE; the second value says whether the vocabulary begins texts with BOS by default."""
    name = vocab.get("pre") or _PRE_BY_ARCHITECTURE.get(vocab.metadata.get("general.architecture", ""))
    if name is None:
        _log.warning("the GGUF file does not say how its text is cut (tokenizer.ggml.pre); the default is used, and ids may differ.")
        name = "default"
    if name not in GGUF_SPLITS:
        raise unknown("pre-tokenizer in the GGUF file", str(name), GGUF_SPLITS)
    split = GGUF_SPLITS[name]
    lines = vocab.get("merges")
    if not isinstance(lines, list):
        raise UserError("the GGUF file has a byte-level vocabulary without merges (tokenizer.ggml.merges); fetch the file again.")
    # The first character may itself be a space in vocabularies that are not written in GPT-2's alphabet.
    cuts = [(line, line.find(" ", 1)) for line in lines]
    merges = [(line[:cut], line[cut + 1 :]) for line, cut in cuts if cut > 0]
    try:
        model = models.BPE(vocab=vocab.ids, merges=merges, ignore_merges=split.whole_words)
    except Exception as error:  # a merge of tokens that the vocabulary lacks
        raise UserError(f"the merges in the GGUF file do not belong to its vocabulary ({error}); fetch the file again.") from None
    backend = tokenizers.Tokenizer(model)
    normalizer = split.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_marked_tokens(backend, vocab, vocab.tokens)
    return backend, split.adds_bos


def _scored(vocab: _Vocab) -> tokenizers.Tokenizer:
    """`llama`: SentencePiece BPE, merged by score."""
    pieces = [Piece(token, score, kind) for token, score, kind in zip(vocab.tokens, vocab.scores, vocab.kinds, strict=True)]
    has_bytes = any(kind == BYTE for kind in vocab.kinds)
    unk = vocab.roles("llama").get("unk_token")
    model = models.BPE(vocab=vocab.ids, merges=score_merges(pieces), fuse_unk=True, byte_fallback=has_bytes)
    if unk is not None:
        model.unk_token = unk
    backend = tokenizers.Tokenizer(model)
    prefix = bool(vocab.get("add_space_prefix", True))
    backend.normalizer = marked_spaces(prefix)
    backend.decoder = space_decoder(prefix)
    # GGUF has no field for it, but Phi-3's special tokens take the white space after them.
    phi3 = str(vocab.metadata.get("general.name", "")).lower().replace("-", "").startswith("phi3")
    marked = vocab.of_kind(CONTROL, UNKNOWN, USER_DEFINED) if phi3 else []
    strip_after = {vocab.tokens[index] for index in marked} - {"<unk>", "<s>", "<|endoftext|>"}
    _add_marked_tokens(backend, vocab, vocab.tokens, sorted(strip_after))
    return backend


def _word_piece(vocab: _Vocab) -> tokenizers.Tokenizer:
    """`bert`: in the file, a word's first piece has `▁` before it, where vocab.txt marks the others with `##`."""

    def spelled(token: str) -> str:
        if token.startswith("[") and token.endswith("]") and len(token) > 2:
            return token
        return token[1:] if token.startswith(SPACE_MARK) else "##" + token

    roles = vocab.roles("bert")
    lowercase = bool(vocab.get("normalizer.lowercase", True))
    ids = {spelled(token): index for index, token in enumerate(vocab.tokens)}
    return word_piece(ids, lowercase, roles.get("unk_token", "[UNK]"))


def _unigram(vocab: _Vocab) -> tuple[tokenizers.Tokenizer, TextEncoder]:
    """`t5`: SentencePiece Unigram."""
    charsmap = vocab.get("precompiled_charsmap") or []
    unk = vocab.get("unknown_token_id", _DEFAULT_IDS["t5"]["unk_token"])
    kinds = [UNKNOWN if index == unk else kind for index, kind in enumerate(vocab.kinds)]
    model = Model(
        pieces=tuple(Piece(token, score, kind) for token, score, kind in zip(vocab.tokens, vocab.scores, kinds, strict=True)),
        model_type=UNIGRAM,
        byte_fallback=BYTE in kinds,
        charsmap=bytes(value & 0xFF for value in charsmap),
        add_dummy_prefix=bool(vocab.get("add_space_prefix", True)),
        remove_extra_whitespaces=bool(vocab.get("remove_extra_whitespaces", False)),
    )
    return library_backend(model), SentencePieceEncoder(model)


def _ends(vocab: _Vocab) -> tuple[int, ...]:
    ids = [vocab.get(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    return tuple(index for index in ids if isinstance(index, int) and 0 <= index < len(vocab.tokens))


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = {"default": metadata.get("tokenizer.chat_template")}
    found |= {
        name.removeprefix("tokenizer.chat_template."): text
        for name, text in metadata.items()
        if name.startswith("tokenizer.chat_template.")
    }
    return {name: text for name, text in found.items() if isinstance(text, str) and text}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF metadata describe, with its special tokens, BOS rule and chat template.

    metadata   keys to values, strings as str and arrays as lists; `tokenizer.ggml.model` may be gpt2, llama, bert or t5.
    Raises UserError for another model, a pre-tokenizer that is not known, and lists that do not fit together.
    """
    model = metadata.get(_KEY + "model")
    if model not in _DEFAULT_IDS:
        raise unknown("kind of tokenizer in the GGUF file", str(model), _DEFAULT_IDS)
    vocab = _Vocab(metadata)
    roles = vocab.roles(model)
    encoder: TextEncoder | None = None
    adds_bos, adds_eos = model == "llama", model == "t5"
    if model == "gpt2":
        backend, adds_bos = _byte_level(vocab)
    elif model == "llama":
        backend = _scored(vocab)
    elif model == "t5":
        backend, encoder = _unigram(vocab)
    else:
        backend = _word_piece(vocab)
    if model == "bert":
        before, after = "cls_token", "sep_token"
    else:
        before = "bos_token" if vocab.get("add_bos_token", adds_bos) else ""
        after = "eos_token" if vocab.get("add_eos_token", adds_eos) else ""
    prefix, suffix = ids_of(backend, roles, before), ids_of(backend, roles, after)
    if prefix or suffix:
        set_frame(backend, prefix, suffix)
    return Tokenizer(backend, Settings(roles, prefix, suffix, _ends(vocab), _templates(metadata)), encoder)
