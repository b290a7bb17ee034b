"""How Hugging Face's files hold a mixture of experts: a tensor an expert and a projection, under one of a few vocabularies."""

from dataclasses import dataclass

from weft.spec import Experts
from weft.zoo.rules import Cat, Copy, Rule, Stack, copy


@dataclass(frozen=True)
class Names:
    """A family's words: of the module, and of an expert's three matrices."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


MIXTRAL = Names("block_sparse_moe", "w1", "w3", "w2")
COMMON = Names()


def experts_rules(theirs: str, ours: str, experts: Experts, names: Names = COMMON) -> list[Rule]:
    """The weight map of one layer's experts; `theirs` and `ours` are what the layer's and the channel's names begin with.

    Files have a tensor an expert. Those that hold them as one, as transformers keeps them in memory, are read as well.
    """
    module, memory, numbers = f"{theirs}.{names.module}", f"{theirs}.{COMMON.module}", range(experts.experts)
    pairs = tuple(Copy(f"{module}.experts.{e}.{part}.weight") for e in numbers for part in (names.gate, names.up))
    downs = tuple(Copy(f"{module}.experts.{e}.{names.down}.weight") for e in numbers)
    rows: list[Rule] = [
        copy(f"{module}.gate.weight", f"{ours}.router.weight", (f"{memory}.gate.weight",)),
        Stack(f"{ours}.units.gate_up", pairs, (experts.hidden, experts.hidden), Copy(f"{memory}.experts.gate_up_proj")),
        Stack(f"{ours}.units.down", downs, whole=Copy(f"{memory}.experts.down_proj")),
    ]
    if experts.choice_bias:
        rows.append(copy(f"{module}.gate.e_score_correction_bias", f"{ours}.router.choice_bias"))
    if experts.shared:
        rows += gated_rules(f"{module}.shared_experts", f"{ours}.shared", experts.shared_hidden)
    return rows


def gated_rules(theirs: str, ours: str, hidden: int, bias: bool = False) -> list[Rule]:
    """The weight map of one gated unit."""
    rows: list[Rule] = []
    for kind in ("weight", "bias") if bias else ("weight",):
        sources = (Copy(f"{theirs}.gate_proj.{kind}"), Copy(f"{theirs}.up_proj.{kind}"))
        rows += [Cat(f"{ours}.gate_up.{kind}", sources, (hidden, hidden)), copy(f"{theirs}.down_proj.{kind}", f"{ours}.down.{kind}")]
    return rows
