"""Formats of tuning data: which columns tell them, and how a row becomes records.

Names are TRL's; Alpaca and ShareGPT are converted to messages. Column names are compared in lower case.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from weft.data.messages import common_beginning, messages_of
from weft.data.record_kinds import Completion, Conversation, Labelled, Message, PlainText, Preference, Prompt, Record, Said
from weft.data.rows import KINDS, check_names, text_of
from weft.errors import UserError, nearest

HH_ANSWER = re.compile(r"\n\nAssistant:")
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One format.

    needs    columns that all have to be there; alternatives are divided by `|`.
    refuses  columns that may not be there.
    kind     of the records that `convert(columns, origin)` makes of a row.
    """

    name: str
    needs: tuple[str, ...]
    kind: type
    convert: Callable[[Columns, str], list[Record]]
    refuses: tuple[str, ...] = ()

    def missing(self, names: Sequence[str]) -> list[str]:
        """The columns that are not among `names`, alternatives as the first of them."""
        return [need.split("|")[0] for need in self.needs if not set(need.split("|")) & set(names)]

    def tells(self, names: Sequence[str]) -> bool:
        """Whether one of its columns is there that is not in several formats."""
        return bool({name for need in self.needs for name in need.split("|")} & set(names) - {"prompt", "text", "label"})

    @property
    def columns(self) -> str:
        return ", ".join(need.replace("|", " or ") for need in self.needs)


def detect(names: Sequence[str], kinds: Sequence[type] = ()) -> Format | None:
    """The format that has these columns (lower case): the first one whose records are of one of `kinds`, else the first one."""
    fitting = [known for known in FORMATS if not known.missing(names) and not set(known.refuses) & set(names)]
    return next((known for known in fitting if known.kind in kinds), fitting[0] if fitting else None)


def unrecognised(names: Sequence[str], origin: str, kinds: Sequence[type] = ()) -> UserError:
    """Why columns are no format, or none of `kinds`: which one comes nearest, and what it lacks."""
    held = f"it has {', '.join(names)}" if names else "it is empty"
    formats = [known for known in FORMATS if not kinds or known.kind in kinds]
    if {"prompt", "completion", "label"} <= set(names):
        return UserError(
            f"{origin}: answers with a label each ({held}) are not read; keep the good ones as prompt and completion, or write pairs "
            "(prompt, chosen, rejected)."
        )
    partial = [known for known in formats if len(known.needs) > 1 and len(known.missing(names)) < len(known.needs)]
    if partial:
        best = min(partial, key=lambda known: (len(known.missing(names)), not known.tells(names), not _meant(known, names)))
        needs = f"{best.name} records need {best.columns}"
        return UserError(f"{origin}: column '{best.missing(names)[0]}' is missing ({held}; {needs}).{_meant(best, names)} Add it.")
    known = sorted({name for form in formats for need in form.needs for name in need.split("|")})
    guess = next((found for name in names if (found := nearest(name, known))), "")
    allowed = "; ".join(form.columns for form in formats)
    what = "no columns of a known format" if not kinds else "not the columns that are needed here"
    return UserError(f"{origin}: {what} ({held}).{guess} Give: {allowed}.")


def _meant(known: Format, names: Sequence[str]) -> str:
    """Which of the columns that are there may be a misspelling of the one that is missing."""
    needs = "|".join(known.needs).split("|")
    return nearest(known.missing(names)[0], [name for name in names if name not in needs])


def convert(known: Format, row: Columns, origin: str) -> list[Record]:
    """The records of a row; raises UserError naming the column."""
    check_names(map(str, row), origin)
    columns = {str(name).lower(): value for name, value in row.items()}
    lacking = known.missing([name for name, value in columns.items() if value is not None])
    if lacking:
        problem = "null" if lacking[0] in columns else f"missing (the record has {', '.join(columns) or 'none'})"
        raise UserError(
            f"{origin}: column '{lacking[0]}' is {problem}; all records of the file need {known.columns}: fill it in, or drop the record."
        )
    return known.convert(columns, origin)


def _at(origin: str, column: str) -> str:
    return f"{origin}: column '{column}'"


def _said(value: Any, where: str, after: str = "") -> Said:
    """Text, or messages."""
    return messages_of(value, where, after) if isinstance(value, list | tuple) else text_of(value, where)


def _tools(columns: Columns, origin: str, said: Said = ()) -> tuple[Message, ...]:
    """What an assistant may call; raises UserError where what is `said` is text, into which no chat template writes it."""
    tools = columns.get("tools") or ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{_at(origin, 'tools')} is no list of objects; give the JSON schemas of the functions, or leave it out.")
    if tools and isinstance(said, str):
        raise UserError(f"{_at(origin, 'tools')} is given, but no chat template writes it before text; give messages, or leave it out.")
    return tuple(dict(tool) for tool in tools)


