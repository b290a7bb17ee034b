"""Chat templates for models that have none, and how a tokenizer is given one."""

from dataclasses import replace
from pathlib import Path

from weft.errors import UserError, nearest
from weft.files import read_text
from weft.tokenizer.tokenizer import Tokenizer

# OpenAI's ChatML, for vocabularies that have its two tokens.
_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Headings that any tokenizer can spell; the only special token is the end of a text, after each answer.
_PLAIN = """\
{%- for message in messages %}
{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}
{{- (eos_token + '\\n') if message['role'] == 'assistant' else '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Assistant:\\n' }}{%- endif %}
"""
TEMPLATES = {"chatml": _CHATML, "plain": _PLAIN}


def with_chat_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The same tokenizer with another chat template: a name in `TEMPLATES`, or a file of Jinja. Raises UserError for anything else, and
    for ChatML where the vocabulary does not have its tokens.
    """
    if template not in TEMPLATES and not Path(template).is_file():
        names = " or ".join(TEMPLATES)
        raise UserError(f"there is no chat template '{template}'.{nearest(template, TEMPLATES)} Give {names}, or a file of Jinja.")
    if template == "chatml":
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if tokenizer.token_id(token) not in tokenizer.special_ids]
        if missing:
            raise UserError(f"chatml writes {missing[0]}, which is no special token of this tokenizer; take plain, which any can spell.")
    text = TEMPLATES[template] if template in TEMPLATES else read_text(template, "chat template")
    return Tokenizer(tokenizer.backend, replace(tokenizer.settings, chat_templates={"default": text}), tokenizer.text_encoder)
