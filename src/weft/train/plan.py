"""A recipe with its files found: which model, which data, which tokenizer, and whether they go together."""

from dataclasses import dataclass, replace
from pathlib import Path

from weft.data.load import DataSpec, parse_data
from weft.data.rows import is_hub_name
from weft.data.shards import TOKENIZER, is_prepared, read_manifest
from weft.errors import UserError, nearest
from weft.objectives.settings import NextTokenSettings
from weft.spec import GRU, LSTM, Attention, Learned, ModelSpec, model_spec, read_model_spec
from weft.spec.adapters import Prefix, Prompt
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.tokenizer.templates import with_chat_template
from weft.train.recipe import Recipe
from weft.train.stages import Stage, Stages
from weft.weights.load import Checkpoint, open_checkpoint
from weft.zoo import ENTRIES


@dataclass(frozen=True)
class Plan:
    """A recipe whose files have been found and read as far as their descriptions, and which has been found possible.

    checkpoint  what weights come from; None begins from scratch.
    """

    recipe: Recipe
    spec: ModelSpec
    data: DataSpec
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint | None

    @property
    def length(self) -> int:
        """Tokens a row, virtual ones apart."""
        return self.recipe.batch.length or self.spec.context - self.num_virtual

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before every text."""
        stored = self.checkpoint.adapter if self.checkpoint is not None else None
        settings = self.recipe.adapter if stored is None else stored.settings
        return settings.tokens if isinstance(settings, Prompt | Prefix) else 0

    @property
    def stages(self) -> Stages | None:
        recipe = self.recipe
        return Stages(recipe.stages, recipe.steps, recipe.batch) if recipe.stages and recipe.steps is not None else None

    def of(self, stage: Stage) -> "Plan":
        """The plan of one stage, as if it were a run: its batches, its data, and the model as it is there."""
        assert self.stages is not None
        changes = {"batch": stage.batch, "data": stage.settings.data or self.recipe.data, "stages": None, "average": None}
        recipe = Recipe.model_validate({**self.recipe.model_dump(), **changes})
        return replace(self, recipe=recipe, spec=self.stages.spec(self.spec, stage.first), data=_find_data(recipe))


def make_plan(recipe: Recipe) -> Plan:
    """Resolve model, data and tokenizer, and refuse what cannot be; raises UserError. Writes nothing and loads no weights."""
    data = _find_data(recipe)
    checkpoint = _open_model(recipe)
    tokenizer = _open_tokenizer(recipe, data, checkpoint)
    if data.chat_template is not None and tokenizer is not None:
        tokenizer = with_chat_template(tokenizer, data.chat_template)
    spec = checkpoint.spec if checkpoint is not None else _read_spec(recipe, tokenizer)
    plan = Plan(recipe, spec, data, tokenizer, checkpoint)
    _check(plan)
    if plan.stages is not None:
        for stage in plan.stages.all:
            _check(plan.of(stage))
    return plan


def _find_data(recipe: Recipe) -> DataSpec:
    data = parse_data(recipe.data)
    for source in data.sources:
        on_hub = recipe.objective.type != "next_token" and is_hub_name(source.path)
        if not Path(source.path).exists() and not on_hub:
            raise UserError(
                f"there is no data at {source.path}; give a folder made by `weft data prepare`, or text, JSONL or Parquet files."
            )
    return data


def _open_model(recipe: Recipe) -> Checkpoint | None:
    """The weights to begin from, or None where the recipe describes a model without any."""
    model = recipe.model
    if isinstance(model, dict) or Path(model).suffix in (".yaml", ".yml", ".json"):
        if recipe.pretrained:
            raise UserError(f"pretrained is true but model is the spec {model}, which has no weights; give the name or folder of a model.")
        return None
    if recipe.pretrained or Path(model).exists():
        return open_checkpoint(model)
    if model not in ENTRIES:
        raise UserError(
            f"model is '{model}', which is neither a known name nor a path.{nearest(model, ENTRIES)} Give a name that `weft models` lists, "
            "the path of a YAML spec or of a model folder, or a spec written out in the recipe."
        )
    return None


def _read_spec(recipe: Recipe, tokenizer: Tokenizer | None) -> ModelSpec:
    model = recipe.model
    if isinstance(model, str):
        return ENTRIES[model].spec if model in ENTRIES else read_model_spec(model)
    if "vocab" not in model and tokenizer is not None:
        model = {"vocab": tokenizer.vocab_size, **model}
    return model_spec(model, "model")


def _open_tokenizer(recipe: Recipe, data: DataSpec, checkpoint: Checkpoint | None) -> Tokenizer | None:
    """The tokenizer that the recipe names, else the model's, else the one the data was prepared with."""
    if recipe.tokenizer is not None:
        return load_tokenizer(recipe.tokenizer)
    if checkpoint is not None and (checkpoint.is_gguf or (checkpoint.path / "tokenizer.json").is_file()):
        return load_tokenizer(checkpoint.path)
    folders = [Path(source.path) for source in data.sources]
    for folder in folders:
        if is_prepared(folder) and (folder / TOKENIZER).is_dir():
            return load_tokenizer(folder / TOKENIZER)
    raw = [folder for folder in folders if not is_prepared(folder)]
    if raw:
        raise UserError(
            f"{raw[0]} is text, and there is no tokenizer to read it with; give tokenizer=PATH (make one with `weft tokenizer train`)."
        )
    return None


