"""How likely a model finds given text: teacher forcing through the same state and kernels that generate it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.engine.sampler import wide
from weft.errors import UserError
from weft.nn import Arena, Model
from weft.nn.pages import PAGE

HEAD_TOKENS = 64


@dataclass(frozen=True)
class Score:
    """Per token from the second on, given all before it (the first has nothing to be predicted from).

    logprobs   natural log-probability of the token.
    margins    how much likelier the likeliest token is, in nats; 0 where the token itself is the likeliest (or as likely).
    best       the likeliest token, the lowest id on a tie.
    """

    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    best: tuple[int, ...]

    @property
    def total(self) -> float:
        """Log-probability of the text after its first token."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token; raises UserError where there is nothing to predict."""
        if not self.logprobs:
            raise UserError("a text of one token has nothing to predict; give at least two tokens.")
        return math.exp(-self.total / len(self.logprobs))


@torch.inference_mode()
def score(
    model: Model, texts: Sequence[Sequence[int]], chunk: int = 256, rows: int = 8, memories: Sequence[Tensor] | None = None
) -> list[Score]:
    """Score texts given as token ids, `rows` at a time, fed in chunks through decode state as the engine feeds prompts: behind the model's
    virtual tokens, where it has some.

    memories  one [S, M] a text, for a model with cross-attention.
    Raises UserError for an empty text or one longer than the context, and for a model that cannot run token by token.
    """
    model.eval()
    context, before = model.spec.context - len(model.virtual_ids), model.virtual_ids
    for number, text in enumerate(texts):
        if not 0 < len(text) <= context:
            raise UserError(f"text {number} has {len(text)} tokens; give from 1 to {context}, the model's context.")
    scores: dict[int, Score] = {}
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for at in range(0, len(order), rows):
        batch = order[at : at + rows]
        memory = None if memories is None else [memories[number] for number in batch]
        scores |= zip(batch, _score_batch(model, [(*before, *texts[number]) for number in batch], chunk, memory), strict=True)
    return [scores[number] for number in range(len(texts))]


def _score_batch(model: Model, texts: Sequence[Sequence[int]], chunk: int, memory: Sequence[Tensor] | None) -> list[Score]:
    longest = max(map(len, texts))
    chunk = min(chunk, longest)
    device = model.device
    # Pages, as in the engine, so that the kernels that score are those that generate.
    arena = Arena(model, len(texts), longest, chunk, page=PAGE)
    arena.reserve({row: len(text) for row, text in enumerate(texts)}, dict.fromkeys(range(len(texts)), 0))
    if memory is not None:
        entries = torch.nn.utils.rnn.pad_sequence(list(memory), batch_first=True).to(device, model.dtype)
        arena.prime(entries, torch.tensor([len(each) for each in memory], device=device))
    elif any(leaf.kind == "static" for leaf in arena.leaves.values()):
        raise UserError("this model attends to a memory, and none was given; pass memories, one [S, M] a text.")
    padded = torch.zeros(len(texts), longest + 1, dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text)
    padded = padded.to(device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    parts: list[list[Tensor]] = [[], [], []]
    for start in range(0, longest, chunk):
        width = min(chunk, longest - start)
        n_new = (lengths - start).clamp(0, width)
        # keep="all" is the pass that verifies drafts: scoring generated text checks it against decoding.
        output = model(padded[:, start : start + width], arena.step(n_new, width, keep="all"), arena.views())
        arena.commit(output.pending, n_new)
        for first in range(0, width, HEAD_TOKENS):
            last = min(first + HEAD_TOKENS, width)
            logprobs = wide(model.logits(output.hidden[:, first:last])).log_softmax(-1)
            targets = padded[:, start + first + 1 : start + last + 1].clamp(max=model.spec.vocab - 1)  # nobody asks for virtual ones
            chosen = logprobs.gather(-1, targets[..., None])[..., 0]
            top = logprobs.max(-1)
            for part, values in zip(parts, (chosen, top.values - chosen, top.indices), strict=True):
                part.append(values)
    columns, first = [torch.cat(part, 1).tolist() for part in parts], len(model.virtual_ids)
    return [
        Score(*(tuple(column[row][first : len(text) - 1]) for column in columns))  # the last place predicts what was not given
        for row, text in enumerate(texts)
    ]
