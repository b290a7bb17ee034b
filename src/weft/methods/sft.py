"""Supervised fine-tuning on records: conversations, prompts with completions, instructions, texts."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from weft.data.encoder import fingerprint
from weft.data.load import DataSpec, SourceSpec, open_batches
from weft.data.prepare_records import RecordSettings, prepare_records, why_dropped
from weft.data.rows import ROW_FILES, ending, is_hub_name
from weft.errors import UserError
from weft.methods.method import Place, Setup
from weft.nn import Model
from weft.objectives.settings import SFTSettings
from weft.objectives.sft import SFT
from weft.train.job import BatchSource
from weft.train.plan import Plan


class SFTMethod:
    """Records are rendered once into shards with masks, so that data of any size is packed, shuffled and resumed as pretraining's is."""

    def check(self, plan: Plan) -> None:
        check_packing(plan)

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        return record_batches(plan, place)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return policy

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = plan.recipe.objective
        assert isinstance(settings, SFTSettings)
        return Setup(SFT(settings, spec=plan.spec))


def reads_records(plan: Plan) -> bool:
    """Whether all of a plan's data are files of records, or datasets of a hub; not text, nor prepared folders."""
    return all(is_hub_name(source.path) or ending(Path(source.path)) in ROW_FILES for source in plan.data.sources)


def check_packing(plan: Plan) -> None:
    """Refuse a plan without a tokenizer, and rows in which one record would see another."""
    if plan.tokenizer is None:
        raise UserError("there is no tokenizer to read the records with; give tokenizer=PATH, or a model that has one beside it.")
    if plan.data.packing == "stream":
        raise UserError("data.packing is stream, which reads over the ends of records; take best_fit, pack or pad.")


def record_batches(plan: Plan, place: Place) -> BatchSource:
    """Packed rows of records, each of which is prepared on first use; folders of prepared data are taken as they are."""
    recipe, world = plan.recipe, place.world
    shape: dict[str, Any] = {"length": plan.length, "batch_size": recipe.batch.rows, "seed": recipe.seed}

    def make(source: SourceSpec) -> Path:
        return _folder(plan, place, source)

    return open_batches(_packed(plan.data), **shape, rank=world.rank, world=world.size, tokenizer=plan.tokenizer, make=make)


def _packed(data: DataSpec) -> DataSpec:
    """Whole records in rows unless something else is asked for."""
    return data if "packing" in data.model_fields_set else DataSpec(**{**data.model_dump(), "packing": "best_fit"})


def _settings(plan: Plan, source: SourceSpec) -> RecordSettings:
    """A document of T + 1 tokens has T to predict from; a file of held-out records goes with the first source."""
    data = plan.data
    first = source == data.sources[0]
    settings = RecordSettings(plan.length + 1, data.valid, None, plan.recipe.seed, data.drop_bad)
    return settings if data.held_out is None else replace(settings, valid=0.0, held_out=data.held_out if first else None)


def _place_of(plan: Plan, place: Place, source: SourceSpec) -> Path:
    """Where the shards of a source lie."""
    assert plan.tokenizer is not None
    key = f"{Path(source.path).resolve()}\0{fingerprint(plan.tokenizer)}\0{_settings(plan, source)}"
    return place.cache / f"{Path(source.path).stem}-{sha256(key.encode()).hexdigest()[:12]}"


def _folder(plan: Plan, place: Place, source: SourceSpec) -> Path:
    assert plan.tokenizer is not None
    folder = _place_of(plan, place, source)
    prepare_records(source.path, plan.tokenizer, folder, _settings(plan, source), place.progress)
    place.dropped.update(why_dropped(folder))
    return folder
