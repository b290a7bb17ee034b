"""A tokenizer as GGUF metadata: what `weft.tokenizer.gguf_vocab` reads, written."""

import json
from collections.abc import Mapping
from typing import Any

from weft.errors import UserError
from weft.tokenizer import Tokenizer
from weft.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from weft.tokenizer.splits import GGUF_SPLITS, GPT2
from weft.tokenizer.token_text import SPACE_MARK

_KEY = "tokenizer.ggml."
_ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_metadata(tokenizer: Tokenizer, vocab: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a model whose embedding has `vocab` rows.

    Byte-level BPE becomes `gpt2`, SentencePiece's BPE `llama`. Raises UserError for another kind of vocabulary, for a way of cutting
    text that GGUF has no name for, and where the vocabulary has more tokens than the model.
    """
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if tokenizer.vocab_size > vocab:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {vocab} rows; they do not belong together.")
    if model["type"] != "BPE":
        raise UserError(f"GGUF takes BPE vocabularies here, and this model's is {model['type']}; export it with --to hf.")
    cuts = _cuts(state["pre_tokenizer"])
    scored = cuts is None and _marks_spaces(state)
    if cuts is None and not scored:
        raise _unnamed()
    tokens, kinds = _tokens(tokenizer, model, vocab, scored)
    metadata: dict[str, Any] = {f"{_KEY}tokens": tokens, f"{_KEY}token_type": kinds}
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if scored:
        metadata |= {f"{_KEY}model": "llama", f"{_KEY}pre": "default", f"{_KEY}scores": _scores(tokens, pairs)}
        metadata[f"{_KEY}add_space_prefix"] = _adds_space(state)
    else:
        assert cuts is not None
        name = _split_name(cuts, bool(model.get("ignore_merges")), _kinds_of(state["normalizer"]))
        metadata |= {f"{_KEY}model": "gpt2", f"{_KEY}pre": name, f"{_KEY}merges": [" ".join(pair) for pair in pairs]}
    return {**metadata, **_frame(tokenizer), **_roles(tokenizer), **_templates(tokenizer.settings.chat_templates)}


def _unnamed() -> UserError:
    return UserError(
        "the tokenizer cuts text in a way that GGUF has no name for, so other programs would give other ids; export with --to hf, or "
        "train with one of the cuts of a published tokenizer."
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A pre-tokenizer or normalizer as its steps in order."""
    if part is None:
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if part["type"] == "Sequence" else [part]


def _cuts(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions that cut text before byte-level BPE; None where it is not byte-level, UserError where a step is no such cut."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in steps):
        return None
    cuts: list[str] = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts += [GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            cuts.append(r"\p{N}")
        elif step["type"] == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated" and not step["invert"]:
            cuts.append(step["pattern"]["Regex"])
        else:
            raise _unnamed()
    return tuple(cuts)


def _kinds_of(normalizer: Mapping[str, Any] | None) -> list[str]:
    return [step["type"] for step in _steps(normalizer, "normalizers")]


def _split_name(cuts: tuple[str, ...], whole_words: bool, normalizers: list[str]) -> str:
    """The name under which GGUF knows this way of cutting."""
    if normalizers not in ([], ["NFC"]):
        raise _unnamed()
    for name, split in GGUF_SPLITS.items():
        if (split.patterns, split.whole_words, split.nfc) == (cuts, whole_words, bool(normalizers)):
            return name
    raise _unnamed()


def _marks_spaces(state: Mapping[str, Any]) -> bool:
    """Whether text goes to BPE whole with spaces written as `▁`, as in Llama 2's tokenizer.json."""
    steps = _steps(state["normalizer"], "normalizers")
    plain = all(step["type"] in ("Prepend", "Replace") for step in steps)
    replaced = any(step["type"] == "Replace" and step["content"] == SPACE_MARK for step in steps)
    metaspace = [step["type"] for step in _steps(state["pre_tokenizer"], "pretokenizers")] == ["Metaspace"]
    return plain and (metaspace or (replaced and state["pre_tokenizer"] is None))


def _adds_space(state: Mapping[str, Any]) -> bool:
    if any(step["type"] == "Prepend" for step in _steps(state["normalizer"], "normalizers")):
        return True
    return any(step.get("prepend_scheme", "never") != "never" for step in _steps(state["pre_tokenizer"], "pretokenizers"))


def _tokens(tokenizer: Tokenizer, model: Mapping[str, Any], vocab: int, scored: bool) -> tuple[list[str], list[int]]:
    """Every row's token and kind; rows without a token are filled up with unused ones."""
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab)], [UNUSED] * vocab
    for token, index in model["vocab"].items():
        is_byte = scored and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[index], kinds[index] = token, BYTE if is_byte else NORMAL
    for index, added in tokenizer.backend.get_added_tokens_decoder().items():
        tokens[index], kinds[index] = added.content, CONTROL if added.special else USER_DEFINED
    if scored and model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece merges by score: what an earlier merge makes scores higher. What no merge makes is never compared."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [float(-ranks.get(token, len(pairs))) for token in tokens]


def _frame(tokenizer: Tokenizer) -> dict[str, Any]:
    prefix, suffix = tokenizer.settings.prefix, tokenizer.settings.suffix
    if prefix not in ((), (tokenizer.bos_id,)) or suffix not in ((), (tokenizer.eos_id,)):
        raise UserError("the tokenizer puts tokens around a text other than BOS and EOS, which GGUF cannot say; export with --to hf.")
    return {f"{_KEY}add_bos_token": bool(prefix), f"{_KEY}add_eos_token": bool(suffix)}


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {key: tokenizer.token_id(tokenizer.settings.roles[role]) for role, key in _ROLE_KEYS.items() if role in tokenizer.settings.roles}
    turn_ends = [index for index in tokenizer.eos_ids if index != tokenizer.eos_id]
    if turn_ends:
        ids["eot_token_id"] = turn_ends[0]
    return {f"{_KEY}{key}": index for key, index in ids.items() if index is not None}


def _templates(templates: Mapping[str, str]) -> dict[str, Any]:
    """Chat templates under their names; GGUF's own word for `default` is no name at all."""
    named = {f"tokenizer.chat_template.{name}": text for name, text in templates.items() if name != "default"}
    metadata: dict[str, Any] = {"tokenizer.chat_templates": [name for name in templates if name != "default"]} if named else {}
    if "default" in templates:
        metadata["tokenizer.chat_template"] = templates["default"]
    return {**metadata, **named}
