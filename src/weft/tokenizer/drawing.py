"""An explanation as lines of text, the way it is drawn on a blackboard."""

from collections.abc import Callable, Iterator, Sequence

from weft.tokenizer.algorithms import Merge, Segmentation, odds
from weft.tokenizer.explain import Explanation, Word
from weft.tokenizer.token_text import SPACE_MARK, symbols_to_bytes

_MARKS = {" ": "␣", SPACE_MARK: "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible(symbol: str, byte_level: bool) -> str:
    """A symbol as a person can read it: spaces and line breaks marked, what does not print in hexadecimal."""
    data = symbols_to_bytes(symbol) if byte_level else symbol.encode()
    if data is None:
        data = symbol.encode()
    try:
        return "".join(_MARKS.get(char) or (char if char.isprintable() else f"<{ord(char):02X}>") for char in data.decode())
    except UnicodeDecodeError:
        return "".join(chr(byte) if 0x20 < byte < 0x7F else f"<{byte:02X}>" for byte in data)


def draw(explanation: Explanation, byte_level: bool) -> list[str]:
    """Lines that show every step.

    byte_level   the symbols are in GPT-2's byte alphabet.
    """

    def show(symbol: str) -> str:
        return visible(symbol, byte_level)

    words = explanation.words
    lines = [f"{explanation.kind}: {len(explanation.text)} characters, {len(words)} {_plural('word', len(words))}, {_count(explanation)}"]
    if len(words) > 1:
        lines.append("cut:  " + " | ".join(show(word.text) for word in words))
    seen: dict[str, int] = {}
    for number, word in enumerate(words, 1):
        lines.append("")
        lines.append(f"{number}. {show(word.text)}")
        if word.text in seen:
            lines.append(f"   as word {seen[word.text]}")
        else:
            seen[word.text] = number
            lines += [f"   {line}" for line in _steps(word, show)]
        lines.append("   ids: " + " ".join(map(str, word.ids)))
    return [*lines, "", "ids: " + " ".join(map(str, explanation.ids))]


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def _count(explanation: Explanation) -> str:
    count = len(explanation.ids)
    return f"{count} {_plural('token', count)}"


def _steps(word: Word, show: Callable[[str], str]) -> Iterator[str]:
    if word.note:
        yield word.note
    if word.start:
        yield from _merge_rows(word.start, word.merges, show)
    for number, segmentation in enumerate(word.segmentations):
        yield from _segmentation(segmentation, word.segmentations[0] if number else None, show)
    for match in word.matches:
        found = "nothing matches" if match.piece is None else show(match.piece)
        count = len(match.tried)
        yield f"{show(match.rest)}  →  {found}" + (f"   ({count} {_plural('candidate', count)} tried)" if count else "")
    if word.matches and any(match.piece is None for match in word.matches):
        yield f"so the whole word becomes {word.tokens[0]}"


def _merge_rows(start: Sequence[str], merges: Sequence[Merge], show: Callable[[str], str]) -> Iterator[str]:
    rows = [("", "", " ".join(map(show, start)))]
    for index, merge in enumerate(merges):
        # The same pair joined at several places, one after the other, is one step on the blackboard.
        if index + 1 < len(merges) and merges[index + 1].rank == merge.rank:
            continue
        rows.append((f"merge {merge.rank}", f"{show(merge.left)} + {show(merge.right)}", " ".join(map(show, merge.symbols))))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for rank, pair, symbols in rows:
        yield f"{rank:>{widths[0]}}  {pair:<{widths[1]}}  {symbols}".rstrip()


def _segmentation(segmentation: Segmentation, best: Segmentation | None, show: Callable[[str], str]) -> Iterator[str]:
    title = "best:      " if best is None else "runner-up: "
    note = "" if best is None else f", {odds(best, segmentation):.3g} times less probable"
    yield title + " ".join(map(show, segmentation.pieces))
    terms = " ".join(f"{value:+.3f}".replace("+", "+ ").replace("-", "- ") for value in segmentation.log_probs)
    yield f"           log p = {terms.removeprefix('+ ')} = {segmentation.score:.3f}{note}"
