"""What a family is: a `model_type` of Hugging Face, the specs it can hold, and its weight map."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import pydantic

from weft.errors import UserError
from weft.spec import Attention, Block, CrossAttention, Experts, Group, LatentAttention, LayerNorm, Mamba, ModelSpec, Rope, YarnScaling
from weft.spec.model import Layer
from weft.zoo.rope import yarn_attention
from weft.zoo.rules import Rule

# Of a mixture of experts: how training keeps its experts busy.
_TRAINING = {"bias_speed", "balance_loss", "balance_over", "z_loss", "capacity"}

M = TypeVar("M")
C = TypeVar("C")


class Inexpressible(Exception):
    """A family's config has no way to say this spec. Never shown to a user: another family is tried."""


@dataclass(frozen=True)
class Family:
    """How one kind of checkpoint is read and written.

    name           our word for it.                        model_type  config.json's word.
    architecture   the class config.json names.            prefix      what a base-model-only file leaves out of every name.
    from_config    config.json -> spec; raises UserError.
    to_config      spec -> config.json's architecture keys; raises Inexpressible.
    rules          spec -> the rows of the weight map.
    held           spec, and the names of a file's tensors -> the spec without what the config promises and files may leave out.
    classifier     the class of a model of this family with a score head; None where transformers has none.
    """

    name: str
    model_type: str
    architecture: str
    prefix: str
    from_config: Callable[[Mapping[str, Any]], ModelSpec]
    to_config: Callable[[ModelSpec], dict[str, Any]]
    rules: Callable[[ModelSpec], list[Rule]]
    held: Callable[[ModelSpec, Collection[str]], ModelSpec] = lambda spec, names: spec
    classifier: str | None = None


@dataclass(frozen=True)
class Entry:
    """A published size of a family.

    published   parameters as its source counts them.      source   where that count is printed.
    misprint    what the source prints wrongly, where it does: the spec here has the corrected value.
    repo        the Hugging Face repo id of its weights, where they are public.
    """

    name: str
    family: str
    build: Callable[[], ModelSpec]
    published: int
    source: str
    repo: str | None = None
    misprint: str | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        return self.build()

    @property
    def series(self) -> str:
        """The name without its size: gpt3, llama3.1, smollm2."""
        return self.name.split("-")[0]


def explained(what: str, error: pydantic.ValidationError) -> UserError:
    """The first problem of a spec that was built from a file's values, as a sentence about that file."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return UserError(f"{what}: {message}")
    where = ".".join(str(part) for part in problem["loc"])
    return UserError(f"{what}: {where} is {problem['input']!r}; {message[0].lower()}{message[1:]}.")


def fold(blocks: Iterable[Block]) -> tuple[Layer, ...]:
    """Layers in order as the shortest pattern: one repeated block, one repeated group, or runs of equal blocks."""
    listed = list(blocks)
    for period in range(1, len(listed) // 2 + 1):
        if len(listed) % period == 0 and listed == listed[:period] * (len(listed) // period):
            repeat = len(listed) // period
            if period == 1:
                return (_repeated(listed[0], repeat),)
            return (Group(repeat=repeat, layers=tuple(listed[:period])),)
    runs: list[tuple[Block, int]] = []
    for block in listed:
        if runs and runs[-1][0] == block:
            runs[-1] = (block, runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return tuple(_repeated(block, count) for block, count in runs)


def _repeated(block: Block, repeat: int) -> Block:
    return Block.model_validate({**block.model_dump(), "repeat": repeat})


def first_parts(spec: ModelSpec, topology: str, mixer: type[M], channel: type[C]) -> tuple[M, C]:
    """Mixer and channel of the first layer of a spec whose layers might all be alike; raises Inexpressible for other kinds."""
    block = spec.blocks()[0]
    if block.topology != topology or block.cross is not None:
        raise Inexpressible
    if not isinstance(block.mixer, mixer) or not isinstance(block.channel, channel):
        raise Inexpressible
    return block.mixer, block.channel


def windows(spec: ModelSpec) -> list[int | None]:
    """The window of every attention layer; raises Inexpressible where a layer is something else."""
    found: list[int | None] = []
    for block in spec.blocks():
        if not isinstance(block.mixer, Attention):
            raise Inexpressible
        found.append(block.mixer.window)
    return found


def expresses(family: Family, spec: ModelSpec) -> dict[str, Any] | None:
    """The family's config for a spec, or None where it would not read back as the same model."""
    try:
        config = family.to_config(spec)
        back = family.from_config({"model_type": family.model_type, **config})
    except (Inexpressible, UserError, pydantic.ValidationError):
        return None
    return config if canonical(back) == canonical(spec) else None


def canonical(spec: ModelSpec) -> dict[str, Any]:
    """A spec with every default written out and every pattern unrolled: two are equal when they compute the same function.

    Dropout, initialisation and how experts are kept busy are left out: they matter to training, not to what a trained model is.
    """
    whole = spec.model_dump(exclude={"layers", "norm", "dropout", "init_std"})
    whole["layers"] = [_canonical_block(_with_norm(block, spec), spec.dim) for block in spec.blocks()]
    whole["norm"] = (spec.norm if spec.final_norm else LayerNorm()).model_dump()
    return whole


def _with_norm(block: Block, spec: ModelSpec) -> Block:
    return block if block.norm is not None else Block.model_validate({**block.model_dump(), "norm": spec.norm})


@lru_cache(maxsize=512)
def _canonical_block(block: Block, dim: int) -> Block:
    parts = {name: _canonical_part(part, dim) for name, part in block.parts().items()}
    return Block.model_validate({**block.model_dump(), "repeat": 1, **parts})


def _canonical_part(part: Any, dim: int) -> dict[str, Any]:
    data: dict[str, Any] = part.model_dump()
    if isinstance(part, Attention | CrossAttention):
        width = part.width(dim)
        data |= {"kv_heads": part.num_kv_heads, "head_dim": width}
        if isinstance(part, Attention):
            data["scale"] = part.scale or width**-0.5
            data["rope"] = _canonical_rope(part.rope)
    if isinstance(part, Experts):
        data |= Experts(experts=1, top_k=1, hidden=1).model_dump(include=_TRAINING)
        if part.top_groups == part.groups:
            data |= {"groups": 1, "top_groups": 1, "group_score": "max"}
    if isinstance(part, LatentAttention):
        data |= {"v_head_dim": part.v_width, "rope": _canonical_rope(part.rope)}
    if isinstance(part, Mamba):
        data["dt_rank"] = part.rank(dim)
    return data


def _canonical_rope(rope: Rope | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    data = rope.model_dump()
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.attention_factor is None:
        data["scaling"]["attention_factor"] = yarn_attention(rope.scaling.factor)
    return data
