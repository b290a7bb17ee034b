"""Holding out: whole units, never beside their twins, the same ones every time."""

import pytest

from weft.errors import UserError
from weft.quickstart.corpus import Corpus, SourceFile, read_stdlib
from weft.quickstart.split import choose, join_units, shared_lines, split_corpus, units_of


def file(path: str, text: str) -> SourceFile:
    return SourceFile(path, text, len(text.encode()))


def corpus(*files: SourceFile, nested: bool = True) -> Corpus:
    return Corpus("test", "text", files, nested, {})


def words(seed: int, lines: int = 40) -> str:
    return "".join(f"a long enough line of unit {seed} with number {i}\n" for i in range(lines))


@pytest.fixture(scope="module")
def library():
    return read_stdlib()


@pytest.fixture(scope="module")
def stdlib(library):
    return split_corpus(library, 0.06)


@pytest.fixture(scope="module")
def groups(library):
    return join_units({name: [f.text for f in files] for name, files in units_of(library).items()})


def unit(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def test_no_unit_of_the_standard_library_is_on_both_sides(stdlib):
    train, heldout = {unit(f.path) for f in stdlib.train}, {unit(f.path) for f in stdlib.heldout}
    assert not train & heldout
    assert heldout == {name for group in stdlib.heldout_units for name in group}
    assert 0.05 < stdlib.heldout_bytes / (stdlib.heldout_bytes + stdlib.train_bytes) <= 0.06


@pytest.mark.parametrize(
    "twins", [("decimal", "_pydecimal"), ("io", "_pyio"), ("ntpath", "posixpath", "genericpath"), ("profile", "cProfile"), ("bz2", "lzma")]
)
def test_twins_stay_together(twins, groups):
    present = {name for name in twins if any(name in group for group in groups)}
    assert any(present <= set(group) for group in groups)
    assert not any({"argparse", "json"} <= set(group) for group in groups)


def test_no_near_duplicate_crosses_the_split(stdlib):
    sides = {f"{side}": [f.text for f in files] for side, files in (("train", stdlib.train), ("heldout", stdlib.heldout))}
    lines = [{s for t in texts for raw in t.splitlines() if len(s := raw.strip()) >= 30} for texts in sides.values()]
    assert len(lines[0] & lines[1]) < 0.03 * len(lines[1])  # licences and idioms
    leaky = lines[0] | set(list(lines[1])[: len(lines[1]) // 10])
    assert len(leaky & lines[1]) > 0.03 * len(lines[1])


def test_units_that_share_lines_are_joined():
    copied = words(1) + words(2, 3)
    assert shared_lines({"a": [words(1)], "b": [copied], "c": [words(3)]}) == [("a", "b")]
    assert join_units({"a": [words(1)], "b": [copied], "c": [words(3)]}) == [("a", "b"), ("c",)]


def test_a_line_that_many_units_have_joins_none():
    licence = "Permission is hereby granted, free of charge, to anyone\n" * 1 + words(99, 6)
    assert shared_lines({str(i): [licence + words(i)] for i in range(10)}) == []
    assert shared_lines({str(i): [licence + words(i)] for i in range(2)}) == [("0", "1")]


def test_large_folders_of_users_are_opened_and_those_of_the_standard_library_are_not():
    files = [file(f"src/pkg{i}/m.py", words(i)) for i in range(10)] + [file("README.md", words(50, 4))]
    assert set(units_of(corpus(*files))) == {*(f"src/pkg{i}" for i in range(10)), "README"}
    assert set(units_of(corpus(*files, nested=False))) == {"src", "README"}


def test_choosing_depends_on_names_alone_and_no_group_rules():
    sizes = {(f"m{i}",): 100 for i in range(50)} | {("giant",): 3000}
    first = choose(sizes, 800)
    assert sum(sizes[group] for group in first) <= 800
    assert ("giant",) not in first
    assert set(first) - {("m1",)} <= set(choose({name: size for name, size in sizes.items() if name != ("m1",)}, 800))
    assert choose(dict(reversed(list(sizes.items()))), 800) == first


def test_a_corpus_of_few_files_is_cut_inside_them():
    text = "".join(f"Paragraph {i} of the book.\nIt goes on for a while.\n\n" for i in range(2000))
    split = split_corpus(corpus(file("book.txt", text)), 0.06)
    assert split.method == "tails"
    assert split.train[0].text + split.heldout[0].text == text
    assert split.heldout[0].text.startswith("Paragraph")
    assert 0.04 < split.heldout_bytes / len(text) <= 0.061


def test_a_corpus_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="cannot be split"):
        split_corpus(corpus(*(file(f"{i}.txt", "x" * 300) for i in range(3))), 0.06)
