"""Tokenizers in Hugging Face's layout: tokenizer.json with its configuration, vocab.json with merges.txt, vocab.txt."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from weft.errors import UserError
from weft.files import read_text
from weft.tokenizer.special import ROLES, declared_ids, guess_roles, role_name
from weft.tokenizer.splits import GPT2, QWEN2, byte_level_split
from weft.tokenizer.tokenizer import Settings, TextEncoder, Tokenizer


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; raises UserError for what is none."""
    try:
        value = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}); fetch or write the {what} file again.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a {what} file; fetch or write it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object; give a {what} file.")
    return value


def frame_of(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a backend's post-processor puts before and after a text."""
    for probe in ("a", "the", "0", " "):
        bare = backend.encode(probe, add_special_tokens=False).ids
        full = backend.encode(probe).ids
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def set_frame(backend: tokenizers.Tokenizer, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> None:
    """Let the backend itself put these ids around a text, so that readers of tokenizer.json do it too."""
    names = {index: backend.id_to_token(index) for index in (*prefix, *suffix)}
    before, after = [names[index] for index in prefix], [names[index] for index in suffix]
    single = [f"{name}:0" for name in before] + ["$A:0"] + [f"{name}:0" for name in after]
    second = ["$B:1"] + [f"{name}:1" for name in after]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=single + second, special_tokens=[(name, index) for index, name in names.items()]
    )


def ids_of(backend: tokenizers.Tokenizer, roles: Mapping[str, str], role: str) -> tuple[int, ...]:
    """The id of a part's token as a tuple, empty where the part or its token is missing."""
    index = backend.token_to_id(roles[role]) if role in roles else None
    return () if index is None else (index,)


def _read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json, and the ids that config.json and generation_config.json declare."""
    config = read_json(folder / "tokenizer_config.json", "tokenizer configuration") if (folder / "tokenizer_config.json").is_file() else {}
    legacy = folder / "special_tokens_map.json"
    if legacy.is_file():
        config = {**read_json(legacy, "special tokens"), **config}
    declared: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name, "configuration")
            declared |= {key: values[key] for key in ("bos_token_id", "eos_token_id") if values.get(key) is not None}
    return config, declared


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    inside = config.get("chat_template")
    if isinstance(inside, str):
        templates["default"] = inside
    elif isinstance(inside, list):
        templates |= {str(entry["name"]): str(entry["template"]) for entry in inside if isinstance(entry, dict) and "template" in entry}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path, "chat template")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja", "chat template")
    return templates


def _add_named_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """Tokens that the configuration names and tokenizer.json does not have: the configuration adds them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    entries: list[Any] = [entry for _, entry in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))]
    entries += [{"content": token} for token in roles.values()]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or []
        entries += [
            entry if isinstance(entry, dict) else {"content": entry} for entry in (extra.values() if isinstance(extra, dict) else extra)
        ]
    for entry in entries:
        content = role_name(entry)
        if content is None or content in known:
            continue
        known.add(content)
        flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        backend.add_tokens([AddedToken(content, special=bool(entry.get("special", True)), **flags)])


