"""Adapters on disk: a folder with `adapter_config.json` and `adapter_model.safetensors` as PEFT lays them out, and what Weft adds.

weft_adapter.json   the fingerprint of the base (`weft.weights.adapter_base`), whose names were used, a score head's labels
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from weft.errors import UserError
from weft.files import atomic_write, read_text
from weft.nn import Model, add_score
from weft.nn.adapters import Adapters, Place, adapter_parameters, attach, detach
from weft.nn.adapters.lora import LoRAAdapter
from weft.nn.adapters.several import put_several
from weft.nn.adapters.virtual import prefixed_layers
from weft.nn.attention import Attention
from weft.nn.linear import Linear
from weft.spec.adapters import IA3, AdapterSettings, LoRA, Prefix, Prompt
from weft.weights.adapter_base import identity, written_base
from weft.weights.adapter_config import CONFIG, peft_config, read_config, settings_of
from weft.weights.adapter_places import choose_places, find_sites, naming_family, short_names
from weft.weights.files import TensorFiles, write_safetensors
from weft.weights.map import load_tensors, stored_tensors
from weft.zoo import FAMILIES, Family
from weft.zoo.rules import Copy, Interleave, One, Reshape, Rule, Source, Transpose

WEIGHTS, PICKLED, FACTS = "adapter_model.safetensors", "adapter_model.bin", "weft_adapter.json"
PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"
_LINEAR = re.compile(r"base_model\.model\.(.+)\.(?:lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?|ia3_l)")


class Encoder(Protocol):
    """What beginning as a text asks of a tokenizer."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder whose description has been read and checked, its tensors not yet.

    names  of the linear maps it changes.      facts  what Weft wrote beside it; empty for PEFT's.
    """

    path: Path
    settings: AdapterSettings
    base: str | None
    names: tuple[str, ...]
    facts: dict[str, Any]
    files: TensorFiles

    @property
    def outputs(self) -> int | None:
        """Of the score head that was trained with it, None where there is none."""
        return self.files.shape(SCORE)[0] if SCORE in self.files else None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of those outputs, or none."""
        return tuple(self.facts.get("labels", ()))

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a model."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read and check an adapter's description and the header of its weights. Raises UserError."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}; give the folder of an adapter as PEFT or weft saves it.")
    config = read_config(folder)
    found = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no {WEIGHTS}, which holds an adapter's weights; fetch or save the adapter again.")
    files = TensorFiles(found)
    names = tuple(dict.fromkeys(match[1] for match in map(_LINEAR.fullmatch, sorted(files.names)) if match))
    facts = _read_facts(folder / FACTS)
    return StoredAdapter(folder, settings_of(config, names, folder), config.get("base_model_name_or_path"), names, facts, files)


def _read_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(read_text(path, "adapter's facts"))
        return dict(facts)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {error}. Save the adapter again, or remove this file.") from None


def adapt(
    model: Model, settings: AdapterSettings, family: Family, base: str | None, seed: int = 0, tokenizer: Encoder | None = None
) -> Model:
    """Put a fresh adapter on a model that was read as `family` from `base`, a name or a path, and let it know both.

    tokenizer  reads the text that virtual tokens begin as.
    """
    text: Sequence[int] = ()
    if isinstance(settings, Prompt | Prefix) and settings.text is not None:
        if tokenizer is None:
            raise UserError("adapter.text is given, but there is no tokenizer to read it with; give tokenizer=PATH.")
        text = tokenizer.encode_batch([settings.text])[0]
        if not text:
            raise UserError("adapter.text has no tokens; give some, or leave it out.")
    named = naming_family(model.spec, family)
    found = identity(model)
    attach(model, settings, choose_places(model, named, settings), seed, text)
    if model.adapters is not None:
        model.adapters.family, model.adapters.base, model.adapters.identity = named.name, base, found
    return model


def put_adapter(model: Model, stored: StoredAdapter, family: Family, base: str | None = None) -> Model:
    """Put a stored adapter on its base, which was read as `family` from `base`.

    Raises UserError where it is an adapter for another model, and where its file is damaged. The model is then as it was.
    """
    named, before = naming_family(model.spec, family), (model.spec, model.score)
    found = identity(model)
    _check_base(stored, found)
    attach(model, stored.settings, _places(model, stored, named))
    assert model.adapters is not None
    model.adapters.family, model.adapters.base, model.adapters.identity = named.name, base or stored.base, found
    try:
        if stored.outputs is not None:
            add_score(model, stored.outputs, 0, stored.labels)
        fill_adapter(model, stored)
    except BaseException:
        detach(model)
        model.spec, model.score = before
        raise
    return model


