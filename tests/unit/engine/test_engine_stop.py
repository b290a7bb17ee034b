"""What may be shown while text is generated."""

import random

import pytest

from weft.engine.stop import TextStream, before_stop


class Pieces:
    """A decoder whose tokens are the pieces of a text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, index):
        return self.pieces[index]

    def finish(self):
        return ""


def play(pieces, stops):
    """Shown pieces, one a token and the rest; tokens used; whether a stop string ended it."""
    stream = TextStream(Pieces(pieces), stops)
    shown = []
    for index in range(len(pieces)):
        shown.append(stream.push(index))
        if stream.stopped:
            break
    used = len(shown)
    shown.append(stream.finish())
    assert "".join(shown) == stream.text
    return shown, used, stream.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "used", "stopped"),
    [
        (["Hel", "lo ", "wor", "ld"], (), "Hello world", 4, False),
        (["Hello ST", "OP there"], ("STOP",), "Hello ", 2, True),
        (["a S", "T", "O", "P", "b"], ("STOP",), "a ", 4, True),
        (["a S", "T", "O", "Q"], ("STOP",), "a STOQ", 4, False),
        (["a ", "ST"], ("STOP",), "a ST", 2, False),
        (["xaba", "bac"], ("abac",), "xab", 2, True),
        (["one\n", "\ntwo"], ("\n\n",), "one", 2, True),
        (["abc"], ("bc", "c", "abc"), "", 1, True),
        (["a", "b", "c"], ("abc", "b"), "a", 2, True),
        (["STOP"], ("STOP",), "", 1, True),
    ],
)
def test_stop_strings_end_the_text_before_them(pieces, stops, text, used, stopped):
    shown, tokens, ended = play(pieces, stops)
    assert ("".join(shown), tokens, ended) == (text, used, stopped)


def test_what_may_become_a_stop_string_is_held_back():
    shown, _, _ = play(["say \n", "\n", "User", " name"], ("\n\nUser:",))
    assert shown == ["say ", "", "", "\n\nUser name", ""]


def naive(text, stops):
    """The definition: character by character, until a stop string is complete."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_the_cut_does_not_depend_on_tokens():
    generator = random.Random(0)
    stopped = 0
    for _ in range(400):
        text = "".join(generator.choices("abc", k=generator.randint(0, 14)))
        stops = tuple("".join(generator.choices("abc", k=generator.randint(1, 4))) for _ in range(generator.randint(0, 3)))
        cuts = sorted(generator.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        want = naive(text, stops)
        shown, _, ended = play(pieces, stops)
        assert ("".join(shown), ended) == want
        assert before_stop(text, stops) == want
        stopped += ended
    assert 100 < stopped < 390


def test_half_characters_wait():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from weft.tokenizer import Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("é🙂!")
    stream = TextStream(tokenizer.stream_decoder(), ("!?",))
    assert [stream.push(index) for index in ids] == ["", "é", "", "", "", "🙂", ""]
    assert stream.finish() == "!"
    cut = TextStream(tokenizer.stream_decoder())
    assert [cut.push(index) for index in ids[:4]] == ["", "é", "", ""]
    assert cut.finish() == "\ufffd"
