"""A model taught on short texts made ready for longer ones."""

from typing import Any

from weft.nn.model import Model
from weft.nn.rope import Rope
from weft.spec import ModelSpec


def take_rope(model: Model, spec: ModelSpec) -> None:
    """Let a model compute with the rotary positions, and have the context, of `spec`, which is its own but for these. No weight changes.

    Where the base is raised the slowest pairs of channels turn so slowly that distances the model has never met look like near ones (Xiong
    et al. 2023, section 2.1).
    """
    blocks = spec.blocks()
    for index, (_, block) in enumerate(model._sites()):
        described = blocks[min(index, len(blocks) - 1)]  # modules for multi-token prediction are as the last layer is
        layer: Any
        for name, layer in block.parts().items():
            wanted = getattr(described, name)
            if getattr(layer, "rope", None) is None:
                continue
            assert wanted.rope.score_factor == layer.rope.spec.score_factor, "scores are scaled when a layer is built"
            layer.rope = Rope(wanted.rope, layer.rope.head_dim).to(model.device)
            if hasattr(layer, "spec"):
                layer.spec = wanted
    model.spec = spec
