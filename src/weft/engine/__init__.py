"""Generation: one engine over rows of decode state."""

from weft.engine.engine import Engine
from weft.engine.grammar import Grammar
from weft.engine.request import Event, Request, Result, SamplingParams, TokenLogprob
from weft.engine.score import Score, score

__all__ = ["Engine", "Event", "Grammar", "Request", "Result", "SamplingParams", "Score", "TokenLogprob", "score"]