def put_adapters(model: Model, stored: Mapping[str, StoredAdapter], family: Family) -> Model:
    """Put several LoRA adapters by name beside one base, of which every row of a pass has its own (`Step.adapters`), or none.

    Raises UserError where one is of another form, or for another model.
    """
    factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, each in stored.items():
        settings = each.settings
        if not isinstance(settings, LoRA) or settings.dora or each.outputs is not None:
            form = "dora" if isinstance(settings, LoRA) and settings.dora else settings.type
            kind = "a classifier's" if each.outputs is not None else f"of the form {form}"
            raise UserError(f"{each.path} is {kind}; adapters side by side must be plain lora. Serve it as a model of its own.")
        put_adapter(model, each, family)
        linears = [(key, module) for key, module in model.named_modules() if isinstance(module, Linear)]
        factors[name] = {key: linear.adapter.fused(model.dtype) for key, linear in linears if isinstance(linear.adapter, LoRAAdapter)}
        for key, pair in factors[name].items():
            if not all(bool(factor.isfinite().all()) for factor in pair):
                raise UserError(
                    f"{each.path}: its change of {key} has numbers too large for {str(model.dtype).removeprefix('torch.')}; take dtype "
                    "float32, or serve it as a model of its own."
                )
        if any(".cross." in f".{key}." for key in factors[name]):
            raise UserError(f"{each.path} changes cross-attention, whose memory is read once for all rows; serve it as a model of its own.")
        detach(model)
    shared = Adapters(next(iter(stored.values())).settings)
    with torch.no_grad():
        put_several(model, shared, factors, model.dtype)
    model.set_adapters(shared)
    return model.requires_grad_(False)


def _check_base(stored: StoredAdapter, found: str | None) -> None:
    """Raise UserError where an adapter says upon what it was trained, and that was something else."""
    if stored.facts.get("base") not in (None, found):
        raise UserError(
            f"{stored.path} is an adapter for another model ({stored.base or 'not named'}): the weights of this one are not those it was "
            "trained upon. Give the model that its adapter_config.json names."
        )


def _places(model: Model, stored: StoredAdapter, family: Family) -> tuple[Place, ...]:
    if not isinstance(stored.settings, LoRA | IA3):
        return ()
    known = {site.place.name for site in find_sites(model, family)}
    foreign = [name for name in stored.names if name not in known]
    if foreign or not stored.names:
        what = f"changes {foreign[0]}" if foreign else "changes no linear map"
        raise UserError(
            f"{stored.path} is an adapter for another model ({stored.base or 'not named'}): it {what}, and this model has inside its "
            f"layers {', '.join(short_names(known))}."
        )
    return choose_places(model, family, stored.settings)


def fill_adapter(model: Model, stored: StoredAdapter) -> None:
    """Fill the adapter of a model from a folder of the same form. Raises UserError where it is for another model, and where tensors are
    missing, superfluous, misshapen or not finite."""
    _check_base(stored, model.adapters.identity if model.adapters is not None else None)
    ours, rules = stored_parameters(model), adapter_rules(model)
    expected = {rule.source.name: rule for rule in rules}
    what = f"{stored.path} is an adapter for another model, or damaged"
    aliases = {f"{name}.weight": name for name in expected if name.endswith("lora_magnitude_vector")}
    given = {aliases.get(name, name) for name in stored.files.names}
    if odd := sorted(given ^ set(expected)):
        here, there = ("has", "has no place for it") if odd[0] in given else ("lacks", "needs it")
        raise UserError(f"{what}: its file {here} {odd[0]}, and this model {there}.")
    for name, rule in expected.items():
        shape, needed = tuple(stored.files.shape(_stored_name(stored, name))), _shape(rule.source, ours[rule.ours])
        if shape != needed:
            raise UserError(f"{what}: {name} is {'x'.join(map(str, shape))}, and this model needs {'x'.join(map(str, needed))} there.")
    named = [One(rule.ours, _renamed(rule.source, _stored_name(stored, rule.source.name))) for rule in rules]
    load_tensors(ours, named, stored.files, "", str(stored.path))
    for name, rule in expected.items():
        if not bool(ours[rule.ours].isfinite().all()):
            raise UserError(f"{stored.path} is damaged: {name} holds numbers that are not finite; fetch or train the adapter again.")


def _stored_name(stored: StoredAdapter, name: str) -> str:
    return name if name in stored.files else f"{name}.weight"


def _renamed(source: Source, name: str) -> Source:
    return type(source)(**{**vars(source), "name": name})


def _shape(source: Source, ours: torch.Tensor) -> tuple[int, ...]:
    return source.shape if isinstance(source, Reshape) else tuple(ours.shape)


