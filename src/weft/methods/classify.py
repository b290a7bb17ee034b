"""Classifiers: labelled texts, and a linear head with an output for each class."""

from collections.abc import Sequence

from weft.data.collate import Classified, collate_classified
from weft.data.record_kinds import Labelled
from weft.errors import UserError
from weft.methods.method import Place, Setup
from weft.methods.records import encoded, encoder_of, example_batches, read_split
from weft.methods.score import train_score
from weft.nn import Model
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
        names, encoder = classes_of(plan.spec, train), encoder_of(plan)
        numbers = {name: number for number, name in enumerate(names)}
        for record in valid:
            if str(record.label) not in numbers:
                raise UserError(f"{record.origin}: the label is {record.label!r}, which no text to train on has; {_allowed(names)}.")

        def examples(records: Sequence[Labelled]) -> list[Classified]:
            return encoded(plan, place, records, lambda record: Classified(encoder.labelled(record), numbers[str(record.label)]))

        made, held_out = examples(train), examples(valid)
        widest = max(example.num_tokens for example in [*made, *held_out])
        return example_batches(plan, place, made, held_out, collate_classified, widest)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        names = classes_of(plan.spec, read_split(plan, place, Labelled)[0])
        numbered = not policy.spec.labels and names == _names_of(policy.spec)  # a classifier whose outputs have no names goes without
        return train_score(policy, len(names), plan.recipe.seed, () if numbered else names)

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = plan.recipe.objective
        assert isinstance(settings, ClassifySettings)
        return Setup(Classify(settings, policy.spec), facts={"classes": list(_names_of(policy.spec))})


def classes_of(spec: ModelSpec, records: Sequence[Labelled]) -> tuple[str, ...]:
    """The names of the classes in order: those of the model, where it is a classifier that has all labels of the records; else the labels,
    numbers by size and words by the alphabet.

    Raises UserError for labels that are no classes: all alike, none alike, words among numbers, or numbers that a classifier with numbered
    outputs does not have.
    """
    given = {record.label for record in records}
    known = _names_of(spec)
    if known and {str(label) for label in given} <= set(known):
        return known
    numbers = [label for label in given if isinstance(label, int)]
    if spec.score is not None and spec.score > 1 and not spec.labels and len(numbers) == len(given):
        wrong = next(record for record in records if str(record.label) not in known)
        raise UserError(
            f"{wrong.origin}: the label is {wrong.label}, but the model is a classifier with {spec.score} outputs; {_allowed(known)}."
        )
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


def _names_of(spec: ModelSpec) -> tuple[str, ...]:
    """What a classifier's outputs are called: their numbers, where they have no names."""
    if spec.score is None or spec.score < 2:
        return ()
    return spec.labels or tuple(str(i) for i in range(spec.score))


def _allowed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"allowed are {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
