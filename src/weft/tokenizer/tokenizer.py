"""Text to ids and back, with special tokens, BOS and chat templates in one place."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from weft.errors import UserError
from weft.files import atomic_write
from weft.tokenizer import chat
from weft.tokenizer.special import ROLES, end_ids
from weft.tokenizer.stream import StreamDecoder
from weft.tokenizer.token_text import Style, TokenText


@dataclass(frozen=True)
class Settings:
    """What a tokenizer's own files say beside its vocabulary.

    roles            the tokens of special parts, keyed as in `tokenizer_config.json`: `bos_token`, `eos_token`, `unk_token` …
    prefix, suffix   ids that the tokenizer puts around every text: usually BOS or nothing before, and nothing after.
    ends             further ids that end generation, as `generation_config.json` lists them.
    chat_templates   templates by name; `default` is the one used, `tool_use` where there are tools.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)


class TextEncoder(Protocol):
    """An encoder used in place of the backend's, for a format whose own rules the backend follows only nearly."""

    def __call__(self, text: str, special: bool) -> list[int]: ...


class Tokenizer:
    """One vocabulary with its rules; ids are those of the model that it belongs to.

    backend        the `tokenizers.Tokenizer` that does the work and is saved as `tokenizer.json`.
    text_encoder   encodes instead of the backend where given.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Settings | None = None, text_encoder: TextEncoder | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.settings = settings or Settings()
        self.text_encoder = text_encoder
        self._text = TokenText(backend)
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self.special_ids = frozenset(self._special.values())
        literal = [token for token in added.values() if token.special]
        # Where a special token might be found in other words than its own, the text cannot tell whether it is in there.
        normalized = backend.normalizer is not None and any(token.normalized for token in literal)
        self._always_plain = normalized or isinstance(backend.model, tokenizers.models.Unigram)
        self._literal = re.compile("|".join(re.escape(token.content) for token in literal)) if literal else None

    # Ids of a part, from the names in the settings.

    def _role_id(self, role: str) -> int | None:
        token = self.settings.roles.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def style(self) -> Style:
        """How tokens spell text: `byte_level` (GPT-2's alphabet), `sentencepiece` (`▁` for spaces), `wordpiece`, `suffix` or `other`."""
        return self._text.style

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs: one more than the highest id."""
        return self._text.num_ids

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos_token")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own settings put the BOS before every text."""
        return self.bos_id is not None and self.bos_id in self.settings.prefix

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text; `eos_ids` has all those at which generation stops."""
        return self._role_id("eos_token")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends generation, `eos_id` first: also the end of a turn that the chat template writes."""
        declared = [self.eos_id, *self.settings.ends]
        return end_ids(declared, self._special, self.chat_template)

    @property
    def pad_id(self) -> int | None:
        """The padding id that the files name, if any. Weft masks padding by length, never by this id."""
        return self._role_id("pad_token")

    @property
    def unk_id(self) -> int | None:
        return self._role_id("unk_token")

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the conversation format; None for a model without one."""
        templates = self.settings.chat_templates
        return templates.get("default") or next(iter(templates.values()), None)

    # Text to ids.

    def encode(self, text: str, special: bool = False, bos: bool | None = None) -> list[int]:
        """Ids of a text.

        special   read special tokens that are spelled out in the text, such as `<|im_end|>`, as those tokens; otherwise they are
                  plain text, as what a user typed must be.
        bos       None adds what the tokenizer's own settings say (BOS or nothing for most, [CLS] and [SEP] for BERT); True adds the
                  BOS, False adds nothing. A text that already begins with it does not get a second one.
        Raises UserError for lone surrogates, and for `bos=True` where there is no BOS.
        """
        check_unicode(text)
        return self._framed(self._ids([text], special)[0], bos)

    def encode_batch(self, texts: Sequence[str], special: bool = False, bos: bool | None = False) -> list[list[int]]:
        """Ids of many texts, in parallel. As training data has its own marks between documents, nothing is added unless asked for."""
        for text in texts:
            check_unicode(text)
        return [self._framed(ids, bos) for ids in self._ids(texts, special)]

    def encode_cut(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of a text with its special tokens read, as `apply_chat` reads it, and for each place in the text which id begins there.

        cuts   [k] characters into the text. A token that lies across one belongs to what stands before it.
        Returns (ids, [k] indices into them); an index is `len(ids)` where nothing follows.
        """
        check_unicode(text)
        if self.text_encoder is None:
            encoding = self.backend.encode(text, add_special_tokens=False)
            ids, starts, ends = encoding.ids, [start for start, _ in encoding.offsets], [end for _, end in encoding.offsets]
            # Some tokenizers trim spaces off: one that is a token by itself then begins and ends where the next one begins.
            places = [max(bisect_left(starts, cut), bisect_right(ends, cut)) for cut in cuts]
        else:
            ids = self.text_encoder(text, True)
            places = [_agreement(ids, self.text_encoder(text[:cut], True)) for cut in cuts]
        framed = self._framed(ids, bos=True) if self.adds_bos else ids
        return framed, [place + len(framed) - len(ids) for place in places]

    def special_in(self, text: str) -> str | None:
        """The first special token that is spelled out in a text."""
        found = self._literal.search(text) if self._literal is not None else None
        return None if found is None else found[0]

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if self.text_encoder is not None:
            return [self.text_encoder(text, special) for text in texts]
        plain = not special and self._literal is not None and (self._always_plain or any(map(self._literal.search, texts)))
        backend = self._plain if plain else self.backend
        if len(texts) == 1:
            return [backend.encode(texts[0], add_special_tokens=False).ids]
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy of the backend to which special tokens in a text are ordinary characters."""
        state = json.loads(self.backend.to_str())
        model = state["model"]
        if model["type"] == "Unigram":
            # Its search would still find `</s>` among the pieces; with a space, which the normalizer leaves in no text, it cannot.
            hidden = {*self._special, model["vocab"][model["unk_id"]][0]} if model.get("unk_id") is not None else {*self._special}
            model["vocab"] = [[f" {piece}" if piece in hidden else piece, score] for piece, score in model["vocab"]]
            state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
        plain = tokenizers.Tokenizer.from_str(json.dumps(state))
        plain.encode_special_tokens = True
        return plain

    def _framed(self, ids: list[int], bos: bool | None) -> list[int]:
        if bos is False:
            return ids
        prefix, suffix = (self.settings.prefix, self.settings.suffix) if bos is None else (self._forced_bos(), ())
        if prefix and tuple(ids[: len(prefix)]) == prefix:
            prefix = ()
        return [*prefix, *ids, *suffix]

    def _forced_bos(self) -> tuple[int, ...]:
        if self.bos_id is None:
            raise UserError("a BOS was asked for, but this tokenizer has none; leave it out or use a tokenizer that has one.")
        return (self.bos_id,)

    # Ids to text.

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD and ids without a token nothing."""
        return self._text.decode([index for index in ids if not (skip_special and index in self.special_ids)])

    def stream_decoder(self, skip_special: bool = True, whole_text: bool = True) -> StreamDecoder:
        """A decoder for ids that come one at a time; without `whole_text` the space before SentencePiece's first word is shown."""
        return StreamDecoder(self._text, self.special_ids if skip_special else frozenset(), whole_text)

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes of text that a token stands for, possibly part of a character; a special token stands for no text."""
        return b"" if index in self.special_ids else self._text.of(index)

    def token(self, index: int) -> str | None:
        """A token as the vocabulary spells it (`Ġthe`, `▁the`, `##ing`), None for an id without one."""
        return self.backend.id_to_token(index) if index >= 0 else None

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, None where it has none."""
        return self.backend.token_to_id(token)

    # Conversations.

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text; see `weft.tokenizer.chat.render` for the arguments. Raises UserError without a chat template."""
        template = self.chat_template
        if tools and "tool_use" in self.settings.chat_templates:
            template = self.settings.chat_templates["tool_use"]
        if template is None:
            raise UserError("this model has no chat template; use a model trained for conversations, or complete plain text with it.")
        return chat.render(template, messages, add_generation_prompt, tools, self.settings.roles, variables)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A conversation as ids: the rendered text with its special tokens read, and the tokenizer's own BOS if not yet there."""
        text = self.render_chat(messages, add_generation_prompt, tools, variables)
        check_unicode(text)
        ids = self._ids([text], special=True)[0]
        return self._framed(ids, bos=True) if self.adds_bos else ids

    # Files.

    def save(self, folder: str | Path) -> None:
        """Write the files from which `load_tokenizer` and transformers' AutoTokenizer make an equal tokenizer.

        tokenizer.json, tokenizer_config.json, special_tokens_map.json and, where there is a template, chat_template.jinja (others in
        additional_chat_templates/); each is written whole or not at all, and other files of the folder stay.
        """
        folder = Path(folder)
        roles = {role: self.settings.roles[role] for role in ROLES if role in self.settings.roles}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
        prefix, suffix = self.settings.prefix, self.settings.suffix
        if prefix in ((), (self.bos_id,)) and suffix in ((), (self.eos_id,)):
            config |= {"add_bos_token": bool(prefix), "add_eos_token": bool(suffix)}
        atomic_write(folder / "tokenizer.json", self.backend.to_str(pretty=True) + "\n")
        atomic_write(folder / "tokenizer_config.json", _json(config))
        atomic_write(folder / "special_tokens_map.json", _json(roles))
        self._save_templates(folder)

    def _save_templates(self, folder: Path) -> None:
        named = {
            folder / "additional_chat_templates" / f"{name}.jinja": template
            for name, template in self.settings.chat_templates.items()
            if template != self.chat_template and re.fullmatch(r"[\w-]+", name)
        }
        if self.chat_template is not None:
            named[folder / "chat_template.jinja"] = self.chat_template
        for path, template in named.items():
            atomic_write(path, template)
        for path in [folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")]:
            if path not in named:
                path.unlink(missing_ok=True)  # another tokenizer's, saved here before

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plain"}  # a pickled copy would lose its setting


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _agreement(ids: Sequence[int], beginning: Sequence[int]) -> int:
    """Where in a text's ids those of its beginning end; one that goes on beyond the beginning is counted in."""
    shared = next((i for i, (a, b) in enumerate(zip(ids, beginning, strict=False)) if a != b), min(len(ids), len(beginning)))
    return shared if shared == len(beginning) else min(shared + 1, len(ids))


def check_unicode(text: str) -> None:
    """Raise UserError where a text has lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}: that is no Unicode text and has "
            "no tokens. Remove it, or decode the input as UTF-8 with errors='replace'."
        ) from None