def _dialogue(column: str) -> Callable[[Columns, str], list[Record]]:
    """A conversation in one column, after a `system` column where there is one."""

    def convert(columns: Columns, origin: str) -> list[Record]:
        value = columns[column]
        system = columns.get("system")
        if isinstance(value, list) and isinstance(system, str) and system.strip():
            value = [{"role": "system", "content": system}, *value]
        messages = messages_of(value, _at(origin, column))
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{_at(origin, column)} has no assistant message, so there is nothing to learn; add the answer, or drop it.")
        return [Conversation(messages, origin, _tools(columns, origin))]

    return convert


def _completion(columns: Columns, origin: str) -> list[Record]:
    prompt, completion = _said(columns["prompt"], _at(origin, "prompt")), _said(columns["completion"], _at(origin, "completion"), "user")
    _same_form(origin, {"prompt": prompt, "completion": completion})
    return [Completion(prompt, completion, origin, _tools(columns, origin, prompt))]


def _same_form(origin: str, parts: Mapping[str, Said]) -> None:
    """Raise UserError where some parts are text and others messages, and where messages are not a question and its answers."""
    names, texts = list(parts), [isinstance(said, str) for said in parts.values()]
    if len(set(texts)) > 1:
        one, other = names[texts.index(True)], names[texts.index(False)]
        raise UserError(f"{_at(origin, one)} is text, but '{other}' is messages; give both as text, or both as messages.")
    for name, said in parts.items():
        if isinstance(said, str):
            continue
        last, wanted = said[-1]["role"], ("user", "tool") if name == "prompt" else ("assistant",)
        if last not in wanted:
            raise UserError(f"{_at(origin, name)} ends with a message from {last}; it has to end with one from {' or '.join(wanted)}.")


def _alpaca(columns: Columns, origin: str) -> list[Record]:
    instruction = text_of(columns["instruction"], _at(origin, "instruction"))
    given = columns.get("input")
    context = "" if given is None else text_of(given, _at(origin, "input"), may_be_empty=True)
    answer = next(name for name in ("output", "response") if columns.get(name) is not None)
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    told = columns.get("system")
    system = ({"role": "system", "content": told},) if isinstance(told, str) and told.strip() else ()
    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": text_of(columns[answer], _at(origin, answer))})
    return [Conversation((*system, *turns), origin, _tools(columns, origin))]


def _preference(columns: Columns, origin: str) -> list[Record]:
    """A pair: with a prompt, or as two whole conversations that share a beginning."""
    places = {name: _at(origin, name) for name in ("prompt", "chosen", "rejected")}
    chosen, rejected, prompt = columns["chosen"], columns["rejected"], columns.get("prompt")
    messages = isinstance(chosen, list) and isinstance(rejected, list)
    if messages and (prompt is None or (_speaks_first(chosen) and _speaks_first(rejected))):
        parts = _shared_messages(chosen, rejected, places)
    elif prompt is None:
        parts = _shared_text(text_of(chosen, places["chosen"]), text_of(rejected, places["rejected"]), origin)
    else:
        asked = [{"role": "user", "content": prompt}] if messages and isinstance(prompt, str) else prompt
        answers = _said(chosen, places["chosen"], "user"), _said(rejected, places["rejected"], "user")
        parts = _said(asked, places["prompt"]), *answers
    _same_form(origin, dict(zip(places, parts, strict=True)))
    if parts[1] == parts[2]:
        raise UserError(f"{places['chosen']} and 'rejected' are the same answer, which prefers nothing; drop the record.")
    return [Preference(*parts, origin, _margin(columns, origin), _tools(columns, origin, parts[0]))]


def _speaks_first(value: Sequence[Any]) -> bool:
    """Whether messages begin with someone other than the assistant: then they are a whole conversation, not an answer."""
    return bool(value) and isinstance(value[0], Mapping) and (value[0].get("role") or value[0].get("from")) not in ("assistant", "gpt")