def stored_parameters(model: Model) -> dict[str, torch.Tensor]:
    """What an adapter's file holds, by our names: its parameters, and those of a score head, which is trained with it."""
    score = {"score.weight": model.score.weight} if model.score is not None else {}
    return {**adapter_parameters(model), **score}


def adapter_rules(model: Model) -> list[One]:
    """The weight map of an adapter's file."""
    shared = model.adapters
    assert shared is not None
    rules: list[One] = []
    if isinstance(shared.settings, LoRA | IA3):
        sources = {site.place.name: site.source for site in find_sites(model, FAMILIES[shared.family])}
        numbers: dict[str, int] = {}
        for place in sorted(shared.places, key=lambda place: (place.module, place.start)):
            number = numbers[place.module] = numbers.get(place.module, -1) + 1
            rules += _linear_rules(shared.settings, place, number, sources[place.name], model)
    else:
        names = {name: name for name in adapter_parameters(model)}
        only = {"virtual.vectors": "prompt_embeddings"}
        rules = [One(name, Copy(only.get(name, name))) for name in names]
    return [*rules, One("score.weight", Copy(SCORE))] if model.score is not None else rules


def _linear_rules(settings: LoRA | IA3, place: Place, number: int, source: Source, model: Model) -> list[One]:
    ours, theirs = f"{place.module}.adapter", f"{PREFIX}{place.name}"

    def rows(name: str) -> Source:
        """Something that has a row for every row of the map: in the order of the file's rows."""
        return Interleave(name, source.heads, plain=source.plain) if isinstance(source, Interleave) else Copy(name)

    if isinstance(settings, IA3):
        name = f"{ours}.factors.{number}"
        length = model.get_parameter(name).shape[0]
        return [One(name, Reshape(f"{theirs}.ia3_l", (1, length) if place.scales_input else (length, 1)))]
    change = f"{ours}.changes.{number}"
    found = [One(f"{change}.a", Copy(f"{theirs}.lora_A.weight")), One(f"{change}.b", rows(f"{theirs}.lora_B.weight"))]
    return [*found, One(f"{change}.magnitude", rows(f"{theirs}.lora_magnitude_vector"))] if settings.dora else found


def write_adapter(model: Model, folder: Path) -> None:
    """Write a model's adapter into an existing folder, so that PEFT and Weft load it."""
    shared = model.adapters
    assert shared is not None
    rules: list[Rule] = list(adapter_rules(model))
    write_safetensors(folder, stored_tensors(stored_parameters(model), rules), 1e15)
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    base = None if shared.base is None else written_base(shared.base)
    config = peft_config(shared.settings, base, _facts(model))
    _write_json(folder / CONFIG, config)
    labels = {"labels": list(model.spec.labels)} if model.score is not None else {}
    _write_json(folder / FACTS, {"base": shared.identity, "family": shared.family, **labels})


def _facts(model: Model) -> dict[str, Any]:
    """What a config says besides the settings."""
    shared = model.adapters
    assert shared is not None
    facts: dict[str, Any] = {}
    if isinstance(shared.settings, LoRA | IA3):
        sites = find_sites(model, FAMILIES[shared.family])
        every = [site.place.name for site in sites]
        facts["target_modules"] = _short([place.name for place in shared.places], every)
        facts["fan_in_fan_out"] = any(isinstance(site.source, Transpose) for site in sites)
        if isinstance(shared.settings, IA3):
            facts["feedforward_modules"] = _short([place.name for place in shared.places if place.scales_input], every)
    if isinstance(shared.settings, Prompt | Prefix):
        first, count = prefixed_layers(model)[0] if isinstance(shared.settings, Prefix) else None, len(model.blocks)
        heads = first.groups if first is not None else _heads(model)
        width = heads * first.width if first is not None else model.spec.dim
        facts |= {"num_layers": count, "num_attention_heads": heads, "token_dim": width}
    if model.score is not None:
        facts |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    return facts


def _heads(model: Model) -> int:
    """Of the first attention layer, for those who want to know."""
    return next((part.heads for block in model.layers() for part in block.parts().values() if isinstance(part, Attention)), 1)


def _short(names: Sequence[str], every: Collection[str]) -> list[str]:
    """Names of linear maps, those of a kind that is there in all layers by what tells the kind from others."""
    left, found = list(names), []
    for word in short_names(every):
        kind = {name for name in every if name == word or name.endswith(f".{word}")}
        if kind <= set(left):
            found.append(word)
            left = [name for name in left if name not in kind]
    return [*found, *left]


def _write_json(path: Path, data: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
