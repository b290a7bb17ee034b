"""Distillation: text or records, and a teacher that reads them too; on policy, also what the student writes itself."""

from collections.abc import Sequence
from typing import Any

from weft.data.encode_records import Encoded
from weft.data.examples import split_examples
from weft.data.lessons import Lesson, LessonBatches
from weft.data.prompts import collate
from weft.data.read_records import TEXTS, iterate_records
from weft.data.record_kinds import Record
from weft.errors import UserError
from weft.methods.frozen import check_frozen, open_frozen
from weft.methods.method import Place, Setup
from weft.methods.next_token import NextTokenMethod
from weft.methods.records import encoded, encoder_of
from weft.methods.sft import check_packing, reads_records, record_batches
from weft.nn import Model
from weft.objectives.distill import TEACHER, Distill
from weft.objectives.distill_on_policy import OnPolicyDistill
from weft.objectives.settings import DistillSettings
from weft.train.job import BatchSource
from weft.train.objective import POLICY
from weft.train.plan import Plan
from weft.train.rollout import Rollouts, Sampling, check_sampling


class DistillMethod:
    def check(self, plan: Plan) -> None:
        settings = _settings(plan)
        checkpoint = check_frozen(settings.teacher, "objective.teacher", plan)
        if plan.tokenizer is None:
            raise UserError("there is no tokenizer to compare the teacher's with; give tokenizer=PATH.")
        if any(block.cross is not None for block in checkpoint.spec.blocks()):
            raise UserError(f"objective.teacher is {settings.teacher}, which has cross-attention; give a decoder-only model.")
        if reads_records(plan):
            check_packing(plan)
        if settings.on_policy:
            _check_on_policy(plan, settings)

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        if _settings(plan).on_policy:
            return _lessons(plan, place)
        return record_batches(plan, place) if reads_records(plan) else NextTokenMethod().batches(plan, place)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return policy

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = _settings(plan)
        models = {TEACHER: open_frozen(settings.teacher, "objective.teacher", plan, place)}
        if not settings.on_policy:
            return Setup(Distill(settings, policy.spec), models)
        assert plan.tokenizer is not None
        writer = {POLICY: policy, **models}
        engine = Rollouts(plan.tokenizer, _sampling(settings), place.device, place.products, plan.recipe.batch.micro, place.world, writer)
        return Setup(OnPolicyDistill(settings, policy.spec), models, engine)


def _check_on_policy(plan: Plan, settings: DistillSettings) -> None:
    assert plan.tokenizer is not None
    check_sampling(_sampling(settings), plan.tokenizer)
    if settings.alpha < 1:
        raise UserError(
            f"objective.on_policy is {settings.on_policy:g} and alpha {settings.alpha:g}, but what the student writes itself is nothing to "
            "learn by heart; set objective.alpha to 1."
        )
    if not reads_records(plan):
        raise UserError("objective.on_policy needs prompts for the student to answer; give records (JSONL, JSON, CSV, TSV or Parquet).")
    if plan.recipe.compile:
        raise UserError("compile is true, but what a student writes has another shape in every step; set it to false.")


def _lessons(plan: Plan, place: Place) -> LessonBatches:
    """Prompts with the texts that the data goes on with."""
    recipe, world, settings = plan.recipe, place.world, _settings(plan)
    encoder, room, dropped = encoder_of(plan), plan.length - settings.max_tokens, list[UserError]()

    def written(record: Record) -> list[Lesson]:
        return [_lesson(text, record.origin, room) for text in encoder.encode(record)]

    def lessons(paths: Sequence[str]) -> list[Lesson]:
        records = list(iterate_records(paths, TEXTS, dropped if plan.data.drop_bad else None))
        return [lesson for made in encoded(plan, place, records, written) for lesson in made]

    train = lessons([source.path for source in plan.data.sources])
    valid = lessons([plan.data.held_out] if plan.data.held_out is not None else [])
    place.dropped.update(map(str, dropped))
    if not valid:
        train, valid = split_examples(train, plan.data.valid, recipe.seed)
    mean = round(sum(len(lesson.text.ids) for lesson in train) / max(1, len(train)))
    shape: dict[str, Any] = {"seed": recipe.seed, "rank": world.rank, "world": world.size}
    return LessonBatches(train, collate, recipe.batch.rows, max(1, mean), valid=valid, **shape, name=plan.data.sources[0].label)


def _lesson(text: Encoded, origin: str, room: int) -> Lesson:
    """A text whose prompt is all before the first token that is trained on."""
    ids = text.ids[: text.trained.index(True)]
    if len(ids) > room:
        raise UserError(
            f"{origin}: the prompt has {len(ids)} tokens, of {max(0, room)} that objective.max_tokens leaves; raise batch.length, lower "
            "objective.max_tokens, or drop the record."
        )
    return Lesson(ids, "", origin, {}, text)


def _sampling(settings: DistillSettings) -> Sampling:
    return Sampling(settings.max_tokens)


def _settings(plan: Plan) -> DistillSettings:
    settings = plan.recipe.objective
    assert isinstance(settings, DistillSettings)
    return settings
