"""Blocks: how the parts of one layer are wired to the residual stream."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weft.nn.mixer import Side, Site, build_part
from weft.nn.norm import build_norm
from weft.nn.step import Step
from weft.spec import Block as BlockSpec
from weft.spec import StateSpec

Sides = dict[str, Side]


class Block(nn.Module):
    """The parts of a layer in the order they act: `mixer`, then `cross`, then `channel`, each present or not."""

    def __init__(self, spec: BlockSpec, site: Site) -> None:
        super().__init__()
        self.names = list(spec.parts())
        self.dropout = nn.Dropout(site.dropout.residual)
        for name, part in spec.parts().items():
            self.add_module(name, build_part(part, site))
        norm = spec.norm or site.norm
        self._norms = self.norm_names()
        for name in self._norms:
            self.add_module(name, build_norm(norm, site.dim))
        self.behind: nn.ModuleDict | None = None

    def add_behind(self, name: str, module: nn.Module) -> None:
        """Let a module change what the part `name` writes: [B, T, D] -> [B, T, D]."""
        if self.behind is None:
            self.behind = nn.ModuleDict()
        self.behind[name] = module

    def norm_names(self) -> list[str]:
        return [f"{name}_norm" for name in self.names]

    def parts(self) -> dict[str, Any]:
        """The mixers and channels by name; they all follow the `Mixer` protocol."""
        return {name: self.get_submodule(name) for name in self.names}

    def state_spec(self) -> dict[str, StateSpec | None]:
        return {name: part.state_spec() for name, part in self.parts().items()}

    def forward(self, x: Tensor, step: Step, views: Mapping[str, Any] | None = None) -> tuple[Tensor, Sides]:
        raise AssertionError("every topology defines forward")

    def _norm(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, name)(x)  # not get_submodule, which takes a microsecond, hundreds of times a token
        return y

    def _part(self, name: str, x: Tensor, step: Step, views: Mapping[str, Any] | None, sides: Sides) -> Tensor:
        y, sides[name] = getattr(self, name)(x, step, None if views is None else views[name])
        if self.behind is not None and name in self.behind:
            y = self.behind[name](y)
        dropped: Tensor = self.dropout(y) if self.training else y
        return dropped


class PreBlock(Block):
    """x + part(norm(x)): GPT-2 and most models since."""

    def forward(self, x: Tensor, step: Step, views: Mapping[str, Any] | None = None) -> tuple[Tensor, Sides]:
        sides: Sides = {}
        for name, norm in zip(self.names, self._norms, strict=True):
            x = x + self._part(name, self._norm(norm, x), step, views, sides)
        return x, sides


class PostBlock(Block):
    """norm(x + part(x)): the 2017 Transformer and GPT-1."""

    def forward(self, x: Tensor, step: Step, views: Mapping[str, Any] | None = None) -> tuple[Tensor, Sides]:
        sides: Sides = {}
        for name in self.names:
            x = self._norm(f"{name}_norm", x + self._part(name, x, step, views, sides))
        return x, sides


class SandwichBlock(Block):
    """x + norm(part(norm(x))): Gemma 2."""

    def norm_names(self) -> list[str]:
        return [f"{name}_{kind}" for name in self.names for kind in ("norm", "post_norm")]

    def forward(self, x: Tensor, step: Step, views: Mapping[str, Any] | None = None) -> tuple[Tensor, Sides]:
        sides: Sides = {}
        for name in self.names:
            y = self._part(name, self._norm(f"{name}_norm", x), step, views, sides)
            x = x + self._norm(f"{name}_post_norm", y)
        return x, sides


class ParallelBlock(Block):
    """x + the sum of part(norm(x)): GPT-J and PaLM; all parts read one normalised input."""

    def norm_names(self) -> list[str]:
        return ["norm"]

    def forward(self, x: Tensor, step: Step, views: Mapping[str, Any] | None = None) -> tuple[Tensor, Sides]:
        sides: Sides = {}
        normal = self._norm("norm", x)
        for name in self.names:
            x = x + self._part(name, normal, step, views, sides)
        return x, sides


TOPOLOGIES: dict[str, type[Block]] = {"pre": PreBlock, "post": PostBlock, "sandwich": SandwichBlock, "parallel": ParallelBlock}


def build_block(spec: BlockSpec, site: Site) -> Block:
    return TOPOLOGIES[spec.topology](spec, site)
