"""What a model is: a tree of specs that needs no weights and no torch to answer how large, how costly and how heavy it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from weft.errors import UserError
from weft.spec.base import Spec, StateSpec, parse
from weft.spec.channels import Channel
from weft.spec.experts import Experts
from weft.spec.mixers import CrossAttention, Mixer
from weft.spec.mtp import MTP
from weft.spec.norms import LayerNorm, Norm
from weft.spec.positions import Learned, NoPosition, Position
from weft.spec.quant import Quant

Topology = Literal["pre", "post", "sandwich", "parallel"]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class Dropout(Spec):
    """Shares of activations zeroed in training: after the embedding, on attention weights, on each residual branch."""

    embed: Rate = 0.0
    attention: Rate = 0.0
    residual: Rate = 0.0


class Block(Spec):
    """One layer: up to three parts (`mixer`, `cross`, `channel`) wired by a topology, `repeat` times.

    pre       x + part(norm(x))             GPT-2 and after
    post      norm(x + part(x))             the 2017 Transformer, GPT-1
    sandwich  x + norm(part(norm(x)))       Gemma 2
    parallel  x + sum of part(norm(x))      GPT-J, PaLM: one norm, all parts read the same input
    """

    topology: Topology = "pre"
    repeat: PositiveInt = 1
    mixer: Mixer | None = None
    cross: CrossAttention | None = None
    channel: Channel | None = None
    norm: Norm | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "Block":
        if not self.parts():
            raise ValueError("a layer has neither mixer, cross nor channel; give at least one.")
        return self

    def parts(self) -> dict[str, Any]:
        """The parts that are present, in the order they act."""
        named = {"mixer": self.mixer, "cross": self.cross, "channel": self.channel}
        return {name: part for name, part in named.items() if part is not None}

    def num_norms(self) -> int:
        return {"pre": 1, "post": 1, "sandwich": 2}[self.topology] * len(self.parts()) if self.topology != "parallel" else 1

    def state(self, dim: int) -> dict[str, StateSpec] | None:
        """State a part, or None when one of them cannot run incrementally."""
        leaves = {name: part.state(dim) for name, part in self.parts().items()}
        return None if any(leaf is None for leaf in leaves.values()) else leaves


class Group(Spec):
    """Layers repeated as a pattern: `{repeat: 13, layers: [local, global]}` is Gemma 2."""

    repeat: PositiveInt = 1
    layers: tuple["Layer", ...]


def _layer_kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else value.__class__.model_fields
    return "Group" if "layers" in keys else "Block"


Layer = Annotated[Annotated[Block, Tag("Block")] | Annotated[Group, Tag("Group")], Discriminator(_layer_kind)]
Group.model_rebuild()


class ModelSpec(Spec):
    """A language model: embedding, layers, head.

    vocab             rows of the embedding table.
    dim               channels of the residual stream.
    context           the longest sequence the model is meant for, in tokens.
    norm              the norm of every block that names none, and of the output.
    scale_embeddings  multiply embeddings by sqrt(dim) (2017, Gemma).
    final_norm        a norm before the head (all pre-norm models; not GPT-1).
    logit_softcap     logits become softcap * tanh(logits / softcap) (Gemma 2).
    init_std          standard deviation of initial weights; those that write into the residual stream have it over sqrt(2 layers).
    quant             how matrices are stored in fewer bits.
    score             outputs of a linear head beside the language model's, without bias: the classes of a classifier, 1 for a reward model.
    labels            what those outputs are called; nothing where they have no names.
    mtp               modules for multi-token prediction. Counts and costs leave them out unless asked: they serve training and drafts.
    """

    vocab: PositiveInt
    dim: PositiveInt
    context: PositiveInt = 2048
    layers: tuple[Layer, ...] = Field(min_length=1)
    norm: Norm = LayerNorm()
    position: Position = NoPosition()
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    final_norm: bool = True
    head_bias: bool = False
    logit_softcap: PositiveFloat | None = None
    dropout: Dropout = Dropout()
    init_std: PositiveFloat = 0.02
    quant: Quant | None = None
    mtp: MTP | None = None
    score: PositiveInt | None = None
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> "ModelSpec":
        if isinstance(self.position, Learned) and self.position.length < self.context:
            raise ValueError(
                f"context is {self.context} but the learned position table has {self.position.length} rows; lower context or lengthen it."
            )
        for block in self.blocks():
            for part in block.parts().values():
                part.num_params(self.dim)  # raises where the part does not fit this width
                rope = getattr(part, "rope", None)
                if rope is not None and hasattr(part, "width") and part.width(self.dim) % 2:
                    raise ValueError(f"head_dim is {part.width(self.dim)}; rotary positions need an even one.")
        if self.labels and len(self.labels) != (self.score or 0):
            given = f"labels names {len(self.labels)} outputs but score is {self.score}"
            raise ValueError(f"{given}; name each output of the score head, or none.")
        return self

    def blocks(self) -> list[Block]:
        """Every layer in order, repeats written out."""
        return list(_expand(self.layers))

    def num_params(self, embeddings: bool = True, active: bool = False) -> int:
        """Trained numbers; tied weights count once.

        embeddings  False leaves out token and position tables and the head.
        active      count only the experts that one token is sent to.
        """
        total = self.norm.num_params(self.dim) if self.final_norm else 0
        for block in self.blocks():
            total += block.num_norms() * (block.norm or self.norm).num_params(self.dim)
            for part in block.parts().values():
                total += part.active_params(self.dim) if active and isinstance(part, Experts) else part.num_params(self.dim)
        if embeddings:
            total += self.vocab * self.dim * (1 if self.tie_embeddings else 2) + self.head_bias * self.vocab
            total += self.position.num_params(self.dim)
            total += (self.score or 0) * self.dim
        return total

    def flops(self, length: int) -> int:
        """Floating-point operations of one forward pass over one sequence of `length` tokens; training costs three times this."""
        layers: int = sum(part.flops(self.dim, length) for block in self.blocks() for part in block.parts().values())
        return layers + 2 * length * self.dim * self.vocab

    def mtp_params(self) -> int:
        """Trained numbers of the modules for multi-token prediction, which `num_params` leaves out as published counts do."""
        if self.mtp is None:
            return 0
        norm, block = self.norm.num_params(self.dim), self.blocks()[-1]
        each: int = block.num_norms() * (block.norm or self.norm).num_params(self.dim) + self.final_norm * norm
        each += sum(part.num_params(self.dim) for part in block.parts().values())
        return self.mtp.depth * each + self.mtp.num_params(self.dim, norm)

    def mtp_flops(self, length: int) -> int:
        """What multi-token prediction adds to `flops`, the head's part included."""
        if self.mtp is None:
            return 0
        block: int = sum(part.flops(self.dim, length) for part in self.blocks()[-1].parts().values())
        return self.mtp.depth * (block + 2 * length * self.dim * self.vocab) + self.mtp.flops(self.dim, length)

    def mtp_state_bytes(self, length: int, itemsize: int = 2) -> int:
        """Bytes of decode state that drafting by multi-token prediction needs for a row of `length` tokens, beside `state_bytes`."""
        leaves = [] if self.mtp is None else [leaf for part in (self.blocks()[-1].state(self.dim) or {}).values() for leaf in part.values()]
        return sum(leaf.num_bytes(length, itemsize) for leaf in leaves) * (self.mtp.depth if self.mtp else 0)

    def state(self) -> list[dict[str, StateSpec]] | None:
        """Decode state a layer and part, or None where some mixer is not incremental."""
        layers = [block.state(self.dim) for block in self.blocks()]
        return None if any(layer is None for layer in layers) else [layer for layer in layers if layer is not None]

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        """Bytes of decode state one row needs for `length` tokens in a dtype of `itemsize` bytes."""
        return sum(
            leaf.num_bytes(length, itemsize) for layer in self.state() or [] for leaves in layer.values() for leaf in leaves.values()
        )

    def to_json(self) -> str:
        """The shortest JSON that parses back to an equal spec."""
        return self.model_dump_json(exclude_defaults=True, indent=2)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def _expand(layers: tuple[Any, ...]) -> Iterator[Block]:
    for layer in layers:
        for _ in range(layer.repeat):
            if isinstance(layer, Group):
                yield from _expand(layer.layers)
            else:
                yield layer


def model_spec(data: Any, what: str = "model") -> ModelSpec:
    """Parse a mapping into a ModelSpec; raises UserError with one sentence."""
    return parse(ModelSpec, data, what)


def read_model_spec(path: str | Path) -> ModelSpec:
    """Read a spec from a YAML or JSON file; raises UserError for a missing, unreadable or invalid one."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give the path of a YAML or JSON model spec.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); a model spec is YAML or JSON.") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {str(error).splitlines()[0]}.") from None
    return model_spec(data, str(path))
