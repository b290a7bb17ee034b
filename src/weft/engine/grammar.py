"""Constrained output: which tokens a JSON schema, a regular expression or a grammar allows next.

llguidance (an optional dependency) walks the grammar over the bytes of the vocabulary's tokens and answers with a mask a token. Tokens that
the mask leaves out get a logit of -inf before anything else happens to the logits; a constrained row then goes the way of every other.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weft.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

    from weft.tokenizer import Tokenizer

Kind = Literal["json_schema", "regex", "lark"]
NAMES: dict[Kind, str] = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}

# One space after a comma and a colon, none elsewhere: a small model that may write any white space can write it for ever. A schema that
# wants it otherwise says so under its own key "x-guidance".
JSON_LAYOUT: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
KEPT_GRAMMARS = 64


@dataclass(frozen=True)
class Grammar:
    """The texts that a request may be answered with.

    kind    json_schema (JSON Schema as text), regex (Rust's syntax, the whole text must match), lark (Lark's syntax with llguidance's
            additions; the rule `start` is the whole text).
    source  its text.
    Raises UserError for another kind, and for a schema that is no JSON.
    """

    kind: Kind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in NAMES:
            raise UserError(f"the grammar's kind is {self.kind!r}; give one of {', '.join(NAMES)}.")
        if not isinstance(self.source, str):
            raise UserError(f"the {NAMES[self.kind]} is a {type(self.source).__name__}; give it as text.")
        if self.kind == "json_schema":
            _check_schema(self.source)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "Grammar":
        """JSON that is valid under a schema."""
        return cls("json_schema", json.dumps(schema))


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the JSON schema is not valid JSON: {error}. Correct it.") from None
    if not isinstance(schema, dict):
        raise UserError(f'the JSON schema is a {type(schema).__name__}; give an object such as {{"type": "object"}}.')


class Matcher:
    """One continuation on its way through a grammar.

    allowed  [V] bool, which tokens may come next; an end token only where the text so far is complete.
    done     the text is complete and nothing may follow.
    failed   why the grammar cannot be followed any further, None where it can.
    """

    def __init__(self, matcher: "LLMatcher", ends: Tensor) -> None:
        self._matcher, self._ends = matcher, ends
        self._look()

    def copy(self) -> "Matcher":
        """Another continuation from the same place."""
        return Matcher(self._matcher.deep_copy(), self._ends)

    def accept(self, token: int) -> None:
        """Go on with a token that was allowed."""
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self.allowed = (bits[:, None] >> _BITS & 1).flatten()[: len(self._ends)].bool()
        stuck = not (self.allowed & ~self._ends).any()
        self.done = stuck and self._matcher.is_accepting()
        self.failed: str | None = None
        if self._matcher.is_error():
            self.failed = _reason(self._matcher.get_error())
        elif stuck and not self.done:
            self.failed = "no token of the vocabulary can go on"


_BITS = torch.arange(8, dtype=torch.uint8)


class GrammarCompiler:
    """Makes matchers for one vocabulary; safe to call from several threads.

    vocab  ids that the model has logits for.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of a grammar. Raises UserError for one that is malformed or that no text satisfies."""
        with self._lock:
            found = self._compiled.get(grammar)
        if found is None:
            found = self._compile(grammar)  # may take a second, during which the others need not wait
        with self._lock:
            self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            return found.copy()

    def _compile(self, grammar: Grammar) -> Matcher:
        tokenizer = self._bridge
        from llguidance import LLMatcher

        name = NAMES[grammar.kind]
        try:
            if grammar.kind == "json_schema":
                text = LLMatcher.grammar_from_json_schema(grammar.source, defaults=JSON_LAYOUT)
            elif grammar.kind == "regex":
                text = LLMatcher.grammar_from_regex(grammar.source)
            else:
                text = LLMatcher.grammar_from_lark(grammar.source)
            found = LLMatcher(tokenizer, text, log_level=0)
        except ValueError as error:
            raise UserError(f"the {name} cannot be used: {_reason(str(error))}. Correct it.") from None
        if found.is_error():
            raise UserError(f"the {name} cannot be used: {_reason(found.get_error())}. Correct it.")
        ends = torch.zeros(self.vocab, dtype=torch.bool)
        ends[[token for token in self.tokenizer.eos_ids if token < self.vocab]] = True
        matcher = Matcher(found, ends)
        if matcher.done:
            raise UserError(f"the {name} allows the empty text alone; give one that a text can match.")
        if matcher.failed:
            raise UserError(
                f"the {name} cannot be satisfied: no text of this model's vocabulary matches it. Give one that a text can match."
            )
        return matcher

    @cached_property
    def _bridge(self) -> "LLTokenizer":
        """The vocabulary as llguidance sees it, with one more end token, so that a tokenizer without any has one too."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise UserError("constrained output needs the package llguidance; install it with: pip install 'weft[serve]'") from None
        if self.tokenizer.style not in ("byte_level", "sentencepiece"):
            raise UserError(
                f"this tokenizer spells text in {self.tokenizer.style} style, where a token's text depends on its neighbours; constrained "
                "output needs a byte-level or SentencePiece vocabulary: use another model."
            )
        ends = [token for token in self.tokenizer.eos_ids if token < self.vocab]
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocab)), eos_token=[*ends, self.vocab])


class _Vocabulary:
    """What llguidance asks of a tokenizer, in its names."""

    def __init__(self, tokenizer: "Tokenizer", vocab: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = vocab, None
        self.special_token_ids = [*(token for token in sorted(tokenizer.special_ids) if token < vocab), vocab]
        special = set(self.special_token_ids)
        names = [(tokenizer.token(index) or "").encode() if index in special else b"" for index in range(vocab + 1)]
        self.tokens = [names[index] or tokenizer.token_bytes(index) for index in range(vocab)] + [b"<end of text>"]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), bos=False)


def constrain(logits: Tensor, matchers: Sequence[Matcher | None]) -> Tensor:
    """Logits [B, V] with -inf for tokens that a row's matcher does not allow; rows without a matcher stay as they are."""
    rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return logits
    forbidden = torch.stack([~matcher.allowed for matcher in matchers if matcher is not None]).to(logits.device)
    logits = logits.clone()
    logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)
    return logits


def _reason(message: str) -> str:
    """One line of what llguidance says: that of the regular expressions' parser where there is one, else the first."""
    lines = message.strip().split("\n")
    found = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return found.strip().rstrip(".")
