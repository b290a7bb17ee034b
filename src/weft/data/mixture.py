"""Several sources by weight: which source each row comes from, how far each has been read, and the table that reports it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.data.shuffle import mix
from weft.data.windows import Windows
from weft.errors import UserError

_ONE = 1 << 48


class Draw:
    """Deals rows 0, 1, 2 … out to sources in fixed proportions, evenly spread rather than by chance.

    Of the first n rows the first source gets floor(n p + phase), the next one its share of the rest, and so on: a chain of
    Beatty sequences. So the rows a source has had by row n follow from n alone, any stretch of n rows has each source's share to
    within as many rows as there are sources, and nothing needs to be stored. Phases come from the seed.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        rest = [sum(weights[index:]) for index in range(len(weights))]
        self._shares = [round(weight / left * _ONE) for weight, left in zip(weights, rest, strict=True)]
        self._shares[-1] = _ONE
        self._phases = [mix(seed, 0xD5A3, index) % _ONE for index in range(len(weights))]

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has had; exact for any number of rows."""
        counts = []
        for share, phase in zip(self._shares, self._phases, strict=True):
            taken = rows if share == _ONE else (rows * share + phase) // _ONE
            counts.append(taken)
            rows -= taken
        return counts

    def owners(self, first: int, count: int) -> list[tuple[int, int]]:
        """(source, its own row count before this row) of rows first … first + count - 1."""
        if len(self._shares) == 1:
            return [(0, row) for row in range(first, first + count)]
        found = []
        before = self.counts(first)
        for row in range(first + 1, first + count + 1):
            after = self.counts(row)
            source = next(index for index, (old, new) in enumerate(zip(before, after, strict=True)) if new > old)
            found.append((source, before[source]))
            before = after
        return found


@dataclass(frozen=True)
class Source:
    """One source of a mixture: its name, its rows, and its share of all rows drawn."""

    name: str
    windows: Windows
    proportion: float


class Mixture:
    """Sources with weights.

    entries   (name, windows, weight): rows are drawn in proportion to the weights. Without weights they are the sources' numbers of
              tokens, so that all end their epochs together.
    Raises UserError where a name comes twice, a weight is not positive, or sources differ in row length, packing or tokenizer.
    """

    def __init__(self, entries: Sequence[tuple[str, Windows, float | None]]) -> None:
        if not entries:
            raise UserError("a mixture needs at least one source.")
        names = [name for name, _, _ in entries]
        for name, windows, weight in entries:
            if names.count(name) > 1:
                raise UserError(f"two sources are called '{name}'; give each a name of its own.")
            if weight is not None and not 0 < weight < float("inf"):
                raise UserError(
                    f"the weight of source '{name}' is {weight}; it must be above 0: leave the source out to draw nothing from it."
                )
            first = entries[0][1]
            if (windows.mode, windows.length) != (first.mode, first.length):
                here, there = f"{windows.mode} into {windows.length}", f"{first.mode} into {first.length}"
                raise UserError(f"source '{name}' is cut by {here} tokens, but '{names[0]}' by {there}; cut all in the same way.")
            if windows.store.tokenizer_sha256 != first.store.tokenizer_sha256:
                raise UserError(f"source '{name}' was made with another tokenizer than '{names[0]}'; prepare both with the same one.")
        given = [weight for _, _, weight in entries if weight is not None]
        if given and len(given) < len(entries):
            missing = next(name for name, _, weight in entries if weight is None)
            raise UserError(f"source '{missing}' has no weight, but others do; give every source a weight, or none.")
        weights = [float(windows.store.num_tokens) if weight is None else float(weight) for _, windows, weight in entries]
        total = sum(weights)
        self.sources = tuple(Source(name, windows, weight / total) for (name, windows, _), weight in zip(entries, weights, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources together."""
        return sum(source.windows.store.num_tokens for source in self.sources)

    def draw(self, seed: int) -> Draw:
        return Draw([source.proportion for source in self.sources], seed)

    def report(self, rows: int, seed: int) -> list[dict[str, str | int | float]]:
        """The data table after `rows` rows, in the columns of LLaMA's table 1 (Touvron et al. 2023): one dict a source.

        source, proportion (of the rows), epochs, tokens (of the source), documents, text_bytes and disk_bytes (its shards).
        """
        table = []
        for source, drawn in zip(self.sources, self.draw(seed).counts(rows), strict=True):
            store = source.windows.store
            line: dict[str, str | int | float] = {
                "source": source.name,
                "proportion": source.proportion,
                "epochs": drawn / source.windows.num_rows,
                "tokens": store.num_tokens,
                "documents": store.num_documents,
                "text_bytes": store.text_bytes,
                "disk_bytes": store.disk_bytes,
            }
            table.append(line)
        return table


def group(owners: Sequence[tuple[int, int]]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(source, which of the rows are its own, their counts within it) for each source that has any."""
    sources = np.array([source for source, _ in owners], dtype=np.int64)
    draws = np.array([draw for _, draw in owners], dtype=np.int64)
    return [(int(source), np.flatnonzero(sources == source), draws[sources == source]) for source in np.unique(sources)]
