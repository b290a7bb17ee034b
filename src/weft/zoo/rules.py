"""The rows of a weight map: which tensors of a file make which tensor of ours, as data. `weft.weights.map` reads them both ways.

A family's map is a list of rows for one concrete spec, layer by layer. Nothing here knows torch; every row is invertible.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Copy:
    """A tensor of the file as it stands. `older` are names the same tensor had in earlier files, accepted when reading."""

    name: str
    older: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transpose:
    """A matrix kept as [in, out] in the file (GPT-2's Conv1D) and as [out, in] by us."""

    name: str
    older: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reshape:
    """A tensor with the same entries in another shape in the file, such as a depthwise convolution's [inner, 1, taps]."""

    name: str
    shape: tuple[int, ...]
    older: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interleave:
    """Rows of `heads` heads whose rotary pairs are neighbours in the file, and half a head apart with us (GGUF's Llama).

    The `plain` first rows of each head are not rotated and stay where they are (DeepSeek).
    """

    name: str
    heads: int
    older: tuple[str, ...] = ()
    plain: int = 0


Source = Copy | Transpose | Reshape | Interleave


@dataclass(frozen=True)
class One:
    """One tensor of the file is one of ours."""

    ours: str
    source: Source


@dataclass(frozen=True)
class Cat:
    """Several tensors of the file, one below the other, are one of ours; `sizes` are the rows each gives."""

    ours: str
    sources: tuple[Source, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """Several tensors are the entries of one of ours along a new first axis (experts).

    With `sizes` an entry is made of as many tensors, one below the other, of which each gives so many rows. `whole` is the one tensor that
    some files hold in place of them all: accepted when reading, never written.
    """

    ours: str
    sources: tuple[Source, ...]
    sizes: tuple[int, ...] = ()
    whole: Source | None = None


@dataclass(frozen=True)
class Drop:
    """A tensor that files may hold and we compute (masks, rotary tables): read past, never written."""

    name: str


@dataclass(frozen=True)
class Alias:
    """A second name of `of`, present in some files of models that share it: must equal it when there, and written where `written` says so.

    cause   why there is one tensor for two names, and what to do about a file in which they differ.
    """

    name: str
    of: str
    written: bool = False
    cause: str = "config.json ties them; set tie_word_embeddings to false to keep both"


Rule = One | Cat | Stack | Drop | Alias


def copy(name: str, ours: str, older: tuple[str, ...] = ()) -> One:
    return One(ours, Copy(name, older))


def transpose(name: str, ours: str) -> One:
    return One(ours, Transpose(name))


def head(tied: bool, name: str, embedding: str) -> Rule:
    """The output matrix: of its own, or a second name of the embedding. A tied head is one parameter of ours, the embedding."""
    return Alias(name, of=embedding) if tied else copy(name, "head.weight")
