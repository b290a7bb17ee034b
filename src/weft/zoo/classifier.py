"""Classifiers and reward models: what Hugging Face's *ForSequenceClassification classes add to the config and tensors of any family.

Their class reads `score.weight` at a text's last token. Weft keeps the language model's head beside it. Their files leave that head out:
where it is tied, nothing is missing; where it is not, the embedding stands in for it, and what such a model says as a language model means
nothing.
"""

from collections.abc import Collection, Mapping
from typing import Any

from weft.errors import UserError
from weft.spec import ModelSpec
from weft.zoo.family import Family
from weft.zoo.rules import Rule, copy

HEAD = "lm_head.weight"
MOST_OUTPUTS = 1_000_000


def read_spec(family: Family, config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json, of the family's language model or of its classifier; raises UserError as the family does."""
    classes = config.get("architectures")
    if family.classifier is None or not isinstance(classes, list) or family.classifier not in classes:
        return family.from_config(config)
    model = family.from_config({**config, "architectures": [family.architecture]})
    names = _read_labels(config)
    return _with_score(model, len(names), () if names == _plain(len(names)) else names)


def language_model(spec: ModelSpec) -> ModelSpec:
    """The same model without its score head."""
    return spec if spec.score is None else _with_score(spec, None, ())


def score_config(spec: ModelSpec) -> dict[str, Any]:
    """What config.json says of the score head; nothing where there is none."""
    if spec.score is None:
        return {}
    names = spec.labels or _plain(spec.score)
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}


def class_name(family: Family, spec: ModelSpec) -> str:
    """The class that config.json names for a spec."""
    return family.architecture if spec.score is None or family.classifier is None else family.classifier


def rules_of(family: Family, spec: ModelSpec) -> list[Rule]:
    """The rows of the weight map, the score head's with them; none for a family whose files have our own names."""
    rows = family.rules(spec)
    return [*rows, copy("score.weight", "score.weight")] if rows and spec.score is not None else rows


def held(family: Family, spec: ModelSpec, names: Collection[str]) -> ModelSpec:
    """The spec of what a file with these tensors holds: without what its config promises and files may leave out."""
    spec = family.held(spec, names)
    if spec.score is None or spec.tie_embeddings or family.classifier is None or HEAD in names:
        return spec
    return ModelSpec.model_validate({**spec.model_dump(), "tie_embeddings": True})


def _with_score(spec: ModelSpec, outputs: int | None, labels: tuple[str, ...]) -> ModelSpec:
    return ModelSpec.model_validate({**spec.model_dump(), "score": outputs, "labels": labels})


def _plain(count: int) -> tuple[str, ...]:
    """What transformers calls outputs that nobody named."""
    return tuple(f"LABEL_{i}" for i in range(count))


def _read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the outputs in order: two where the config says nothing, as in transformers."""
    table = config.get("id2label")
    if table is None:
        count = config.get("num_labels")
        if count is not None and (type(count) is not int or not 1 <= count <= MOST_OUTPUTS):
            raise UserError(f"config.json ({config.get('model_type')}): num_labels is {count!r}; it must be an integer of at least 1.")
        return _plain(2 if count is None else count)
    keys = [str(i) for i in range(len(table))] if isinstance(table, Mapping) else []
    if not keys or set(table) != set(keys) or not all(isinstance(name, str) for name in table.values()):
        shown = str(table)[:80]
        raise UserError(
            f'config.json ({config.get("model_type")}): id2label is {shown}; it must name each output from "0" on, without a gap.'
        )
    return tuple(table[key] for key in keys)
