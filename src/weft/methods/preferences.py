"""Answers that people compared, as examples."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from weft.data.collate import Compared, collate_compared
from weft.data.encode_records import Encoded, EncodedPair
from weft.data.record_kinds import Preference
from weft.errors import UserError
from weft.methods.method import Place
from weft.methods.records import encoded, encoder_of, example_batches, read_split
from weft.train.job import BatchSource
from weft.train.plan import Plan


def compared_batches(plan: Plan, place: Place, grouped: bool, left_out: frozenset[int] = frozenset()) -> BatchSource:
    """Batches of compared answers.

    grouped   all pairs of one prompt are one example, in which each answer is read once.
    left_out  ids that are not scored.
    """
    encoder = encoder_of(plan)

    def examples(records: Sequence[Preference]) -> list[Compared]:
        pairs = encoded(plan, place, records, lambda record: (record, _without(encoder.preference(record), left_out, record)))
        prompts: dict[str, list[EncodedPair]] = {}
        for number, (record, pair) in enumerate(pairs):
            said = json.dumps((record.prompt, record.tools), sort_keys=True, default=str) if grouped else str(number)
            prompts.setdefault(said, []).append(pair)
        return [_example(pairs) for pairs in prompts.values()]

    made, held_out = (examples(records) for records in read_split(plan, place, Preference))
    widest = max(len(answer.ids) for example in [*made, *held_out] for answer in example.answers)
    return example_batches(plan, place, made, held_out, collate_compared, widest)


def _example(pairs: Sequence[EncodedPair]) -> Compared:
    """The pairs of one prompt, with an answer that is in several of them there once."""
    places: dict[tuple[int, ...], int] = {}
    answers: list[Encoded] = []
    for answer in (answer for pair in pairs for answer in (pair.chosen, pair.rejected)):
        if answer.ids not in places:
            places[answer.ids] = len(answers)
            answers.append(answer)
    compared = tuple((places[pair.chosen.ids], places[pair.rejected.ids]) for pair in pairs)
    return Compared(tuple(answers), compared, tuple(pair.margin for pair in pairs))


def _without(pair: EncodedPair, left_out: frozenset[int], record: Preference) -> EncodedPair:
    """A pair of which some ids are not scored; raises UserError where nothing that differs is left of it."""
    if pair.chosen.ids == pair.rejected.ids:
        raise UserError(f"{record.origin}: chosen and rejected are the same as far as they are read; raise batch.length, or drop the pair.")
    made: dict[str, Any] = {}
    for name in ("chosen", "rejected") if left_out else ():
        answer: Encoded = getattr(pair, name)
        trained = tuple(kept and index not in left_out for index, kept in zip(answer.ids, answer.trained, strict=True))
        if not any(trained):
            raise UserError(f"{record.origin}: nothing of {name} is scored but the template's own tokens; drop the pair.")
        made[name] = replace(answer, trained=trained)
    return replace(pair, **made)