def with_configuration(backend: tokenizers.Tokenizer, folder: Path | None, text_encoder: TextEncoder | None = None) -> Tokenizer:
    """A tokenizer from a backend and the configuration files beside it; without them, parts are told by their usual names."""
    config, declared = _read_settings(folder) if folder else ({}, {})
    if text_encoder is not None and str(config.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama", "Gemma")):
        config = {"add_bos_token": True, **config}  # these classes' default, which their files may leave out
    roles = {role: name for role in ROLES if (name := role_name(config.get(role))) is not None}
    _add_named_tokens(backend, config, roles)
    size = backend.get_vocab_size()
    if not roles:
        roles = guess_roles({token.content for token in backend.get_added_tokens_decoder().values() if token.special})
    for role, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id")):
        ids = declared_ids(declared.get(key), size)
        if role not in roles and ids and (name := backend.id_to_token(ids[0])) is not None:
            roles[role] = name
    backend.no_truncation()
    backend.no_padding()
    prefix, suffix = frame_of(backend)
    if "add_bos_token" in config or "add_eos_token" in config:
        # As transformers does: either key replaces what tokenizer.json puts around a text.
        prefix = ids_of(backend, roles, "bos_token" if config.get("add_bos_token") else "")
        suffix = ids_of(backend, roles, "eos_token" if config.get("add_eos_token") else "")
        set_frame(backend, prefix, suffix)
    settings = Settings(roles, prefix, suffix, tuple(declared_ids(declared.get("eos_token_id"), size)))
    templates = _chat_templates(folder, config) if folder else {}
    return Tokenizer(backend, replace(settings, chat_templates=templates), text_encoder)


def from_tokenizer_json(path: Path) -> Tokenizer:
    """tokenizer.json with the configuration files beside it."""
    text = read_text(path, "tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for every kind of malformed file
        raise UserError(f"{path} is not a tokenizer.json that the tokenizers library reads ({error}); fetch or write it again.") from None
    return with_configuration(backend, path.parent)


def from_vocab_and_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """GPT-2's two files, or GPT-1's, whose tokens end words with `</w>`."""
    vocab = read_json(vocab_path, "vocabulary")
    bad = next((token for token, index in vocab.items() if isinstance(index, bool) or not isinstance(index, int) or index < 0), None)
    if bad is not None:
        raise UserError(f"{vocab_path}: the entry {bad!r} has no id; a vocabulary maps every token to a number from 0.")
    merges = []
    for number, line in enumerate(read_text(merges_path, "merges").split("\n"), 1):
        if line.strip() and not (number == 1 and line.startswith("#version")):
            parts = line.rstrip("\r").split(" ")
            if len(parts) != 2:
                raise UserError(f"{merges_path}, line {number}: '{line.strip()}' is no merge; a line has two tokens and one space between.")
            merges.append((parts[0], parts[1]))
    gpt1 = "</w>" in "".join(pair[1] for pair in merges[:200])
    try:
        model = models.BPE(vocab=vocab, merges=merges)
    except Exception as error:  # a merge of tokens that the vocabulary lacks
        raise UserError(f"{merges_path} does not belong to {vocab_path} ({error}); give the two files of one model.") from None
    if gpt1:
        model.unk_token, model.end_of_word_suffix = "<unk>", "</w>"
    backend = tokenizers.Tokenizer(model)
    folder = vocab_path.parent
    if gpt1:
        if "<|startoftext|>" in vocab:
            raise UserError(f"{folder} holds CLIP's vocabulary, whose text rules are in its tokenizer.json alone; give that file.")
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
    else:
        config, _ = _read_settings(folder)
        qwen = str(config.get("tokenizer_class", "")).startswith("Qwen2")
        backend.normalizer = normalizers.NFC() if qwen else None
        backend.pre_tokenizer = byte_level_split([QWEN2 if qwen else GPT2])
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([name for name in ("<unk>", "<|endoftext|>") if name in vocab])
    return with_configuration(backend, folder)


def word_piece(vocab: Mapping[str, int], lowercase: bool = True, unk_token: str = "[UNK]") -> tokenizers.Tokenizer:
    """BERT's rules over a vocabulary (Devlin et al. 2019): clean, lower-case and split, then the longest match from the left."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=dict(vocab), unk_token=unk_token, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens([name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocab])
    if "[CLS]" in vocab and "[SEP]" in vocab:
        set_frame(backend, (vocab["[CLS]"],), (vocab["[SEP]"],))
    return backend


def from_vocab_txt(path: Path) -> Tokenizer:
    """BERT's vocab.txt: one token a line, the line number its id."""
    lines = read_text(path, "vocabulary").split("\n")
    vocab = {line.rstrip("\r"): index for index, line in enumerate(lines) if line}
    if "[UNK]" not in vocab:
        raise UserError(f"{path} has no [UNK], so it is no WordPiece vocabulary; give a BERT vocab.txt, with one token a line.")
    config, _ = _read_settings(path.parent)
    return with_configuration(word_piece(vocab, lowercase=bool(config.get("do_lower_case", True))), path.parent)


def collapse_spaces() -> normalizers.Normalizer:
    """Runs of spaces to one, none at either end."""
    return normalizers.Sequence([normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")])
