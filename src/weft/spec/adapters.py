"""What of a model is trained when not all of it is: a recipe's `adapter`. Importable without torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from weft.spec.activations import Activation
from weft.spec.base import Spec

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


def _names(value: Any) -> Any:
    """A single name for a list of one; words that stand for many stay as they are."""
    return (value,) if isinstance(value, str) and value not in ("all", "usual") else value


Names = Annotated[tuple[str, ...], Field(min_length=1)]
Targets = Annotated[Literal["all"] | Names, BeforeValidator(_names)]


class AdapterSpec(Spec):
    """Of every form: `whole` where parameters of the model itself are trained, so that the model is what is saved."""

    @property
    def whole(self) -> bool:
        return False


class LoRA(AdapterSpec):
    """W + (alpha / rank) B A beside frozen linear maps, A [rank, in] drawn at random and B [out, rank] from zero (Hu et al. 2021).

    rank     of the change.      alpha  its factor, divided by the rank.      dropout  of what A reads.
    targets  Hugging Face's names of linear maps (q_proj, or a path's end such as layers.0.mlp.up_proj), or "all" inside the blocks, which
             learns as well as full fine-tuning where queries and values alone do not (Dettmers et al. 2023, figure 2).
    rslora   divide alpha by sqrt(rank): the factor at which large ranks go on learning (Kalajdzievski 2023).
    dora     train the length of every row of W apart from its direction (Liu et al. 2024, equations 5 and 11).
    """

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Dropout = 0.0
    targets: Targets = "all"
    rslora: bool = False
    dora: bool = False

    @property
    def factor(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class IA3(AdapterSpec):
    """A learned factor a channel: of keys, of values, and of what an MLP's last map reads (Liu et al. 2022, section 3.3).

    targets  names as LoRA's, or "usual", which is those three.
    inputs   those of the targets whose input is scaled and not their output; "usual" is the MLP's last map.
    """

    type: Literal["ia3"] = "ia3"
    targets: Annotated[Literal["usual"] | Names, BeforeValidator(_names)] = "usual"
    inputs: Annotated[Literal["usual"] | tuple[str, ...], BeforeValidator(_names)] = "usual"


class Bottleneck(AdapterSpec):
    """h + up(activation(down(h))) behind the parts of every layer, `up` from zero (Houlsby et al. 2019, figure 2).

    size   channels in the middle.      parts  behind which parts of a layer; the channel alone is Pfeiffer et al. 2021's form.
    """

    type: Literal["bottleneck"] = "bottleneck"
    size: PositiveInt = 32
    activation: Activation = "gelu"
    parts: Annotated[tuple[Literal["mixer", "cross", "channel"], ...], Field(min_length=1)] = ("mixer", "channel")

    @model_validator(mode="after")
    def _once(self) -> "Bottleneck":
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts is {', '.join(self.parts)}; name each part once.")
        return self


class Prompt(AdapterSpec):
    """Vectors that stand before the text in place of tokens' (Lester et al. 2021).

    tokens  how many.      text  whose tokens' vectors they begin as, repeated or cut to that many; None draws tokens at random.
    """

    type: Literal["prompt"] = "prompt"
    tokens: PositiveInt = 16
    text: str | None = None


class Prefix(AdapterSpec):
    """Keys and values that every attention layer finds before the text (Li and Liang 2021), without the MLP that may make them in training.

    tokens  how many positions they take.      text  whose keys and values they begin as, repeated or cut; None draws tokens at random.
    """

    type: Literal["prefix"] = "prefix"
    tokens: PositiveInt = 16
    text: str | None = None


class BitFit(AdapterSpec):
    """Train biases alone (Ben Zaken et al. 2022): those of linear maps and of norms. What is saved is the whole model."""

    type: Literal["bitfit"] = "bitfit"

    @property
    def whole(self) -> bool:
        return True


class Freeze(AdapterSpec):
    """Train a part of the model as it is. What is saved is the whole model.

    layers  so many of the last layers, and the final norm.
    parts   instead, or besides: parameters whose name contains one of these, as `blocks.3`, `norm` or `head`.
    """

    type: Literal["freeze"] = "freeze"
    layers: PositiveInt | None = None
    parts: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()

    @property
    def whole(self) -> bool:
        return True

    @model_validator(mode="after")
    def _something(self) -> "Freeze":
        if self.layers is None and not self.parts:
            raise ValueError("neither layers nor parts is given, so nothing would be trained; give the number of last layers to train.")
        return self


def _named(value: Any) -> Any:
    """`adapter: lora` for `adapter: {type: lora}`."""
    return {"type": value} if isinstance(value, str) else value


def _kind(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


AdapterSettings = Annotated[
    Annotated[LoRA, Tag("lora")]
    | Annotated[IA3, Tag("ia3")]
    | Annotated[Bottleneck, Tag("bottleneck")]
    | Annotated[Prompt, Tag("prompt")]
    | Annotated[Prefix, Tag("prefix")]
    | Annotated[BitFit, Tag("bitfit")]
    | Annotated[Freeze, Tag("freeze")],
    Discriminator(_kind),
    BeforeValidator(_named),
]
