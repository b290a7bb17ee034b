"""Drafts by a model's own modules for multi-token prediction, from the hidden states that it leaves behind anyway."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from weft import kernels
from weft.engine.continuation import Continuation
from weft.engine.draft import Draft, extend
from weft.engine.lanes import Lane, Lanes
from weft.errors import UserError
from weft.nn import Model
from weft.nn.block import Block
from weft.nn.model import Pending
from weft.nn.mtp import MTPModule
from weft.nn.pages import PagesExhausted
from weft.spec import ModelSpec


def check_depth(spec: ModelSpec, depth: int | None) -> int:
    """How many tokens a model's modules are asked to foretell; raises UserError where it has not as many."""
    if spec.mtp is None:
        raise UserError(
            "the model has no modules for multi-token prediction to draft with; draft with ngram or a smaller model, or take a checkpoint "
            "that was trained with them."
        )
    if depth is not None and not 1 <= depth <= spec.mtp.depth:
        raise UserError(
            f"drafts of {depth} tokens are asked of a model that has modules for multi-token prediction for {spec.mtp.depth}; "
            f"ask for 1 to {spec.mtp.depth}."
        )
    return depth or spec.mtp.depth


class MTPDrafter:
    """Module k says what comes k tokens after the next one (DeepSeek-V3, DeepSeek-AI 2024, section 2.2; Gloeckle et al. 2024, section 2).

    The modules read the hidden states of the model's own passes, which `listen` collects, and the tokens after them, and have decode state
    of their own: it holds what is known of a text, so that nothing is ever taken back; what depends on guesses is computed anew. Where the
    beginning of a text came from the prefix cache, it begins after that for the modules.

    depth    tokens of a draft; None is as many as there are modules.
    memory   bytes for the modules' state, apart from the model's; where it runs out, or more texts come than `rows`, the others go without
             a draft.
    Raises UserError for a model without modules, or with fewer than `depth`.
    """

    def __init__(
        self,
        model: Model,
        depth: int | None = None,
        rows: int = 16,
        chunk: int = 256,
        context: int | None = None,
        memory: int | None = None,
    ) -> None:
        self.model, self.longest = model.eval(), check_depth(model.spec, depth)
        self._modules = [cast(MTPModule, module) for module in model.mtp[: self.longest]]
        chunk = max(chunk, len(self._modules))
        context = min(context or model.spec.context, model.spec.context)
        with torch.inference_mode():
            self._lanes = Lanes(cast(Model, _Layers(model, self._modules)), rows, chunk, context, memory, cache=False)
        if any(leaf.kind == "static" for leaf in self._lanes.arena.leaves.values()):
            raise UserError("the modules for multi-token prediction attend to a memory, which drafts cannot give them; draft with ngram.")
        self._texts: dict[Continuation, _Text] = {}

    def check(self, model: Model) -> None:
        if model is not self.model:
            raise UserError("these modules for multi-token prediction belong to another model; give the drafter the model that generates.")
        if model.virtual_ids:
            raise UserError("modules for multi-token prediction do not know the model's virtual tokens; draft with ngram.")

    def listen(self, lanes: Sequence[Lane], counts: Sequence[int], hidden: Tensor) -> None:
        """Keep the hidden states of texts that may be drafted for; where many have gathered, let the modules read them at once."""
        for i, (lane, count) in enumerate(zip(lanes, counts, strict=True)):
            owner = lane.owner
            if not isinstance(owner, Continuation) or owner.params.penalised or owner.matcher is not None or count == 0:
                continue
            known = self._texts.get(owner)
            if known is not None and known.end != lane.fed - count:
                self.release(owner)
                known = None
            if known is None:
                if not self._lanes.available:
                    continue
                known = self._texts[owner] = _Text(owner, self._lanes.take(owner, []), lane.fed - count, lane.fed - count)
            known.hidden.append(hidden[i, :count])
            known.end += count
            while known.lane.live and known.unread > self._lanes.chunk + len(self._modules):  # what is read needs tokens after it
                self._read([_Reading(known, lane.ids, self._lanes.chunk)])

    def propose(self, texts: Sequence[Continuation], most: Sequence[int]) -> list[Draft]:
        drafts = [Draft([], None if text.params.greedy else []) for text in texts]
        readings = []
        for text, draft, count in zip(texts, drafts, most, strict=True):
            known, ids = self._texts.get(text), [*text.task.prompt, *text.ids]
            if known is None or count == 0 or known.end != len(ids) - 1:
                continue
            while known.lane.live and known.unread > self._lanes.chunk:
                self._read([_Reading(known, ids, self._lanes.chunk)])
            if known.lane.live and known.unread:
                readings.append(_Reading(known, ids, known.unread, draft, min(count, self.longest)))
        if readings:
            self._read(sorted(readings, key=lambda reading: reading.text.lane.row))
        return drafts

    def observe(self, text: Continuation, accepted: int) -> None:
        pass

    def release(self, text: Continuation) -> None:
        known = self._texts.pop(text, None)
        if known is not None:
            self._lanes.give_back(known.lane)

    def _read(self, readings: Sequence["_Reading"]) -> None:
        """One pass of all modules, for those of these readings for which there is room."""
        kept = [reading for reading in readings if self._has_room(reading)]
        if not kept:
            return
        longest, depth = max(reading.count for reading in kept), len(self._modules)
        hidden = torch.stack([F.pad(reading.text.take(reading.count), (0, 0, 0, longest - reading.count)) for reading in kept])
        tokens = torch.zeros(len(kept), longest + depth - 1, dtype=torch.long)
        for row, reading in enumerate(kept):
            known = reading.ids[reading.text.read + 1 : reading.text.read + reading.count + depth]
            tokens[row, : len(known)] = torch.tensor(known)
        self._foretell(kept, hidden, tokens)

    def _has_room(self, reading: "_Reading") -> bool:
        try:
            self._lanes.reserve(reading.text.lane, reading.count)
        except PagesExhausted:
            self.release(reading.text.owner)
            return False
        return True

    def _foretell(self, readings: Sequence["_Reading"], hidden: Tensor, tokens: Tensor) -> None:
        """The pass itself, over hidden states [B, T, D] and the tokens [B, T + depth - 1] after them.

        At place i, module k reads the hidden state of depth k - 1 and token i + k. At the last places that token is a guess of the modules
        before it, which is put into `tokens`; these places stay unread.
        """
        arena, model, length = self._lanes.arena, self.model, hidden.shape[1]
        lanes, counts = [reading.text.lane for reading in readings], [reading.count for reading in readings]
        rows, n_new = self._lanes.rows_of(lanes), torch.tensor(counts, device=hidden.device)
        pending: Pending = []
        with kernels.settled(model.dtype, model.device, False):
            step = arena.step(n_new, length, rows, keep="all", columns=self._lanes.columns_of(lanes, length))
            views, made = arena.views(rows), hidden
            for k, module in enumerate(self._modules):
                if module.eh_proj is None:
                    made, sides = module(hidden, None, step, views[k])
                else:
                    made, sides = module(made, model.enter(tokens[:, k : k + length].to(hidden.device), step), step, views[k])
                pending.append({name: side.pending for name, side in sides.items()})
                asked = [row for row, reading in enumerate(readings) if k < reading.most]
                if asked:
                    logits = model.logits(made[asked, [counts[row] - 1 for row in asked]])
                for i, row in enumerate(asked):
                    reading = readings[row]
                    assert reading.draft is not None
                    extend(reading.draft, reading.text.owner, logits[i : i + 1])
                    if counts[row] + k < tokens.shape[1]:
                        tokens[row, counts[row] + k] = reading.draft.ids[-1]
            done = [max(0, min(reading.count, reading.text.unread - len(self._modules) + 1)) for reading in readings]
            arena.commit(pending, torch.tensor(done, device=hidden.device), rows)
        for reading, count in zip(readings, done, strict=True):
            reading.text.drop(count)


