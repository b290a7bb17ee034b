"""Shards: what is written is read back, and nothing else is ever read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ByteTokenizer, byte_level_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.encoder import Marks, choose_marks, fingerprint, join_pair
from weft.data.prepare import Settings, prepare
from weft.data.shards import INDEX, open_shards, read_manifest, verify
from weft.data.sources import Reading
from weft.data.store import TokenStore
from weft.errors import UserError


def corpus(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(store: TokenStore, tokenizer: ByteTokenizer) -> list[str]:
    spans = [store.document(index) for index in range(store.num_documents)]
    return [tokenizer.decode(store.tokens_at(np.arange(*span)).tolist()) for span in spans]


NONE_HELD = Settings(valid=0)


def test_documents_come_back(tmp_path) -> None:
    words = [f"document {n} é\n" * (n % 5 + 1) for n in range(50)]
    source = corpus(tmp_path / "a.jsonl", [{"text": word} for word in words])
    tokenizer = ByteTokenizer(bos_id=1)
    made = prepare([source], tokenizer, tmp_path / "out", NONE_HELD)
    store = open_shards(tmp_path / "out", "train", fingerprint(tokenizer))
    assert texts(store, tokenizer) == words
    assert store.marks == Marks(1, 0)
    for index, word in enumerate(words):
        ids = store.tokens_at(np.arange(*store.document(index)))
        assert (ids[0], ids[-1], len(ids)) == (1, 0, len(word.encode()) + 2)
    total = sum(len(word.encode()) for word in words)
    assert store.text_bytes == made.manifest.total("train", "text_bytes") == total
    assert made.manifest.exact_bytes
    assert store.parts[0].tokens.dtype == np.uint16
    assert made.manifest.sources[0].bytes == source.stat().st_size


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="ab é\n", min_size=1, max_size=60), min_size=1, max_size=20), st.integers(1, 90), st.integers(1, 40))
def test_many_small_shards_and_pieces(tmp_path_factory, words: list[str], shard_tokens: int, piece: int) -> None:
    folder = tmp_path_factory.mktemp("t")
    for number, word in enumerate(words):
        (folder / f"{number:03d}.txt").write_bytes(word.encode())
    tokenizer = ByteTokenizer()
    setup = Settings(Reading(piece_bytes=piece), valid=0, shard_tokens=shard_tokens)
    made = prepare([folder], tokenizer, folder / "out", setup)
    store = open_shards(folder / "out")
    assert texts(store, tokenizer) == words
    assert len(store.parts) == len(made.manifest.splits["train"])
    assert all(len(part.tokens) >= shard_tokens for part in store.parts[:-1])
    assert sum(int(part.text_bytes.sum()) for part in store.parts) == sum(len(word.encode()) for word in words)


def test_pairs_are_trained_on_the_completion_alone(tmp_path) -> None:
    records = [{"prompt": "ask é", "completion": "reply"}, {"text": "plain"}, {"prompt": "", "completion": "x"}]
    tokenizer = ByteTokenizer(bos_id=1)
    prepare([corpus(tmp_path / "a.jsonl", records)], tokenizer, tmp_path / "out", NONE_HELD)
    store = open_shards(tmp_path / "out")
    trained = store.trained_at(np.arange(store.num_tokens)).tolist()
    assert trained == [False] * 7 + [True] * 6 + [True] * 7 + [False] + [True] * 2
    assert store.parts[0].text_bytes.tolist() == [5, 5, 1]
    assert store.parts[0].text_tokens.tolist() == [5, 5, 1]


def test_a_completion_is_tokenised_as_a_model_must_write_it() -> None:
    assert join_pair([5, 6], [5, 6, 7, 8], [9, 7, 8]) == [7, 8]  # the pair's own border
    assert join_pair([5, 6], [5, 67, 8], [7, 8]) == [7, 8]  # the two merge: the completion alone
    assert join_pair([], [7, 8], [9, 8]) == [7, 8]
    backend = byte_level_bpe()
    prompt, completion = "the cat", " sat there"
    joint = [backend.encode(text).ids for text in (prompt, prompt + completion, completion)]
    assert join_pair(*joint) == joint[2]


def test_bos_goes_where_the_settings_put_it() -> None:
    assert choose_marks(ByteTokenizer()) == Marks(None, 0)
    assert choose_marks(ByteTokenizer(bos_id=1)) == Marks(1, 0)
    assert choose_marks(ByteTokenizer(bos_id=1), bos=False, eos=False) == Marks()
    assert choose_marks(ByteTokenizer(bos_id=0)) == Marks(None, 0)  # GPT-2's BOS is its end token, which stands there already
    with pytest.raises(UserError, match="has none"):
        choose_marks(ByteTokenizer(), bos=True)


def test_another_tokenizer_is_refused(tmp_path) -> None:
    mine, other = ByteTokenizer(), ByteTokenizer(lossy=True)
    prepare([corpus(tmp_path / "a.jsonl", [{"text": "a b"}])], mine, tmp_path / "out", NONE_HELD)
    open_shards(tmp_path / "out", "train", fingerprint(ByteTokenizer()))
    with pytest.raises(UserError, match="made with another tokenizer"):
        open_shards(tmp_path / "out", "train", fingerprint(other))


@pytest.mark.parametrize("ending", ["bin", "idx", "mask"])
def test_files_of_the_wrong_size_are_refused(tmp_path, ending: str) -> None:
    prepare([corpus(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b" * 40}] * 9)], ByteTokenizer(), tmp_path / "out", NONE_HELD)
    path = tmp_path / "out" / f"train-00000.{ending}"
    whole = path.read_bytes()
    assert verify(tmp_path / "out") == 3
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{ending} is cut short: it has .* prepare the data again"):
        open_shards(tmp_path / "out")
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="longer than"):
        open_shards(tmp_path / "out")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit: the size is right, the digest is not
    with pytest.raises(UserError, match="SHA-256"):
        verify(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        open_shards(tmp_path / "out")


def test_damaged_manifests_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no folder"):
        read_manifest(tmp_path / "none")
    with pytest.raises(UserError, match="not prepared data"):
        read_manifest(tmp_path)
    prepare([corpus(tmp_path / "a.jsonl", [{"text": "a b"}])], ByteTokenizer(), tmp_path / "out", NONE_HELD)
    index = tmp_path / "out" / INDEX
    good = index.read_text()
    index.write_text(good[:-40])
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        open_shards(tmp_path / "out")
    index.write_text(
        good.replace('"name":"train-00000"', '"name":"../../secret"').replace('"name": "train-00000"', '"name": "../../secret"')
    )
    with pytest.raises(UserError, match="name"):
        open_shards(tmp_path / "out")
    index.write_text(good.replace('"version"', '"versoin"'))
    with pytest.raises(UserError, match="versoin"):
        open_shards(tmp_path / "out")
    index.write_text(good)
    with pytest.raises(UserError, match="no valid split"):
        open_shards(tmp_path / "out", "valid")
    open_shards(tmp_path / "out")


def test_the_same_data_is_kept_and_other_data_is_not_replaced(tmp_path) -> None:
    source = corpus(tmp_path / "a.jsonl", [{"text": "a b"}])
    out = tmp_path / "out"
    assert not prepare([source], ByteTokenizer(), out, NONE_HELD).reused
    before = (out / INDEX).stat().st_mtime_ns
    assert prepare([source], ByteTokenizer(), out, NONE_HELD).reused
    assert (out / INDEX).stat().st_mtime_ns == before
    corpus(source, [{"text": "other"}])
    with pytest.raises(UserError, match="--force"):
        prepare([source], ByteTokenizer(), out, NONE_HELD)
    assert not prepare([source], ByteTokenizer(), out, NONE_HELD, force=True).reused
    (out / "train-00000.bin").write_bytes(b"")
    assert not prepare([source], ByteTokenizer(), out, NONE_HELD).reused  # cut short: made again
    assert open_shards(out).num_tokens == 6


def test_a_folder_of_other_things_is_never_replaced(tmp_path) -> None:
    source = corpus(tmp_path / "a.jsonl", [{"text": "a b"}])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="left alone"):
            prepare([source], ByteTokenizer(), tmp_path / "mine", NONE_HELD, force=force)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_nothing_is_left_after_bad_input(tmp_path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "fine"}\n' * 50 + '{"text": 3}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:51"):
        prepare([source], ByteTokenizer(), tmp_path / "out", NONE_HELD)
    for text in ("", "\n\n", '{"text": ""}\n'):
        source.write_text(text)
        with pytest.raises(UserError, match="empty"):
            prepare([source], ByteTokenizer(), tmp_path / "out", NONE_HELD)
    source.write_text('{"text": "fine"}\n')

    class Failing(ByteTokenizer):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            if texts == ["fine"]:
                raise RuntimeError("no more")
            return super().encode_batch(texts)

    with pytest.raises(RuntimeError):
        prepare([source], Failing(), tmp_path / "out", NONE_HELD)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_ids_outside_the_vocabulary_are_refused(tmp_path) -> None:
    class Broken(ByteTokenizer):
        vocab_size = 90

    with pytest.raises(UserError, match="vocabulary has 90 entries"):
        prepare([corpus(tmp_path / "a.jsonl", [{"text": "z"}])], Broken(), tmp_path / "out", NONE_HELD)


def test_large_vocabularies_take_four_bytes(tmp_path) -> None:
    class Large(ByteTokenizer):
        vocab_size = 70_000

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[ord(char) + 65_000 for char in text] for text in texts]

        def token_bytes(self, index: int) -> bytes:
            return chr(index - 65_000).encode() if index >= 65_000 else b""

    prepare([corpus(tmp_path / "a.jsonl", [{"text": "hello"}])], Large(), tmp_path / "out", NONE_HELD)
    store = open_shards(tmp_path / "out")
    assert store.parts[0].tokens.dtype == np.uint32
    assert store.tokens_at(np.arange(5)).tolist() == [ord(char) + 65_000 for char in "hello"]


def sides(tmp_path: Path, records: list[dict], setup: Settings) -> tuple[list[str], list[str]]:
    tokenizer = ByteTokenizer()
    prepare([corpus(tmp_path / "a.jsonl", records)], tokenizer, tmp_path / "out", setup, force=True)
    return texts(open_shards(tmp_path / "out", "train"), tokenizer), texts(open_shards(tmp_path / "out", "valid"), tokenizer)


def test_holding_out_by_hash_keeps_copies_together(tmp_path) -> None:
    words = [f"text {n % 300}" for n in range(1000)]
    train, valid = sides(tmp_path, [{"text": word} for word in words], Settings(valid=0.1))
    assert sorted(train + valid) == sorted(words)
    assert not set(train) & set(valid)
    assert 40 <= len(valid) <= 180
    more = [*words, *(f"new {n}" for n in range(500))]
    train_again, valid_again = sides(tmp_path, [{"text": word} for word in more], Settings(valid=0.1))
    assert set(valid) <= set(valid_again)
    assert set(train) <= set(train_again)


def test_holding_out_the_last_documents(tmp_path) -> None:
    words = [f"text {n}" for n in range(40)]
    records = [{"text": word} for word in words]
    assert sides(tmp_path, records, Settings(valid=0.1)) == (words[:36], words[36:])  # too few for a hash
    assert sides(tmp_path, records, Settings(valid=0.01)) == (words[:39], words[39:])
    many = [f"text {n}" for n in range(400)]
    records = [{"text": word} for word in many]
    assert sides(tmp_path, records, Settings(valid=0.1, method="tail")) == (many[:360], many[360:])
    pairs = [{"prompt": "p" * 9000, "completion": "c" * 9000}] * 5
    assert len(sides(tmp_path, pairs, Settings(valid=0.1))[1]) == 1  # a pair is never cut


def test_holding_out_the_end_of_long_texts(tmp_path) -> None:
    tokenizer = ByteTokenizer()
    whole = ["".join(f"{name} line {n} é\n" for n in range(3000)) for name in "ab"]
    for name, text in zip("ab", whole, strict=True):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    setup = Settings(Reading(piece_bytes=5000), valid=0.05)
    made = prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, tmp_path / "out", setup)
    train, valid = (texts(open_shards(tmp_path / "out", split), tokenizer) for split in ("train", "valid"))
    assert [head + tail for head, tail in zip(train, valid, strict=True)] == whole
    assert all(head.endswith("\n") for head in train)
    share = made.manifest.total("valid", "text_bytes") / sum(len(text.encode()) for text in whole)
    assert abs(share - 0.05) < 0.002


def test_one_line_can_be_held_out_within(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("é" * 1000)
    prepare([tmp_path / "a.txt"], ByteTokenizer(), tmp_path / "out", Settings(valid=0.101))
    train, valid = (texts(open_shards(tmp_path / "out", split), ByteTokenizer()) for split in ("train", "valid"))
    assert (train, valid) == (["é" * 899], ["é" * 101])


def test_shares_that_hold_out_nothing_or_everything(tmp_path) -> None:
    records = [{"text": f"t{n}"} for n in range(30)]
    for setup, message in [
        (Settings(valid=1.0), "below 1"),
        (Settings(valid=-0.1), "at least 0"),
        (Settings(valid=1e-6, method="hash"), "none is held out"),
        (Settings(valid=0.5, method="hush"), "Did you mean 'hash'"),
    ]:
        with pytest.raises(UserError, match=message):
            sides(tmp_path, records, setup)
    with pytest.raises(UserError, match="too small"):
        sides(tmp_path, [{"text": "a"}], Settings(valid=0.01))


def test_given_splits_are_kept(tmp_path) -> None:
    corpus(tmp_path / "train.jsonl", [{"text": "a"}] * 3)
    corpus(tmp_path / "valid.jsonl", [{"text": "b"}])
    prepare([tmp_path], ByteTokenizer(), tmp_path / "out")
    assert texts(open_shards(tmp_path / "out", "valid"), ByteTokenizer()) == ["b"]
    with pytest.raises(UserError, match="already the validation split"):
        prepare([tmp_path], ByteTokenizer(), tmp_path / "out2", Settings(valid=0.1))
    corpus(tmp_path / "valid.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"empty: there is no text in .*valid\.jsonl"):
        prepare([tmp_path], ByteTokenizer(), tmp_path / "out2")


def test_a_file_that_grows_while_it_is_read_is_noticed(tmp_path) -> None:
    source = corpus(tmp_path / "a.jsonl", [{"text": "abc"}])

    def grow(stage: str, done: int, total: int) -> None:
        if stage == "read":
            corpus(source, [{"text": "abcd"}])

    with pytest.raises(UserError, match="changed while they were read"):
        prepare([source], ByteTokenizer(), tmp_path / "out", NONE_HELD, progress=grow)
    assert not (tmp_path / "out").exists()