def _check_adapter(plan: Plan) -> None:
    adapter, checkpoint = plan.recipe.adapter, plan.checkpoint
    if plan.recipe.average is not None and checkpoint is not None and checkpoint.adapter is not None:
        raise UserError(
            f"average is given but model is the adapter {checkpoint.adapter.path}, whose factors mean nothing when they are averaged "
            "apart; drop average, or merge the adapter into its base first."
        )
    quantised = checkpoint is not None and checkpoint.spec.quant is not None
    if quantised and checkpoint is not None and checkpoint.adapter is None and (adapter is None or adapter.whole):
        raise UserError(
            f"{checkpoint.path} is quantised, and such weights cannot be trained; train an adapter beside them (adapter=lora), or begin "
            "from the model before it was quantised."
        )
    if adapter is None:
        return
    if quantised and plan.recipe.quantize is not None and checkpoint is not None:
        raise UserError(
            f"quantize is given but {checkpoint.path} is quantised already; leave quantize out, or give the model it was made from."
        )
    if checkpoint is None:
        raise UserError(
            f"adapter is {adapter.type} but the model has no weights yet, and an adapter alone teaches nothing to a model drawn at random; "
            "give the folder of a model, or pretrained=true for one that was pulled."
        )
    if checkpoint.adapter is not None:
        raise UserError(
            f"model is the adapter {checkpoint.adapter.path}, and adapter asks for another upon it; leave adapter out to train that one "
            "further, or merge it into its base first."
        )


def _check(plan: Plan) -> None:
    """Refuse combinations that cannot work, before anything is paid for."""
    _check_adapter(plan)
    recipe, spec = plan.recipe, plan.spec
    vocab = plan.tokenizer.vocab_size if plan.tokenizer is not None else read_manifest(plan.data.sources[0].path).tokenizer.vocab_size
    if spec.vocab < vocab:
        raise UserError(f"the model's vocab is {spec.vocab} but the tokenizer has {vocab} ids; set model.vocab to {vocab} or more.")
    if plan.length < 1:
        raise UserError(f"adapter.tokens is {plan.num_virtual}, which fills the model's {spec.context} positions; lower it.")
    if plan.length + plan.num_virtual > spec.context and (isinstance(spec.position, Learned) or recipe.batch.length is None):
        raise UserError(
            f"batch.length is {plan.length} but the model has {spec.context} positions; lower it, or raise the model's context."
        )
    if isinstance(recipe.objective, NextTokenSettings) and recipe.objective.mtp is not None and spec.mtp is None:
        raise UserError(
            f"objective.mtp is {recipe.objective.mtp}, but the model has no modules for multi-token prediction; give it some with "
            "model.mtp.depth, or drop objective.mtp."
        )
    for block in spec.blocks():
        if isinstance(block.mixer, Attention) and not block.mixer.causal:
            raise UserError("the model has attention with causal: false, which would see the token it has to predict; make it causal.")
        if block.cross is not None:
            raise UserError(
                "the model has cross-attention, but next-token data brings no memory to attend to; take `cross` out of its layers."
            )
        if recipe.compile and isinstance(block.mixer, LSTM | GRU):
            raise UserError(
                f"compile is true but the model has {type(block.mixer).__name__} layers, which the compiler would unroll token by token; "
                "set compile to false."
            )
