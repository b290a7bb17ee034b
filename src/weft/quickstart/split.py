"""Which part of a corpus is held out, so that nothing near it is trained on.

The unit is a top-level package or module. Units that give one another away are joined first: a module and its twin (`decimal` and
`_pydecimal`), and units that share lines. Whole joined units are then held out, chosen by the hash of their name: the same corpus is
always split in the same way, and adding a module moves no other one.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from weft.errors import UserError
from weft.quickstart.corpus import Corpus, SourceFile

LINE_CHARACTERS = 30  # shorter lines are common property
LINE_OWNERS = 6  # a line in more units than that is a licence or an idiom
SHARED_LINES, SHARED_PART = 4, 0.05  # two units with that many lines in common, and that part of the smaller one's, are joined
LARGEST_PART = 1 / 3  # of the held-out budget: no one unit speaks for the whole
LARGEST_UNIT = 0.2  # of a user's corpus: a larger folder is opened and its entries are the units
FEWEST_UNITS = 8  # with fewer, files are cut instead

# Names that share no lines but one subject told twice.
RELATED = (
    ("datetime", "_strptime", "calendar"),
    ("asyncio", "concurrent"),
    ("pickle", "pickletools", "_compat_pickle", "copyreg"),
    ("collections", "_collections_abc"),
    ("tkinter", "idlelib", "turtle", "turtledemo"),
    ("sysconfig", "distutils", "_aix_support", "_osx_support"),
    ("pdb", "bdb"),
    ("re", "sre_compile", "sre_constants", "sre_parse"),
    ("threading", "_threading_local"),
    ("tokenize", "token", "lib2to3"),
    ("importlib", "zipimport", "imp", "pkgutil"),
)


@dataclass(frozen=True)
class Split:
    """The two parts, files in path order, and how they were made.

    method   "units" where whole units are held out, "tails" where the corpus has too few of them and the end of each file is.
    heldout_units  their names, joined ones together.
    """

    train: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...]
    method: str
    heldout_units: tuple[tuple[str, ...], ...]

    @property
    def train_bytes(self) -> int:
        return sum(file.num_bytes for file in self.train)

    @property
    def heldout_bytes(self) -> int:
        return sum(file.num_bytes for file in self.heldout)


def split_corpus(corpus: Corpus, share: float) -> Split:
    """Hold out about `share` of a corpus' bytes (never more)."""
    units = units_of(corpus)
    joined = join_units({name: [file.text for file in files] for name, files in units.items()})
    sizes = {group: sum(file.num_bytes for name in group for file in units[name]) for group in joined}
    chosen = choose(sizes, share * corpus.num_bytes)
    if len(units) < FEWEST_UNITS or sum(sizes[group] for group in chosen) < 0.5 * share * corpus.num_bytes:
        return _split_tails(corpus, share)
    held = {name for group in chosen for name in group}
    order = [(name, file) for name, files in units.items() for file in files]
    train = tuple(file for name, file in order if name not in held)
    heldout = tuple(file for name, file in order if name in held)
    return Split(train, heldout, "units", tuple(sorted(chosen)))


def units_of(corpus: Corpus) -> dict[str, list[SourceFile]]:
    """Top-level modules and packages by name; in a user's corpus, folders that hold too much of it are opened."""
    units = _by_prefix(corpus.files, 1)
    depth = 1
    while corpus.nested and depth < 12:
        large = {name for name, files in units.items() if sum(f.num_bytes for f in files) > LARGEST_UNIT * corpus.num_bytes}
        large = {name for name in large if any(len(file.parts) > depth for file in units[name])}
        if not large:
            break
        opened = _by_prefix([file for name in large for file in units[name]], depth + 1)
        units = {name: files for name, files in units.items() if name not in large} | opened
        depth += 1
    return dict(sorted(units.items()))


def _by_prefix(files: Iterable[SourceFile], depth: int) -> dict[str, list[SourceFile]]:
    units: dict[str, list[SourceFile]] = defaultdict(list)
    for file in files:
        path = PurePosixPath(*file.parts[:depth])
        units[path.with_suffix("").as_posix() if len(file.parts) <= depth else path.as_posix()].append(file)
    return units


def join_units(texts: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Groups of unit names that must not be divided: twins by name, related ones, and those that share lines."""
    parent = {name: name for name in texts}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in texts:
        by_stem[_stem(name)].append(name)
    known = [[name for name in names if name in parent] for names in RELATED]
    for names in [*by_stem.values(), *known, *shared_lines(texts)]:
        for name in names[1:]:
            parent[find(name)] = find(names[0])
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(texts):
        groups[find(name)].append(name)
    return sorted(tuple(names) for names in groups.values())


def _stem(name: str) -> str:
    """`_pydecimal` -> `decimal`, `_py_abc` -> `abc`, `_threading_local` stays: the module whose twin a private one is."""
    for prefix in ("_py_", "_py", "_"):
        if name.startswith(prefix) and not name.startswith("__"):
            return name.removeprefix(prefix)
    return name


def shared_lines(texts: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Pairs of units with `SHARED_LINES` long lines in common that make up `SHARED_PART` of the smaller one's."""
    lines = {
        name: {line for text in unit for raw in text.splitlines() if len(line := raw.strip()) >= LINE_CHARACTERS}
        for name, unit in texts.items()
    }
    owners: dict[str, list[str]] = defaultdict(list)
    for name in sorted(lines):
        for line in lines[name]:
            owners[line].append(name)
    common: Counter[tuple[str, str]] = Counter()
    for names in owners.values():
        if 2 <= len(names) <= LINE_OWNERS:
            common.update((first, second) for index, first in enumerate(names) for second in names[index + 1 :])
    return [
        pair
        for pair, count in sorted(common.items())
        if count >= SHARED_LINES and count >= SHARED_PART * min(len(lines[pair[0]]), len(lines[pair[1]]))
    ]


def choose(sizes: Mapping[tuple[str, ...], int], budget: float) -> list[tuple[str, ...]]:
    """Groups in the order of their names' hashes, each taken while it fits what is left of `budget` bytes."""
    chosen, room = [], budget
    for group in sorted(sizes, key=lambda group: hashlib.sha256("/".join(group).encode()).digest()):
        if sizes[group] <= min(room, LARGEST_PART * budget):
            chosen.append(group)
            room -= sizes[group]
    return chosen


def _split_tails(corpus: Corpus, share: float) -> Split:
    """The last `share` of every file that is long enough, cut at a blank line or else at a line's end."""
    train, heldout = [], []
    for file in corpus.files:
        wanted = int(len(file.text) * (1 - share))
        cut = file.text.find("\n\n", wanted) + 2
        if cut == 1 or cut > wanted + (len(file.text) - wanted) // 2:
            cut = file.text.find("\n", wanted) + 1
        if file.num_bytes * share < 500 or not 0 < cut < len(file.text):
            train.append(file)
            continue
        head, tail = file.text[:cut], file.text[cut:]
        train.append(SourceFile(file.path, head, len(head.encode())))
        heldout.append(SourceFile(file.path, tail, len(tail.encode())))
    if not heldout:
        raise UserError(
            f"{corpus.name} cannot be split: it has too few files to hold some out, and none long enough to hold out its end; "
            "give a corpus with more or longer files."
        )
    return Split(tuple(train), tuple(heldout), "tails", ())
