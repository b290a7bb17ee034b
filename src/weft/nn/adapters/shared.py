"""What the adapters of one model have in common, and what a pass tells all of them."""

from dataclasses import dataclass

from torch import Tensor

from weft.nn.step import Step
from weft.spec.adapters import AdapterSettings


@dataclass(frozen=True)
class Place:
    """Rows `start` … `start + rows` of the weight of the `Linear` called `module`: all of it, or one of several fused maps.

    name          what files call this map, without `.weight`.
    scales_input  of IA3: whether the input is scaled and not the output.
    """

    module: str
    name: str
    start: int
    rows: int
    scales_input: bool = False


class Adapters:
    """What a model that was adapted knows of it: `Model.adapters`. A plain class, no part of the model's state.

    settings  of what was attached.      places  where, for forms that change linear maps.
    family    whose names the places have.
    base      name or folder of the model under the adapter, and `identity`, what `weft.weights.adapter_base` found it by; None where
              nobody said.
    names     of adapters that stand side by side, of which a pass names one a row (`Step.adapters`); none where there is one for all.
    off       leaves the adapters out of a pass.
    """

    def __init__(self, settings: AdapterSettings, places: tuple[Place, ...] = ()) -> None:
        self.settings, self.places = settings, places
        self.family = "weft"
        self.base: str | None = None
        self.identity: str | None = None
        self.names: tuple[str, ...] = ()
        self.off = False
        self.chosen: Tensor | None = None
        self._gates: dict[tuple[int, ...], Tensor] = {}

    def begin(self, step: Step) -> None:
        """A pass begins: take note of which rows have which adapter, [B] int64, 0 for none of them and k for `names[k - 1]`."""
        self.chosen, self._gates = step.adapters if self.names else None, {}

    def gate(self, layout: tuple[int, ...], gates: Tensor) -> Tensor:
        """Of a pass: the rows of gates [adapters + 1, R] bool that its rows chose, as [B, 1, R]. Maps of one layout share them."""
        if layout not in self._gates:
            self._gates[layout] = gates[self.chosen][:, None]
        return self._gates[layout]
