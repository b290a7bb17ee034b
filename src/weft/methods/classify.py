"""Classifiers: labelled texts, and a linear head with an output for each class."""

from collections.abc import Collection, Sequence

from weft.data.collate import Classified, collate_classified
from weft.data.record_kinds import Labelled
from weft.errors import UserError
from weft.methods.method import Place, Setup
from weft.methods.records import encoded, encoder_of, example_batches, read_split
from weft.methods.score import train_score
from weft.nn import Model, add_score
from weft.objectives.classify import Classify
from weft.objectives.settings import ClassifySettings
from weft.spec import ModelSpec
from weft.train.job import BatchSource
from weft.train.plan import Plan


class ClassifyMethod:
    def check(self, plan: Plan) -> None:
        encoder_of(plan)
        own = next((stage.name or f"stage {n}" for n, stage in enumerate(plan.recipe.stages or (), 1) if stage.data is not None), None)
        if own is not None:
            raise UserError(f"{own} has data of its own, whose labels could mean other classes; give all texts under the recipe's data.")

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        train, valid = read_split(plan, place, Labelled)
        encoder = encoder_of(plan)
        numbers = numbers_of(classes_of(plan.spec, train, _is_new(plan)), train)
        for record in valid:
            if str(record.label) not in numbers:
                raise UserError(f"{record.origin}: the label is {record.label!r}, which no text to train on has; {_allowed(numbers)}.")

        def examples(records: Sequence[Labelled]) -> list[Classified]:
            return encoded(plan, place, records, lambda record: Classified(encoder.labelled(record), numbers[str(record.label)]))

        made, held_out = examples(train), examples(valid)
        widest = max(example.num_tokens for example in [*made, *held_out])
        return example_batches(plan, place, made, held_out, collate_classified, widest)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        names, seed = classes_of(plan.spec, read_split(plan, place, Labelled)[0], _is_new(plan)), plan.recipe.seed
        numbered = not policy.spec.labels and names == _names_of(policy.spec)  # a classifier whose outputs have no names goes without
        labels = () if numbered else names
        if _is_new(plan):
            add_score(policy, len(names), seed, labels)
        return train_score(policy, len(names), seed, labels)

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = plan.recipe.objective
        assert isinstance(settings, ClassifySettings)
        return Setup(Classify(settings, policy.spec), facts={"classes": list(_names_of(policy.spec))})


def _is_new(plan: Plan) -> bool:
    """Whether the classes are to be those of the labels, whatever the model has."""
    settings = plan.recipe.objective
    assert isinstance(settings, ClassifySettings)
    return settings.classes == "new"


def classes_of(spec: ModelSpec, records: Sequence[Labelled], new: bool = False) -> tuple[str, ...]:
    """The names of the classes in order: those of the model, where it is a classifier and no `new` classes are wanted; else the labels,
    numbers by size and words by the alphabet.

    Raises UserError for labels that a classifier does not have, and for such as are no classes: all alike, none alike, words among numbers.
    """
    given = {record.label for record in records}
    known = () if new else _names_of(spec)
    if known:
        _check_known(known, records)
        return known
    numbers = [label for label in given if isinstance(label, int)]
    if numbers and len(numbers) < len(given):
        odd = next(record for record in records if isinstance(record.label, str))
        raise UserError(f"{odd.origin}: the label is {odd.label!r}, but others are numbers, such as {numbers[0]}; give all in one form.")
    if len(given) < 2:
        raise UserError(
            f"{records[0].origin}: the label is {records[0].label!r} in every record, so there is nothing to tell apart; add others."
        )
    if len(given) == len(records) > 2:
        raise UserError(
            f"{records[0].origin}: each of {len(records)} records has a label of its own; is `label` the column that holds classes?"
        )
    return tuple(str(label) for label in sorted(given, key=lambda label: (label if isinstance(label, int) else 0, str(label))))


def numbers_of(names: Sequence[str], records: Sequence[Labelled]) -> dict[str, int]:
    """The number of each class by what the labels of records call it: its name; or the number itself, where that is what all of them are
    and no class has a number for its name."""
    named = {name: number for number, name in enumerate(names)}
    if all(str(record.label) in named for record in records):
        return named
    return {str(number): number for number in named.values()}


def _check_known(names: Sequence[str], records: Sequence[Labelled]) -> None:
    """Raise UserError for labels that are neither names of a classifier's classes, nor all of them their numbers."""
    known = set(names)
    if not any(name.isdecimal() for name in names) and all(isinstance(record.label, int) for record in records):
        known = {str(number) for number in range(len(names))}
    wrong = next((record for record in records if str(record.label) not in known), None)
    if wrong is None:
        return
    others = sorted({str(record.label) for record in records} - known - {str(wrong.label)})
    also = f" (unknown too: {', '.join(others[:8])})" if others else ""
    raise UserError(
        f"{wrong.origin}: the label is {wrong.label!r}{also}, but the model is a classifier that has no such class; {_allowed(names)}. "
        "Correct the labels, or set objective.classes to new for a fresh head with the labels as its classes."
    )


def _names_of(spec: ModelSpec) -> tuple[str, ...]:
    """What a classifier's outputs are called: their numbers, where they have no names."""
    if spec.score is None or spec.score < 2:
        return ()
    return spec.labels or tuple(str(i) for i in range(spec.score))


def _allowed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:8])
    return f"allowed are {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
