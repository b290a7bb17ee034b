"""Sparse attention patterns: which keys a query may look at, as a rule over the two positions and nothing else.

`allows(query, key)` is the definition. It takes Python ints and integer tensors alike, and is asked about 0 <= key <= query alone: that
attention is causal is said elsewhere. What the rule implies is stated beside it, so that state and kernels need not find out:

reach    entries a query may look back on, itself included, beside the pinned ones; None where that grows with the text.
pinned   the first so many positions of a text, which every query may look at.
band     the same rule as a window with gaps, where it is one: attention is then computed in time linear in the length.
pairs    (query, key) pairs of a text of `length` tokens.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from weft.spec.base import Spec

Part = Literal["both", "local", "far"]


class Band(NamedTuple):
    """The first `pinned` positions, and of the others every `dilation`-th looking back, `width` in all, the query itself included."""

    width: int
    dilation: int = 1
    pinned: int = 0

    @property
    def reach(self) -> int:
        return (self.width - 1) * self.dilation + 1

    def allows(self, query: Any, key: Any) -> Any:
        back = query - key
        near = back < self.reach
        if self.dilation > 1:
            near = near & (back % self.dilation == 0)
        return near | (key < self.pinned) if self.pinned else near

    def pairs(self, length: int) -> int:
        first = min(length, self.pinned)
        later = length - first
        ramp = min(later, self.width * self.dilation)
        rounds, rest = divmod(ramp, self.dilation)
        banded = self.dilation * _triangle(rounds) + rest * (rounds + 1) + (later - ramp) * self.width
        return _triangle(first) + later * self.pinned + banded


class _Banded(Spec):
    """A pattern that is a band."""

    window: PositiveInt

    @property
    @abstractmethod
    def band(self) -> Band:
        """The rule itself."""

    @property
    def reach(self) -> int:
        return self.band.reach

    @property
    def pinned(self) -> int:
        return self.band.pinned

    def allows(self, query: Any, key: Any) -> Any:
        return self.band.allows(query, key)

    def pairs(self, length: int) -> int:
        return self.band.pairs(length)


class Dilated(_Banded):
    """A window with gaps, and global tokens (Longformer, Beltagy et al. 2020, section 3.1), in causal form.

    window         keys a query looks at, itself included.
    dilation       steps from one of them to the next: the window reaches (window - 1) * dilation tokens back.
    global_tokens  the first so many positions, which every query may look at. That they look at everything needs no rule in a decoder: what
                   they may see are themselves. Longformer's separate projections for them are left out.
    """

    type: Literal["dilated"] = "dilated"
    dilation: PositiveInt = 1
    global_tokens: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _says_something(self) -> "Dilated":
        if self.dilation > 1 and self.window == 1:
            raise ValueError(f"dilation is {self.dilation} with window 1; one key has no gaps: widen the window, or leave dilation out.")
        if self.dilation == 1 and self.global_tokens == 0:
            raise ValueError(
                "a dilated pattern has neither dilation above 1 nor global_tokens; that is attention's own window: say that instead."
            )
        return self

    @property
    def band(self) -> Band:
        return Band(self.window, self.dilation, self.global_tokens)


class Streaming(_Banded):
    """A window and attention sinks: the first tokens of the text, kept for ever (StreamingLLM, Xiao et al. 2023, section 3.2).

    window  keys a query looks at, itself included, besides the sinks.
    sinks   first positions of the text that every query may look at.

    Positions stay those of the text. StreamingLLM counts positions inside its cache instead, so that a query stands at most window + sinks
    from a sink however long the text is; here that distance grows, and a rotary model stays within the distances it was trained on no
    longer than its context. State is bounded in both.
    """

    type: Literal["streaming"] = "streaming"
    sinks: PositiveInt = 4

    @property
    def band(self) -> Band:
        return Band(self.window, 1, self.sinks)


class Strided(Spec):
    """The strided factorisation of the Sparse Transformer (Child et al. 2019, section 4.3), for data with a period, such as images.

    stride  the paper's l.
    part    "local" is its A1, the query and the `stride` tokens before it; "far" is A2, every `stride`-th token looking back; "both" is
            their union (the paper's merged head). Layers that alternate between local and far are its interleaved form. Splitting the
            parts over the heads of one layer is not offered: one rule serves all heads.
    """

    type: Literal["strided"] = "strided"
    stride: PositiveInt = Field(ge=2)
    part: Part = "both"
    pinned: ClassVar[int] = 0

    @property
    def band(self) -> Band | None:
        return Band(self.stride + 1) if self.part == "local" else None

    @property
    def reach(self) -> int | None:
        return self.stride + 1 if self.part == "local" else None

    def allows(self, query: Any, key: Any) -> Any:
        back = query - key
        local, far = back <= self.stride, back % self.stride == 0
        return local if self.part == "local" else far if self.part == "far" else local | far

    def pairs(self, length: int) -> int:
        local = Band(self.stride + 1).pairs(length)
        rounds, rest = divmod(length, self.stride)
        far = self.stride * _triangle(rounds) + rest * (rounds + 1)
        in_both = length + max(0, length - self.stride)  # a query itself, and the token one stride before it
        return {"local": local, "far": far, "both": local + far - in_both}[self.part]


class Fixed(Spec):
    """The fixed factorisation of the Sparse Transformer (Child et al. 2019, section 4.3), for texts without a period, such as language.

    stride   tokens a block, the paper's l.
    summary  the last tokens of each block, which later blocks may look at: the paper's c.
    part     "local" is its A1, the query's own block; "far" is A2, every summary token so far, and the query itself, as else it may have
             nothing to look at; "both" is their union (the paper's merged head). As with `strided`, all heads share one rule.
    """

    type: Literal["fixed"] = "fixed"
    stride: PositiveInt = Field(ge=2)
    summary: PositiveInt = 1
    part: Part = "both"
    pinned: ClassVar[int] = 0
    band: ClassVar[None] = None

    @model_validator(mode="after")
    def _leaves_something_out(self) -> "Fixed":
        if self.summary >= self.stride:
            raise ValueError(
                f"summary is {self.summary} and stride {self.stride}; a summary is some tokens of a block, not all: give less than stride."
            )
        return self

    @property
    def reach(self) -> int | None:
        return self.stride if self.part == "local" else None

    def allows(self, query: Any, key: Any) -> Any:
        local, far = query // self.stride == key // self.stride, key % self.stride >= self.stride - self.summary
        return local if self.part == "local" else far | (query == key) if self.part == "far" else local | far

    def pairs(self, length: int) -> int:
        rounds, rest = divmod(length, self.stride)
        local = rounds * _triangle(self.stride) + _triangle(rest)
        earlier = self.summary * (self.stride * _triangle(rounds - 1) + rounds * rest)
        before = self.stride - self.summary  # tokens of a block that come before its summary, and look at themselves
        own = rounds * (before + _triangle(self.summary)) + min(rest, before) + _triangle(max(0, rest - before))
        return {"local": local, "far": earlier + own, "both": local + earlier}[self.part]


Pattern = Annotated[Strided | Fixed | Dilated | Streaming, Field(discriminator="type")]


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0
