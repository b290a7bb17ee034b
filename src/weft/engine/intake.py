"""What a request must satisfy before it is queued, and the task it becomes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weft.engine.continuation import Task
from weft.engine.lanes import Lanes
from weft.engine.request import Request, SamplingParams, fresh_seed
from weft.errors import UserError, nearest
from weft.nn import Model

if TYPE_CHECKING:
    from weft.tokenizer import Tokenizer


class Intake:
    """Checks requests against a model, its tokenizer and the memory there is."""

    def __init__(self, model: Model, tokenizer: "Tokenizer | None", lanes: Lanes) -> None:
        self.model, self.tokenizer, self.lanes = model, tokenizer, lanes
        self._attends_memory = any(leaf.kind == "static" for leaf in lanes.arena.leaves.values())

    def task(self, number: int, request: Request) -> Task:
        """The task a request becomes; a limit of 0 means that nothing can follow the prompt. Raises UserError where it cannot be served."""
        params, tokenizer = request.params, self.tokenizer
        if isinstance(request.prompt, str):
            if tokenizer is None:
                raise UserError("the prompt is text, but this engine has no tokenizer; give token ids, or an engine with a tokenizer.")
            prompt = tuple(tokenizer.encode(request.prompt))
        else:
            prompt = tuple(request.prompt)
        self._check_prompt(prompt)
        self._check_params(params)
        adapter = self.adapter(request.adapter)
        if (request.memory is not None) != self._attends_memory:
            given = "given" if request.memory is not None else "missing"
            takes = "attends to a memory" if self._attends_memory else "has no cross-attention"
            raise UserError(f"the request's memory is {given}, but this model {takes}; give a memory where and only where one is used.")
        ends = set(params.stop_ids)
        if tokenizer is not None and not params.ignore_eos:
            ends |= set(tokenizer.eos_ids)
        seed = fresh_seed() if params.seed is None else params.seed
        virtual = self.model.virtual_ids
        limit = self._limit(len(virtual) + len(prompt), params)
        return Task(number, prompt, params, frozenset(ends), limit, seed, request.memory, virtual, adapter)

    def adapter(self, name: str | None) -> int:
        """The number of an adapter, counted from 1; 0 for the base."""
        names = () if self.model.adapters is None else self.model.adapters.names
        if name is None:
            return 0
        if name not in names:
            known = f"the model has {', '.join(names)}" if names else "the model has none to choose among"
            raise UserError(f"the request asks for the adapter '{name}', but {known}.{nearest(name, names)}")
        return 1 + names.index(name)

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings are given, but this engine has no tokenizer; give stop_ids, or an engine with a tokenizer.")
        if params.constrained and self.tokenizer is None:
            raise UserError("a grammar is given, but this engine has no tokenizer; give an engine with a tokenizer.")
        vocab = self.model.spec.vocab
        foreign = next((token for token in params.logit_bias if token >= vocab), None)
        if foreign is not None:
            raise UserError(f"logit_bias has the token id {foreign}, but the model's ids go from 0 to {vocab - 1}.")
        if params.beams > self.lanes.limit:
            raise UserError(f"beams is {params.beams} and the engine has {self.lanes.limit} rows; lower beams, or raise rows or memory.")

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        context, vocab = self.lanes.context - len(self.model.virtual_ids), self.model.spec.vocab
        if not prompt:
            raise UserError("the prompt has no tokens; give at least one.")
        if len(prompt) > context:
            raise UserError(f"the prompt has {len(prompt)} tokens and the model's context is {context}; shorten the prompt.")
        foreign = next((token for token in prompt if not 0 <= token < vocab), None)
        if foreign is not None:
            raise UserError(f"the prompt has the token id {foreign}, but the model's ids go from 0 to {vocab - 1}; use its own tokenizer.")

    def _limit(self, length: int, params: SamplingParams) -> int:
        """Most tokens to generate: what was asked for, or what the context and the memory allow. The last one is never fed."""
        limit = self.lanes.context - length
        limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
        fits = self.lanes.max_pages // params.beams * self.lanes.page
        wanted = length + (min(limit, 1) if params.max_tokens is None else limit) - 1
        if self.lanes.has_pages and wanted > fits:
            asked = f"{params.beams} beams of {wanted}" if params.beams > 1 else str(wanted)
            raise UserError(
                f"the request needs the state of {asked} tokens, {params.beams * self.lanes.arena.state_bytes(wanted)} bytes, and "
                f"memory for {fits * params.beams} tokens is allowed; shorten it, lower max_tokens, or allow more memory."
            )
        return min(limit, fits + 1 - length) if self.lanes.has_pages else limit