def _margin(columns: Columns, origin: str) -> float:
    margin = columns.get("margin")
    if margin is None:
        return 0.0
    try:
        number = float(margin) if isinstance(margin, int | float) and not isinstance(margin, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise UserError(f"{_at(origin, 'margin')} is {repr(margin)[:40]}; say by how much the chosen answer is better, 0 or more.")
    return number


def _shared_messages(chosen: list[Any], rejected: list[Any], places: Mapping[str, str]) -> tuple[Said, Said, Said]:
    first, second = messages_of(chosen, places["chosen"]), messages_of(rejected, places["rejected"])
    shared = common_beginning(first, second)
    while shared and first[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1  # answers that are equal but for more turns, or equal altogether
    if not shared:
        raise UserError(f"{places['chosen']} and 'rejected' share no beginning that could be the prompt; give a column `prompt`.")
    return first[:shared], first[shared:], second[shared:]


def _shared_text(chosen: str, rejected: str, origin: str) -> tuple[Said, Said, Said]:
    """Two texts cut after the beginning that they share: in Anthropic's dialogues after the last "Assistant:", else between words."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    answers = [match.end() for match in HH_ANSWER.finditer(chosen, 0, shared)]
    if chosen.startswith("\n\nHuman:") and answers:
        cut = answers[-1]
    else:
        cut = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared))
    if cut <= 0:
        raise UserError(f"{_at(origin, 'chosen')} and 'rejected' share no beginning that could be the prompt; give a column `prompt`.")
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        text_of(said[cut:], f"{origin}: the answer in column '{name}'")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _ranked(columns: Columns, origin: str) -> list[Record]:
    """Several answers to one prompt as all its pairs, better one first (InstructGPT, section 3.5); equal ranks make no pair.

    `ranking` has a number an answer, 1 being the best, or `scores` one that is larger for a better answer; without either the answers are
    in order, best first.
    """
    prompt, responses = _said(columns["prompt"], _at(origin, "prompt")), columns["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{_at(origin, 'responses')} is no list of two answers or more; give the answers to compare.")
    answers = [_said(said, f"{_at(origin, 'responses')}, answer {number}", "user") for number, said in enumerate(responses, 1)]
    for number, answer in enumerate(answers, 1):
        _same_form(origin, {"prompt": prompt, f"responses[{number}]": answer})
    name = next((name for name in ("ranking", "scores") if columns.get(name) is not None), None)
    ranks = list(range(len(answers))) if name is None else columns[name]
    numbers = isinstance(ranks, list) and all(isinstance(rank, int | float) and rank == rank for rank in ranks)
    if not numbers or len(ranks) != len(answers):
        raise UserError(f"{_at(origin, str(name))} is {ranks!r}; give one number for each of the {len(answers)} responses.")
    order = [-rank for rank in ranks] if name == "scores" else ranks
    tools = _tools(columns, origin, prompt)
    pairs: list[Record] = []
    for one, other in combinations(sorted(range(len(answers)), key=lambda index: order[index]), 2):
        if order[one] == order[other]:
            continue
        if answers[one] == answers[other]:
            raise UserError(f"{_at(origin, 'responses')} has the same answer twice (number {one + 1} and {other + 1}); leave one out.")
        pairs.append(Preference(prompt, answers[one], answers[other], origin, tools=tools))
    if not pairs:
        raise UserError(f"{_at(origin, str(name))} ranks all answers alike, which prefers nothing; drop the record.")
    return pairs


def _labelled(columns: Columns, origin: str) -> list[Record]:
    column = "text" if columns.get("text") is not None else "sentence"
    label = columns["label"]
    if isinstance(label, bool):
        label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, int | str):
        kind = KINDS.get(type(label), type(label).__name__)
        raise UserError(f"{_at(origin, 'label')} is {kind} ({label!r}), not a class; give a whole number or a name.")
    named = text_of(label, _at(origin, "label")) if isinstance(label, str) else label
    return [Labelled(text_of(columns[column], _at(origin, column)), named, origin)]


def _question(columns: Columns, origin: str) -> list[Record]:
    asked: Message = {"role": "user", "content": text_of(columns["question"], _at(origin, "question"))}
    facts = {name: value for name, value in columns.items() if name != "question"}
    return [Prompt((asked,), origin, facts, _tools(columns, origin))]


def _prompt(columns: Columns, origin: str) -> list[Record]:
    prompt = _said(columns["prompt"], _at(origin, "prompt"))
    _same_form(origin, {"prompt": prompt})
    facts = {name: value for name, value in columns.items() if name != "prompt"}
    return [Prompt(prompt, origin, facts, () if isinstance(prompt, str) else _tools(columns, origin))]


def _text(columns: Columns, origin: str) -> list[Record]:
    return [PlainText(text_of(columns["text"], _at(origin, "text")), origin)]


FORMATS = (
    Format("ranked", ("prompt", "responses"), Preference, _ranked),
    Format("preference", ("chosen", "rejected"), Preference, _preference),
    Format("messages", ("messages",), Conversation, _dialogue("messages")),
    Format("ShareGPT", ("conversations",), Conversation, _dialogue("conversations")),
    Format("prompt and completion", ("prompt", "completion"), Completion, _completion, refuses=("label",)),
    Format("Alpaca", ("instruction", "output|response"), Conversation, _alpaca),
    Format("labelled", ("text|sentence", "label"), Labelled, _labelled),
    Format("question and answer", ("question",), Prompt, _question),
    Format("prompt", ("prompt",), Prompt, _prompt, refuses=("completion", "chosen", "rejected", "responses")),
    Format("text", ("text",), PlainText, _text),
)
KNOWN = frozenset(name for known in FORMATS for need in known.needs for name in need.split("|"))
