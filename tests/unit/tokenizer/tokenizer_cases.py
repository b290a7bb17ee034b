"""Strings that break tokenizers, the same thousand every time, and readers of the reference vectors."""

import argparse
import functools
import random
import textwrap
from pathlib import Path
from typing import Any

import pytest

from paths import SHARED
from weft.tokenizer import Tokenizer, load_tokenizer
from weft.tokenizer.train import Kind, train_tokenizer
from weft.weights.gguf import read_gguf

VECTORS = ("gpt-2", "phi-3", "bert-bge", "deepseek-coder")

FIXED = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\n\n\n",
    "a\r\nb\r\n\r\nc",
    " \n \n\t \r\n ",
    "\x00",
    "a\x00b",
    "\x00" * 7,
    "\x01\x02\x1b[31mred\x1b[0m\x7f",
    "\x1c\x1d\x1e\x1f words \x85 next",
    "Hello world",
    " Hello world",
    "Hello  world ",
    "Hello, world! It's 2024 — we'll, I'VE, they'Re, don'T.",
    "3 33 333 3333 33333 333333 3333333 3.14159265 1e-5 ½ ² ٣٤ ৩ Ⅻ",
    "nai\u0308ve e\u0301 a\u0300\u0301\u0302\u0303 Z\u0351\u036b\u0343a\u0328lgo",
    "👩‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🇪🇸🇲🇽 ❤️ ❤ ☎️ 🫠🫨",
    "مرحبا بالعالم \u202eabc\u202c שלום עולם \u200f\u200e",
    "नमस्ते दुनिया สวัสดีชาวโลก 你好，世界 こんにちは 안녕하세요 ភាសាខ្មែរ",
    "ﬁ ﬂ ① ㎏ Å Å ﷺ ｆｕｌｌ　ｗｉｄｔｈ ﾊﾝｶｸ",
    "\ufeffBOM \u200bzero\u200cwidth\u200d\u2060 \u00a0nbsp\u2003em\u3000ideographic\u2028line\u2029para",
    "\ufffd\ufffe\uffff\U0010ffff\U000e0001 \ue000 private",
    "▁metaspace▁ Ġ Ċ <0x0A> ## ##ing </w>",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|>\n <s></s> <unk> [CLS] [SEP] [MASK] <pad> [INST]",
    "<|endoftext|",
    "<|fim_prefix|>def f():\n    return 1\n<|fim_suffix|>",
    "def f(x):\n\treturn x  # comment\n\n\nclass A:\n    pass\n",
    "https://example.org/a?b=c&d=%20#frag user@example.org /usr/bin/env C:\\dir\\file.txt",
    "!!!???...,,,;;;:::((([[[{{{ }}}]]])))",
    "x" * 257,
    " " * 100,
    "\n" * 64,
    "🙂" * 33,
    "ab" * 300,
    "İstanbul ß ẞ ﬃ ǅ ǆ Σίσυφος",
    "'''''' `````` \"\"\"\"",
    "a" * 100 + " " + "b" * 101,
)
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r\x0b\x0c\u00a0\u2003\u3000",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "áéíóúüñçßøåæœÀÈÎÕÇ",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "你好世界中文字漢字日本語かなカナ한국어",
    "👍🏽🎉🚀🧑‍💻❤️🏴\U000e0067\U000e007f",
    "\u0300\u0301\u0308\u0327\u0338\u20dd\ufe0f\u200d",
    "\x00\x01\x07\x08\x1b\x7f\x80\x9f",
)
_WORDS = ("the", "don't", "I'll", "HTTPServer", "__init__", "12345", "naïve", "<|endoftext|>", "</s>", "<s>", "[MASK]", "ﬁne", "…", "—")


def _random_codepoint(generator: random.Random) -> str:
    while True:
        code = generator.choice((generator.randrange(0x80), generator.randrange(0x3000), generator.randrange(0x110000)))
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)


def nasty_strings(count: int = 1000) -> list[str]:
    """The fixed strings above, then mixtures of scripts, whitespace, controls, lookalikes and random code points."""
    generator = random.Random(20240607)
    strings = list(FIXED)
    while len(strings) < count:
        style = len(strings) % 4
        if style == 0:
            pieces = [_random_codepoint(generator) for _ in range(generator.randrange(1, 40))]
        elif style == 1:
            alphabet = generator.choice(_ALPHABETS)
            pieces = [generator.choice(alphabet) * generator.choice((1, 1, 1, 2, 5)) for _ in range(generator.randrange(1, 60))]
        elif style == 2:
            pieces = [generator.choice(generator.choice(_ALPHABETS)) for _ in range(generator.randrange(1, 60))]
        else:
            pieces = [generator.choice((*_WORDS, " ", "  ", "\n", "\r\n")) for _ in range(generator.randrange(1, 30))]
        strings.append("".join(pieces))
    return strings[:count]


def reference_vectors(path: Path) -> list[tuple[str, list[int]]]:
    """Read `NAME.inp` and `NAME.out`: strings and the ids a reference gave them, without BOS or EOS."""
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(lines)
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


def metadata_by_gguf_package(path: Path) -> dict[str, Any]:
    """Metadata of a GGUF file through the `gguf` package: a reader independent of the product's."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def data(name: str) -> Path:
    """A file of the data pack; the test is skipped where the pack is absent."""
    if SHARED is None:
        pytest.skip(f"the data pack with tokenizers/{name} is not here")
    return SHARED / "tokenizers" / name


@functools.cache
def loaded(name: str) -> Tokenizer:
    """A tokenizer of the data pack, read once a process."""
    return load_tokenizer(data(name))


@functools.cache
def metadata(name: str) -> dict[str, Any]:
    """Metadata of a GGUF file of the data pack."""
    return dict(read_gguf(data(name)).metadata)


@functools.cache
def sample_text() -> str:
    """60 kB of text that every Python has."""
    return (Path(textwrap.__file__).read_text() + Path(argparse.__file__).read_text())[:60_000]


@functools.cache
def trained(kind: Kind, vocab_size: int = 700) -> Tokenizer:
    """A small tokenizer of our own making."""
    return train_tokenizer(kind, [sample_text()], vocab_size)
