"""The model: embedding, blocks, head; and what it returns."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft import kernels
from weft.nn.block import Block, build_block
from weft.nn.fill import fill_normal
from weft.nn.linear import affine, pack_structure
from weft.nn.mixer import Site
from weft.nn.mtp import MTPModule
from weft.nn.norm import build_norm
from weft.nn.packed import PackedWeight
from weft.nn.position import build_position
from weft.nn.step import Step
from weft.nn.stretch import Stretch, find_stretches
from weft.spec import ModelSpec

if TYPE_CHECKING:
    from weft.nn.adapters.shared import Adapters
    from weft.nn.adapters.virtual import VirtualTokens

Pending = list[dict[str, dict[str, Tensor]]]


class Output:
    """What a model returns.

    hidden   [B, T, D] after the final norm: what the head reads.
    logits   [B, T, vocab], computed when first asked for, so that a loss may take them in chunks through `model.logits`.
    pending  per layer and part, the FIXED state that `Arena.commit` will make current.
    aux      "layer.part.name" -> tensor, what layers hand to objectives and metrics. Where a pass was asked to look ahead, "mtp.k"
             [B, T, D] holds the hidden states that foretell what comes k tokens after the next one, and "mtp.k.part.name" what their layer
             hands on.
    """

    def __init__(self, model: "Model", hidden: Tensor, pending: Pending, aux: dict[str, Tensor]) -> None:
        self._model, self.hidden, self.pending, self.aux = model, hidden, pending, aux
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self._model.logits(self.hidden)
        return self._logits

    def logits_at(self, index: Tensor) -> Tensor:
        """Logits [B, vocab] at one token a row; index [B] int64 counts within this pass."""
        rows = torch.arange(index.shape[0], device=index.device)
        return self._model.logits(self.hidden[rows, index])


class Model(nn.Module):
    """A stack of blocks between an embedding and a head, as a ModelSpec describes it.

    It owns no decode state: that is the arena's. A tied head is the embedding's own parameter. `score` is a classifier's or reward model's
    second head, or None. `fast` lets a quantised model take coarser products in long passes over state, and latent attention write keys
    and values out in them: what a token gets then depends on its chunk. `int8_state` keeps keys and values in 8 bits.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        blocks = spec.blocks()
        residual_std = spec.init_std / math.sqrt(2 * len(blocks))
        site = Site(spec.dim, spec.norm, spec.dropout, spec.init_std, residual_std)
        self.embed = Embedding(spec.vocab, spec.dim, spec.init_std)
        self.position = build_position(spec.position, spec.dim, spec.init_std)
        self.dropout = nn.Dropout(spec.dropout.embed)
        self.blocks = nn.ModuleList(build_block(block, site) for block in blocks)
        self.norm = build_norm(spec.norm, spec.dim) if spec.final_norm else None
        self.head = Head(spec)
        self.score = ScoreHead(spec.dim, spec.score, spec.init_std) if spec.score is not None else None
        self.mtp = nn.ModuleList(MTPModule(spec, site) for _ in range(spec.mtp.depth if spec.mtp else 0))
        self.gradient_checkpointing = False
        self.fast = self.int8_state = False
        self._stretches: dict[int, Stretch] | None = None
        self.adapters: Adapters | None = None
        self.virtual: VirtualTokens | None = None

    def set_adapters(self, adapters: "Adapters | None") -> None:
        """Say what adapter the model has now, after its layers have been given it."""
        self.adapters, self._stretches = adapters, None

    def state_spec(self) -> list[dict[str, Any]]:
        """Decode state a layer and part; a part that cannot run incrementally says None."""
        return [block.state_spec() for block in self.layers()]

    def layers(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(
        self,
        tokens: Tensor,
        step: Step | None = None,
        views: Sequence[dict[str, Any]] | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        ahead: bool = False,
    ) -> Output:
        """Run tokens [B, T] int64 through every layer.

        step    None treats each row as one document from position 0, no padding.
        views   an arena's views for incremental work; None is the parallel training pass.
        memory  (entries [B, S, M], lengths [B]) for cross-attention where no arena was primed.
        ahead   in a parallel pass, run the modules for multi-token prediction too; their hidden states come in `aux`.
        """
        step = Step.parallel(tokens) if step is None else step
        if memory is not None:
            step.memory = memory
        if self.adapters is not None:
            self.adapters.begin(step)
        x = self.enter(tokens, step)
        pending: Pending = []
        aux: dict[str, Tensor] = {}
        recompute = self.gradient_checkpointing and self.training and views is None
        stretches = self._in_one_call(x, views)
        for i, block in enumerate(self.blocks):
            if i in stretches:
                assert views is not None
                x = stretches[i].run(x, step, views)
                pending += [{} for _ in range(stretches[i].count)]
            if i < len(pending):
                continue
            if recompute:
                x, sides = checkpoint(block, x, step, None, use_reentrant=False)
            else:
                x, sides = block(x, step, None if views is None else views[i])
            pending.append({name: side.pending for name, side in sides.items()})
            for name, side in sides.items():
                aux.update({f"{i}.{name}.{key}": value for key, value in side.aux.items()})
        hidden = x if self.norm is None else self.norm(x)
        if ahead:
            aux |= self._look_ahead(hidden, tokens, step)
        return Output(self, hidden, pending, aux)

    def _look_ahead(self, hidden: Tensor, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """What the modules for multi-token prediction make of a parallel pass. The last tokens of a row, and of a document in it, have no
        token k places on: what stands there means nothing, and no earlier token sees it."""
        aux: dict[str, Tensor] = {}
        for k, module in enumerate(self.mtp, 1):
            further = self.enter(tokens.roll(-k, 1), step) if module.eh_proj is not None else None
            source = hidden if module.eh_proj is None or k == 1 else aux[f"mtp.{k - 1}"]
            if self.gradient_checkpointing and self.training:
                aux[f"mtp.{k}"], sides = checkpoint(module, source, further, step, use_reentrant=False)
            else:
                aux[f"mtp.{k}"], sides = module(source, further, step)
            for name, side in sides.items():
                aux.update({f"mtp.{k}.{name}.{key}": value for key, value in side.aux.items()})
        return aux

    def _in_one_call(self, x: Tensor, views: Sequence[dict[str, Any]] | None) -> dict[int, Stretch]:
        """By their first layer, the stretches of layers that one kernel call computes in this pass."""
        if views is None or self.spec.quant is None or not kernels.usable(x):
            return {}
        if self._stretches is None:
            self._stretches = find_stretches(self.blocks)
        return {i: stretch for i, stretch in self._stretches.items() if stretch.reads(views)}

    def enter(self, tokens: Tensor, step: Step) -> Tensor:
        """What the first layer reads, [B, T, D]: token vectors with their positions."""
        x = self.embed(tokens) if self.virtual is None else self.virtual(self.embed, tokens, step)
        if step.noise is not None:
            x = x + (2 * torch.rand_like(x) - 1) * step.noise[..., None].to(x.dtype)
        if self.spec.scale_embeddings:  # rounded to the working dtype first, as the published weights expect
            x = x * torch.tensor(math.sqrt(self.spec.dim), dtype=x.dtype, device=x.device)
        if self.position is not None:
            x = self.position(x, step.positions)
        return self.dropout(x) if self.training else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., D] that went through the final norm."""
        logits: Tensor = self.head(hidden, self.embed.weight)
        return logits

    def after_step(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let layers move what no gradient moves, after an optimiser step.

        stats  entries of `aux` under its names, summed over the step's micro-batches and processes.
        Returns what the layers say of the step, scalars: the least over them for a name that ends in `_min`, the largest for `_max`,
        else the mean.
        """
        said: dict[str, list[Tensor]] = {}
        for site, block in self._sites():
            for name, part in block.parts().items():
                own = {key.rsplit(".", 1)[-1]: value for key, value in stats.items() if key.rsplit(".", 1)[0] == f"{site}.{name}"}
                if own and hasattr(part, "after_step"):
                    for key, value in part.after_step(own).items():
                        said.setdefault(key, []).append(value)
        reduce: dict[str, Any] = {"min": torch.amin, "max": torch.amax}
        return {key: reduce.get(key.rsplit("_", 1)[-1], torch.mean)(torch.stack(values)) for key, values in said.items()}

    def _sites(self) -> list[tuple[str, Block]]:
        """Every layer under the name that its `aux` begins with."""
        further = [(f"mtp.{k}", module.block) for k, module in enumerate(self.mtp, 1) if isinstance(module, MTPModule)]
        return [*((str(i), block) for i, block in enumerate(self.layers())), *further]

    @property
    def virtual_ids(self) -> tuple[int, ...]:
        """Ids of the virtual tokens that stand before every text (`weft.nn.adapters.virtual`); none in most models."""
        return () if self.virtual is None else self.virtual.ids

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which numbers the model computes."""
        return self.embed.weight.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """In which numbers decode state is kept unless something else is asked for: the model's own, but half of float32 for the keys and
        values of a quantised model, whose weights are far coarser. A state that is fed back at every token stays as it is."""
        if self.int8_state:
            return torch.int8
        leaves = [leaf for layer in self.state_spec() for part in layer.values() for leaf in (part or {}).values()]
        fed_back = any(leaf.kind == "fixed" for leaf in leaves)
        return torch.bfloat16 if self.spec.quant is not None and self.dtype == torch.float32 and not fed_back else self.dtype


class Head(nn.Module):
    """The map from hidden states to logits. A tied head owns no weight: it is lent the embedding's, which stays one parameter."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.std, self.softcap = spec.init_std, spec.logit_softcap
        self.is_table = True
        self.weight = None if spec.tie_embeddings else nn.Parameter(torch.empty(spec.vocab, spec.dim))
        self.bias = nn.Parameter(torch.empty(spec.vocab)) if spec.head_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if isinstance(self.weight, Tensor):
            fill_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        logits = affine(hidden, embedding if self.weight is None else self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class ScoreHead(nn.Module):
    """A linear map [..., D] -> [..., outputs] without bias, beside the language model's head: logits of classes, or a reward.

    In float32 under autocast: rewards that differ by little must not be rounded together.
    """

    def __init__(self, dim: int, outputs: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(outputs, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.weight, self.std)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return affine(hidden.to(self.weight.dtype), self.weight)


class Embedding(nn.Embedding):
    """A table of token vectors drawn from N(0, std^2)."""

    def __init__(self, rows: int, dim: int, std: float) -> None:
        self.std, self.is_table = std, True
        super().__init__(rows, dim)

    def reset_parameters(self) -> None:
        if isinstance(self.weight, Tensor):
            fill_normal(self.weight, self.std)

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.rows(input) if isinstance(self.weight, PackedWeight) else super().forward(input)


def build(spec: ModelSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int | None = None) -> Model:
    """Build a model with initial weights; `seed` makes them reproducible. On `meta` it has shapes and no memory.

    Memory is taken once, in the final dtype, and filled by each module's `reset_parameters`.
    """
    with torch.device("meta"):
        model = Model(spec)
        if spec.quant is not None:
            pack_structure(model, spec.quant)
        model.to(dtype)
    if torch.device(device).type == "meta":
        return model
    initialise(materialise(model, device), seed)
    return model


def add_score(model: Model, outputs: int, seed: int, labels: Sequence[str] = ()) -> Model:
    """Put a fresh score head of so many outputs on a model, in place of one that it may have; its spec says so afterwards.

    labels  names of the outputs, or none.
    """
    spec = ModelSpec.model_validate({**model.spec.model_dump(), "score": outputs, "labels": tuple(labels)})
    head = ScoreHead(spec.dim, outputs, spec.init_std).to(model.device, model.dtype)
    initialise(head, seed)
    model.spec, model.score = spec, head
    return model


def materialise(model: Model, device: str | torch.device) -> Model:
    """Give a model built on `meta` its memory, unfilled but for buffers that follow from the spec.

    `to_empty` does the same through an operation on meta tensors for which torch imports sympy: 70 MB, and a second on two cores.
    """
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    return model


def initialise(model: nn.Module, seed: int | None = None) -> None:
    """Call `reset_parameters` of every module, children before parents; a given seed leaves the global generator untouched."""
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"][:1]
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for module in reversed(list(model.modules())):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
