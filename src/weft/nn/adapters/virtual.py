"""Virtual tokens: ids beyond the vocabulary that stand before a text and are learned.

Token vocab + j is the j-th of them. Everything that goes by tokens (packing, pages, the prefix cache) treats them as any other; only what
reads text has to put them before it, and the model below knows what they mean.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.errors import UserError
from weft.nn.attention import Attention
from weft.nn.step import Step
from weft.spec.adapters import Prefix, Prompt

if TYPE_CHECKING:
    from weft.nn.model import Model


class VirtualTokens(nn.Module):
    """What a model has for its virtual tokens.

    vectors  of a prompt [n, D]: what the first layer reads in place of token vectors (Lester et al. 2021). Of a prefix
             [n, 2 L G W]: for each of L attention layers its keys of G heads, turned already, then its values (Li and Liang 2021).
    """

    def __init__(self, vectors: Tensor, vocab: int, is_prefix: bool) -> None:
        super().__init__()
        self.vocab, self.is_prefix = vocab, is_prefix
        self.vectors = nn.Parameter(vectors)

    @property
    def ids(self) -> tuple[int, ...]:
        """What stands before every text."""
        return tuple(range(self.vocab, self.vocab + self.vectors.shape[0]))

    def forward(self, embed: nn.Module, tokens: Tensor, step: Step) -> Tensor:
        """Vectors [B, T, D] of tokens [B, T], virtual ones among them. Of a prefix those are read as token 0, which nobody hears of."""
        virtual = tokens - self.vocab
        if step.virtual is None:
            step.virtual = virtual
        x: Tensor = embed(torch.where(virtual < 0, tokens, 0))
        if self.is_prefix:
            return x
        return torch.where((virtual >= 0)[..., None], self.vectors[virtual.clamp(min=0)].to(x.dtype), x)


class LayerPrefix:
    """The keys and values of one layer at virtual tokens. A plain class, as the parameter belongs to the model."""

    def __init__(self, tokens: VirtualTokens, layer: int, heads: int, width: int) -> None:
        self.tokens, self.layer, self.heads, self.width = tokens, layer, heads, width

    def put(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, G, W] of a pass with those of virtual tokens in their places."""
        if step.virtual is None:
            return k, v
        table = self.tokens.vectors.unflatten(1, (-1, 2, self.heads, self.width))[:, self.layer]  # [n, 2, G, W]
        own, there = table[step.virtual.clamp(min=0)].to(k.dtype), (step.virtual >= 0)[..., None, None]
        return torch.where(there, own[:, :, 0], k), torch.where(there, own[:, :, 1], v)


def attach_virtual(model: "Model", settings: Prompt | Prefix, ids: Tensor, like: Tensor) -> None:
    """Give a model virtual tokens that begin as the tokens ids [n] do: a prompt as their vectors, a prefix as the keys and values that the
    model has for them at the beginning of a text."""
    vocab = model.spec.vocab
    if isinstance(settings, Prompt):
        model.virtual = VirtualTokens(model.embed(ids).detach().to(like.dtype), vocab, False)
        return
    layers = prefixed_layers(model)
    vectors = torch.cat([values for pair in _read(model, ids) for values in pair], 1).to(like.dtype)
    model.virtual = tokens = VirtualTokens(vectors, vocab, True)
    for number, layer in enumerate(layers):
        layer.prefix = LayerPrefix(tokens, number, layer.groups, layer.width)


def prefixed_layers(model: "Model") -> list[Attention]:
    """The attention layers of a model in which every layer can have a prefix; raises UserError for another."""
    layers = []
    for i, block in enumerate(model.layers()):
        mixer = block.parts().get("mixer")
        if not isinstance(mixer, Attention) or not mixer.spec.causal:
            raise UserError(
                f"layer {i} of the model has no causal attention over keys and values, so it can have no prefix; take prompt or lora."
            )
        layers.append(mixer)
    if len({(layer.groups, layer.width) for layer in layers}) > 1:
        raise UserError("the model's layers have keys of different sizes, which a prefix cannot have; take prompt or lora.")
    return layers


@torch.no_grad()
def _read(model: "Model", ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [n, G W] of every attention layer for a text of these tokens."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, Attention)
        x, step = inputs[:2]
        _, k, v = layer._turned(layer.qkv(x).view(*x.shape[:2], -1, layer.width), step)
        found.append((k[0].flatten(1), v[0].flatten(1)))

    hooks = [layer.register_forward_pre_hook(keep) for layer in prefixed_layers(model)]
    training = model.training
    try:
        model.eval()(ids[None])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found
