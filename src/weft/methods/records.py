"""Records of tuning data as batches of examples."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from weft.data.collate import MULTIPLE
from weft.data.encode_records import RecordEncoder
from weft.data.examples import Example, ExampleBatches, split_examples
from weft.data.read_records import read_records
from weft.data.record_kinds import Labelled, Preference, Prompt
from weft.errors import UserError
from weft.methods.method import Place
from weft.train.plan import Plan

R = TypeVar("R", Labelled, Preference, Prompt)
E = TypeVar("E", bound=Example)
S = TypeVar("S")
T = TypeVar("T")


def read_split(plan: Plan, place: Place, kind: type[R]) -> tuple[list[R], list[R]]:
    """The records that a recipe's data names, and those it holds out by name; raises UserError for records of another kind."""
    weighed = [source.path for source in plan.data.sources if source.weight is not None]
    if weighed:
        raise UserError(f"data gives {weighed[0]} a weight, but records are read once an epoch each; drop the weights.")
    data = plan.data
    dropped: list[UserError] = []
    wanted = dropped if data.drop_bad else None
    records: Any = read_records([source.path for source in data.sources], kind, wanted)
    held_out: Any = read_records([data.held_out], kind, wanted) if data.held_out is not None else []
    place.dropped.update(map(str, dropped))
    return records, held_out


def encoded(plan: Plan, place: Place, records: Sequence[S], encode: Callable[[S], T]) -> list[T]:
    """Every record as an example; those that cannot be one are left out where the recipe says `data.drop_bad`, as long as one can."""
    made: list[T] = []
    bad: list[UserError] = []
    for record in records:
        try:
            made.append(encode(record))
        except UserError as error:
            if not plan.data.drop_bad:
                raise
            bad.append(error)
    if bad and not made:
        raise UserError(f"data.drop_bad leaves none of the {len(records)} records. The first: {bad[0]}")
    place.dropped.update(map(str, bad))
    return made


def encoder_of(plan: Plan) -> RecordEncoder:
    """What turns a recipe's records into ids; raises UserError without a tokenizer."""
    if plan.tokenizer is None:
        raise UserError("there is no tokenizer to read the records with; give tokenizer=PATH, or a model that has one beside it.")
    return RecordEncoder(plan.tokenizer, plan.length)


def example_batches(
    plan: Plan, place: Place, train: Sequence[E], valid: Sequence[E], collate: Callable[..., Any], widest: int
) -> ExampleBatches[E, Any]:
    """Batches of examples; without `valid` some of `train` are held out. `widest` is the longest row, which a compiled step pads all to."""
    recipe, world = plan.recipe, place.world
    if not valid:
        train, valid = split_examples(train, plan.data.valid, recipe.seed)
    width = -(-widest // MULTIPLE) * MULTIPLE if recipe.compile else None
    mean = max(1, round(sum(example.num_tokens for example in train) / max(1, len(train))))
    name = ", ".join(source.label for source in plan.data.sources)
    make = partial(collate, width=width)
    return ExampleBatches(train, make, recipe.batch.rows, mean, valid=valid, seed=recipe.seed, rank=world.rank, world=world.size, name=name)