@dataclass
class _Text:
    """What is known of one text: its lane of the modules' state, which begins at the text's place `first`, and the hidden states of the
    places before `end` that are not read for good."""

    owner: Continuation
    lane: Lane
    first: int
    end: int
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def read(self) -> int:
        return self.first + self.lane.fed

    @property
    def unread(self) -> int:
        return self.end - self.read

    def take(self, count: int) -> Tensor:
        """The first hidden states [count, D] that are unread."""
        if len(self.hidden) > 1:
            self.hidden = [torch.cat(self.hidden)]
        return self.hidden[0][:count]

    def drop(self, count: int) -> None:
        """That many more places are read for good."""
        self.hidden = [self.hidden[0][count:]]
        self.lane.fed += count


@dataclass
class _Reading:
    """The next `count` places of a text of tokens `ids`, and the draft of up to `most` tokens that is made at the last of them."""

    text: _Text
    ids: Sequence[int]
    count: int
    draft: Draft | None = None
    most: int = 0


class _Layers:
    """The modules as an arena sees a model: their blocks are its layers."""

    def __init__(self, model: Model, modules: Sequence[MTPModule]) -> None:
        self.model, self._blocks = model, [module.block for module in modules]

    def layers(self) -> list[Block]:
        return self._blocks

    def state_spec(self) -> list[dict[str, Any]]:
        return [block.state_spec() for block in self._blocks]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
