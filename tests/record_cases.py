"""A small tokenizer with chat templates, and records, that the tests of tuning share."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from weft.data.encode_records import Encoded
from weft.tokenizer import Settings, Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, with the marks that transformers takes its masks from.
TAGGED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "It sat on the mat, ¡sí! 🐈"},
)
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|message|>", "<|channel|>", "<|end_of_text|>",
    "<|start_of_role|>", "<|end_of_role|>", "<|user|>", "<|assistant|>", "<|system|>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "[INST]", "[/INST]", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


@functools.cache
def _backend() -> str:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat\n\nwhat is two plus two? it is four assistant user"] * 20, trainer)
    text: str = made.to_str()
    return text


def chat_tokenizer(template: str | None = CHATML, bos: bool = False) -> Tokenizer:
    """A byte-level tokenizer of some 350 ids with those special tokens that the template writes, `<s>` and `</s>`.

    bos   put `<s>` before every text, as Llama's settings do.
    """
    backend = tokenizers.Tokenizer.from_str(_backend())
    names = [name for name in SPECIAL if name in ("<s>", "</s>") or name in (template or "")]
    backend.add_special_tokens([name for name in names if name not in ("<|return|>", "<|call|>") or "<|return|>" in (template or "")])
    prefix = (backend.token_to_id("<s>"),) if bos else ()
    templates = {} if template is None else {"default": template}
    return Tokenizer(backend, Settings({"bos_token": "<s>", "eos_token": "</s>"}, prefix, chat_templates=templates))


def marked(tokenizer: Tokenizer, text: Encoded) -> str:
    """A text with what is trained on in ⟦brackets⟧."""
    shown, run = "", []
    for token, trained in [*zip(text.ids, text.trained, strict=True), (-1, None)]:
        if run and trained != run[-1][1]:
            said = tokenizer.decode([one for one, _ in run], skip_special=False)
            shown += f"⟦{said}⟧" if run[-1][1] else said
            run = []
        run.append((token, trained))
    return shown


def write(path: Path, records: Sequence[Any]) -> Path:
    """Records as JSON Lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
