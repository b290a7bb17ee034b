"""Special tokens by their part: what begins a text, what ends it or a turn, and how names in files become ids."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")

# Names under which published vocabularies end a document; a special token of such a name always ends generation.
_ENDS_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")

# Names that end a turn; one of them ends generation where the chat template writes it.
_ENDS_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>", "<|eot|>",
    "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "[EOT]", "<|endofturn|>",
)  # fmt: skip

_GUESSES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "[BOS]"),
    "eos_token": _ENDS_OF_DOCUMENT,
    "unk_token": ("<unk>", "[UNK]", "<|unk|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}


def role_name(value: Any) -> str | None:
    """The token in an entry such as `"eos_token": "</s>"` or `"eos_token": {"content": "</s>", …}`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def guess_roles(special: Collection[str]) -> dict[str, str]:
    """Parts that special tokens have by their usual names, for files that do not say."""
    found = {role: next((name for name in names if name in special), None) for role, names in _GUESSES.items()}
    return {role: name for role, name in found.items() if name is not None}


def end_ids(declared: Iterable[int | None], special: Mapping[str, int], template: str | None) -> tuple[int, ...]:
    """Every id that ends generation: the declared ones first, then ends of document, then ends of turn of the template.

    special   the vocabulary's special tokens and their ids.
    gpt-oss writes `<|end|>` between the channels of one answer: with `<|return|>` and `<|call|>` there it does not end it.
    """
    ids = [index for index in declared if index is not None]
    ids += [special[name] for name in _ENDS_OF_DOCUMENT if name in special]
    turn_names = [name for name in _ENDS_OF_TURN if name in special and name in (template or "")]
    if "<|return|>" in special and "<|call|>" in special:
        turn_names = [name for name in turn_names if name != "<|end|>"]
    ids += [special[name] for name in turn_names]
    return tuple(dict.fromkeys(ids))


def declared_ids(value: Any, size: int) -> list[int]:
    """Ids in a field that holds a number, a list of numbers or nothing; one beyond the vocabulary can never appear and is left out."""
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < size]
