"""Where adapters attach: linear maps by the names that files have for them, found through the weight map.

Our queries, keys and values are rows of one weight; a family's rules say which rows have which name, so that LoRA goes to q_proj as it does
in transformers, and the files of adapters need no table of their own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from weft.errors import UserError, nearest
from weft.nn import Model
from weft.nn.adapters import Place
from weft.nn.linear import Linear
from weft.spec import ModelSpec
from weft.spec.adapters import IA3, AdapterSettings, LoRA
from weft.zoo import Family, describe
from weft.zoo.native import NATIVE
from weft.zoo.rules import Cat, Copy, One, Rule, Source, Stack

SUFFIX = ".weight"


@dataclass(frozen=True)
class Site:
    """A place, and how the file's rows of it differ from ours."""

    place: Place
    source: Source


def naming_family(spec: ModelSpec, family: Family) -> Family:
    """Whose names a model's linear maps have: those of the family it was read as. A model of our own format, one that was quantised for
    one, has the names of the first family that could hold it."""
    if family is not NATIVE:
        return family
    plain = ModelSpec.model_validate({**spec.model_dump(exclude={"quant", "score", "labels"})})
    return describe(plain)[0]


def find_sites(model: Model, family: Family) -> list[Site]:
    """Every linear map inside the blocks, in the model's order."""
    linear = {f"{name}{SUFFIX}": module for name, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, Linear)}
    rules = family.rules(_without_quant(model.spec))
    if not rules:
        return [_site(name, Copy(name), 0, module.out_features) for name, module in linear.items()]
    sites: list[Site] = []
    for rule in rules:
        if isinstance(rule, One) and rule.ours in linear:
            sites.append(_site(rule.ours, rule.source, 0, linear[rule.ours].out_features))
        elif isinstance(rule, Cat) and rule.ours in linear:
            starts = [sum(rule.sizes[:i]) for i in range(len(rule.sizes))]
            sites += [_site(rule.ours, *each) for each in zip(rule.sources, starts, rule.sizes, strict=True)]
    order = {name: number for number, name in enumerate(linear)}
    return sorted(sites, key=lambda site: (order[site.place.module + SUFFIX], site.place.start))


def _site(ours: str, source: Source, start: int, rows: int) -> Site:
    return Site(Place(ours.removesuffix(SUFFIX), source.name.removesuffix(SUFFIX), start, rows), source)


def _without_quant(spec: ModelSpec) -> ModelSpec:
    return spec if spec.quant is None else ModelSpec.model_validate({**spec.model_dump(), "quant": None})


def choose_places(model: Model, family: Family, settings: AdapterSettings) -> tuple[Place, ...]:
    """The places that an adapter's settings name; none for a form that changes no linear maps.

    Raises UserError, with the names there are and the nearest, where a name matches nothing that can have an adapter.
    """
    if not isinstance(settings, LoRA | IA3):
        return ()
    sites = find_sites(model, family)
    if not sites:
        raise UserError("the model has no linear maps inside its layers, so there is nothing that an adapter could change.")
    if isinstance(settings, IA3):
        return _ia3_places(sites, settings, family, model)
    if settings.targets == "all":
        return tuple(site.place for site in sites)
    return tuple(site.place for site in matching(sites, settings.targets, family, model))


def matching(sites: Sequence[Site], targets: Iterable[str], family: Family, model: Model) -> list[Site]:
    """The sites that any of these names means: a whole path, or its end."""
    targets = tuple(targets)
    for target in targets:
        if not any(matches(site.place.name, target) for site in sites):
            raise _no_target(target, sites, family, model)
    return [site for site in sites if any(matches(site.place.name, target) for target in targets)]


def matches(name: str, target: str) -> bool:
    """Whether a target means the linear map called `name`, as PEFT reads targets."""
    return name == target or name.endswith(f".{target}")


def _no_target(target: str, sites: Sequence[Site], family: Family, model: Model) -> UserError:
    words = short_names(site.place.name for site in sites)
    others = list(_other_names(family.rules(_without_quant(model.spec))))
    kind = next((kind for name, kind in others if matches(name, target) or f".{target}." in f".{name}."), None)
    if kind is not None:
        return UserError(f"adapter.targets has '{target}', which is {kind}; an adapter can be put on {', '.join(words)}, or all of them.")
    return UserError(
        f"adapter.targets has '{target}', but the model has no linear map of that name.{nearest(target, words)} "
        f"Give some of {', '.join(words)}, or all."
    )


def _other_names(rules: Iterable[Rule]) -> Iterable[tuple[str, str]]:
    """Names of a file that no adapter can be put on, and what they are."""
    for rule in rules:
        if isinstance(rule, Stack):
            for source in (*rule.sources, *((rule.whole,) if rule.whole is not None else ())):
                yield source.name.removesuffix(SUFFIX), "a stack of experts"
        elif isinstance(rule, One | Cat):
            for source in (rule.source,) if isinstance(rule, One) else rule.sources:
                if not rule.ours.startswith("blocks."):
                    yield source.name.removesuffix(SUFFIX), "not inside the layers"
                else:
                    yield source.name.removesuffix(SUFFIX), "no linear map"


def short_names(names: Iterable[str]) -> list[str]:
    """The ends of paths that tell kinds of linear maps apart: q_proj, or where two kinds end alike attn.c_proj and mlp.c_proj."""
    kinds = list(dict.fromkeys(tuple(part for part in name.split(".") if not part.isdigit()) for name in names))
    shown = []
    for kind in kinds:
        length = next((n for n in range(1, len(kind)) if sum(other[-n:] == kind[-n:] for other in kinds) == 1), len(kind))
        shown.append(".".join(kind[-length:]))
    return shown


def _ia3_places(sites: Sequence[Site], settings: IA3, family: Family, model: Model) -> tuple[Place, ...]:
    """Keys, values and what an MLP's last map reads, or those that are named."""
    chosen = list(sites) if settings.targets == "usual" else matching(sites, settings.targets, family, model)
    if settings.targets == "usual":
        chosen = [site for site in sites if _is_keys_or_values(site.place) or _is_last(site.place)]
    if not chosen:
        raise UserError("the model has neither attention nor MLPs of the usual kind; name the linear maps in adapter.targets.")
    scaled: Callable[[Place], bool] = _is_last
    if settings.inputs != "usual":
        named = {site.place for site in matching(sites, settings.inputs, family, model)} if settings.inputs else set()
        if extra := named - {site.place for site in chosen}:
            raise UserError(f"adapter.inputs has {sorted(place.name for place in extra)[0]}, which is none of the targets; add it to them.")
        scaled = named.__contains__
    return tuple(replace(site.place, scales_input=scaled(site.place)) for site in chosen)


def _is_last(place: Place) -> bool:
    return place.module.endswith("channel.down")


def _is_keys_or_values(place: Place) -> bool:
    """Rows of keys or of values; where the file has one name for queries too, all of them."""
    return place.module.endswith("mixer.qkv") and (place.start > 0 or place.name.endswith(("c_attn", "qkv")))
