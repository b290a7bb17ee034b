"""Batches as a function of the step: order, resume, ranks, mixtures, validation and bytes."""

import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import ByteTokenizer, store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.batches import Batches
from weft.data.encoder import Marks
from weft.data.load import open_batches, parse_data
from weft.data.mixture import Draw, Mixture
from weft.data.packing import PackedBatch
from weft.data.prepare import Settings, prepare
from weft.data.shards import open_shards
from weft.data.shuffle import Permutation, RowOrder, mix
from weft.data.sources import Reading
from weft.data.store import TokenStore
from weft.data.windows import cut
from weft.errors import UserError

MODES = ("pack", "best_fit", "pad", "stream")


def same(left: PackedBatch, right: PackedBatch) -> bool:
    pairs = [(left.tokens, right.tokens), (left.targets, right.targets), (left.positions, right.positions)]
    pairs += [(left.loss_mask, right.loss_mask)]
    if left.segments is not None and right.segments is not None:
        pairs.append((left.segments, right.segments))
    together = (left.segments is None) == (right.segments is None) and left.num_bytes == right.num_bytes
    return together and all(torch.equal(a, b) for a, b in pairs)


def joined(batches: list[PackedBatch]) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in batches])


def lengths_like(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, count).tolist()


# The order of rows.


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**70))
def test_a_permutation_is_a_bijection(size: int, key: int) -> None:
    order = Permutation(size, key)
    assert sorted(order(np.arange(size)).tolist()) == list(range(size))
    one = np.array([size // 2])
    assert order(one)[0] == order(np.arange(size))[size // 2]  # an index is sent to one place, whatever is asked with it


def test_a_permutation_looks_random() -> None:
    size, keys = 1000, 400
    places = np.array([Permutation(size, key)(np.arange(0, size, 97)) for key in range(keys)])
    counts = np.bincount(places.ravel() * 10 // size, minlength=10)
    expected = places.size / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square with nine degrees of freedom, p = 0.001
    order = Permutation(20_011, 5)(np.arange(20_011))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_011))[0, 1]) < 0.03
    identity = np.arange(20_011)  # what the test must be able to refuse
    assert abs(np.corrcoef(identity[:-1], identity[1:])[0, 1]) > 0.9


def test_each_epoch_has_an_order_of_its_own_and_holds_every_row() -> None:
    order = RowOrder(1237, True, 3, 4)
    first, second = order.rows(np.arange(1237)), order.rows(np.arange(1237, 2474))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1237))
    assert (first != second).mean() > 0.9
    assert order.rows(np.array([5]))[0] == first[5]  # going back
    assert (RowOrder(1237, True, 3, 5).rows(np.arange(1237)) != first).mean() > 0.9


def test_mix_never_changes() -> None:
    assert [mix(0), mix(1, 2, 3)] == [0xE220A8397B1DCDAF, mix(1, 2, 3)]  # splitmix64's first output from a zero state
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500


# Resume and ranks.


@pytest.mark.parametrize("mode", MODES)
def test_resuming_at_any_step_gives_the_same_batches(mode: str) -> None:
    def fresh() -> Batches:
        windows = [cut(store_of(lengths_like(40, seed), parts=2, masked=seed == 1), 13, mode) for seed in (0, 1)]
        return Batches(Mixture([("a", windows[0], 0.7), ("b", windows[1], 0.3)]), 6, seed=5)

    whole = fresh()
    uninterrupted = [whole.batch(step) for step in range(90)]
    for step in (89, 0, 41, 7, 88, 40):
        assert same(fresh().batch(step), uninterrupted[step])
    assert not any(same(a, b) for a, b in itertools.pairwise(uninterrupted))
    other = Batches(whole.mixture, 6, seed=6)
    assert not any(same(other.batch(step), uninterrupted[step]) for step in range(90))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(2, 17), st.integers(1, 4), st.sampled_from(MODES))
def test_an_epoch_of_batches_holds_every_row_once(lengths: list[int], length: int, batch: int, mode: str) -> None:
    windows = cut(store_of(lengths), length, mode)
    batches = Batches(windows, batch, seed=len(lengths))
    drawn: Counter[int] = Counter()
    epochs = batch  # after this many the rows come out even
    for step in range(windows.num_rows * epochs // batch):
        made = batches.batch(step)
        drawn.update(made.targets[made.loss_mask].tolist())
    ends = np.cumsum(lengths)
    firsts = set() if mode == "stream" else {1, *(ends[:-1] + 1).tolist()}
    assert drawn == Counter({token: epochs for token in range(1, int(ends[-1]) + 1) if token not in firsts})


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world: int) -> None:
    mixture = Mixture([("a", cut(store_of(lengths_like(50)), 11), 3.0), ("b", cut(store_of(lengths_like(30, 2)), 11), 1.0)])
    held = cut(store_of(lengths_like(20, 3)), 11)
    alone = Batches(mixture, 12, seed=1, valid=held)
    ranks = [Batches(mixture, 12, seed=1, valid=held, rank=rank, world=world) for rank in range(world)]
    for step in (0, 3, 17, 60):
        assert torch.equal(joined([rank.batch(step) for rank in ranks]), alone.batch(step).tokens)
        assert sum(rank.batch(step).num_bytes for rank in ranks) == alone.batch(step).num_bytes
    for pieces, whole in zip(zip(*(rank.validation() for rank in ranks), strict=True), alone.validation(), strict=True):
        assert torch.equal(joined(list(pieces)), whole.tokens)
    assert {rank.tokens_per_batch for rank in ranks} == {132}
    assert all(rank.describe() == alone.describe() for rank in ranks)


def test_batches_that_ranks_cannot_share() -> None:
    with pytest.raises(UserError, match="multiple of the number of ranks"):
        Batches(cut(store_of([9]), 4), 8, rank=0, world=3)


def test_cuts_move_from_epoch_to_epoch_unless_told_not_to() -> None:
    windows = cut(store_of([1000]), 10)
    moving, fixed = Batches(windows, 100, seed=1), Batches(windows, 100, shuffle=False)
    starts = [set(moving.batch(epoch).tokens[:, 0].tolist()) for epoch in range(2)]
    assert starts[0] != starts[1]
    assert torch.equal(fixed.batch(0).tokens, fixed.batch(1).tokens)
    assert fixed.batch(0).tokens.flatten().tolist() == list(range(1, 1001))


# Mixtures.


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0.001, 50), min_size=1, max_size=7), st.integers(0, 99), st.integers(0, 10**12), st.integers(1, 60))
def test_shares_of_any_stretch_are_exact_to_a_few_rows(weights: list[float], seed: int, first: int, count: int) -> None:
    draw = Draw([weight / sum(weights) for weight in weights], seed)
    owners = draw.owners(first, count)
    before, after = draw.counts(first), draw.counts(first + count)
    taken = Counter(source for source, _ in owners)
    assert [after[k] - before[k] for k in range(len(weights))] == [taken[k] for k in range(len(weights))]
    for k, weight in enumerate(weights):
        assert abs(taken[k] - count * weight / sum(weights)) <= len(weights)
        assert [number for source, number in owners if source == k] == list(range(before[k], after[k]))
    assert sum(draw.counts(10**15)) == 10**15


def test_proportions_and_epochs_are_reported() -> None:
    stores = {"web": store_of(lengths_like(400)), "books": store_of(lengths_like(40, 1)), "code": store_of(lengths_like(80, 2))}
    weights = {"web": 0.67, "books": 0.045, "code": 0.285}
    mixture = Mixture([(name, cut(store, 16), weights[name]) for name, store in stores.items()])
    batches = Batches(mixture, 10, seed=2)
    steps = 137
    tokens = torch.cat([batches.batch(step).tokens for step in range(steps)])
    table = batches.report(steps)
    assert [line["source"] for line in table] == list(weights)
    for line in table:
        name = str(line["source"])
        rows = cut(stores[name], 16).num_rows
        assert line["proportion"] == pytest.approx(weights[name])
        assert line["epochs"] * rows == pytest.approx(weights[name] * steps * 10, abs=3)
        assert (line["tokens"], line["documents"]) == (stores[name].num_tokens, stores[name].num_documents)
    assert sum(line["epochs"] * cut(stores[str(line["source"])], 16).num_rows for line in table) == pytest.approx(len(tokens))
    shifted = [line | {"epochs": line["epochs"] * 1.02} for line in table]  # what the comparison must be able to refuse
    assert sum(line["epochs"] * cut(stores[str(line["source"])], 16).num_rows for line in shifted) != pytest.approx(len(tokens))


def test_without_weights_all_sources_end_together() -> None:
    mixture = Mixture([("a", cut(store_of([7] * 300), 16), None), ("b", cut(store_of([7] * 100), 16), None)])
    table = Batches(mixture, 4).report()
    assert [round(float(line["epochs"]), 1) for line in table] == [1.0, 1.0]


def test_adding_a_source_keeps_the_order_of_the_others() -> None:
    a, b, c = (cut(store_of(lengths_like(60, seed)), 8) for seed in range(3))
    two = Batches(Mixture([("a", a, 1), ("b", b, 1)]), 1, seed=3, shuffle=True)
    three = Batches(Mixture([("c", c, 1), ("a", a, 1), ("b", b, 1)]), 1, seed=3, shuffle=True)

    def rows_of_a(batches: Batches, source: int) -> list[list[int]]:
        owners = batches.mixture.draw(3).owners(0, 60)
        return [batches.batch(step).tokens[0].tolist() for step, (owner, _) in enumerate(owners) if owner == source]

    left, right = rows_of_a(two, 0), rows_of_a(three, 1)
    assert left[:15] == right[:15]


def test_mixtures_that_make_no_sense() -> None:
    a = cut(store_of([9]), 4)
    other = cut(TokenStore(store_of([9]).parts, Marks(), tokenizer_sha256="other"), 4)
    for entries, message in [
        ([], "at least one"),
        ([("a", a, 1.0), ("a", a, 1.0)], "two sources are called 'a'"),
        ([("a", a, 0.0)], "above 0"),
        ([("a", a, float("nan"))], "above 0"),
        ([("a", a, 1.0), ("b", a, None)], "'b' has no weight"),
        ([("a", a, 1.0), ("b", cut(store_of([9]), 5), 1.0)], "cut by pack into 5 tokens"),
        ([("a", a, 1.0), ("b", other, 1.0)], "another tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            Mixture(entries)


# Validation and bytes.


def folder_of(tmp_path: Path, words: list[str], tokenizer: ByteTokenizer, valid: float = 0.3) -> Path:
    (tmp_path / "words.txt").write_bytes("\n---\n".join(words).encode())
    prepare([tmp_path / "words.txt"], tokenizer, tmp_path / "out", Settings(Reading(separator="---"), valid))
    return tmp_path / "out"


WORDS = [f"a small text, number {n} é日\n" * (n % 7 + 1) for n in range(60)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("lossy", [False, True])
def test_validation_covers_the_held_out_text_once(tmp_path, mode: str, bos: int | None, lossy: bool) -> None:
    tokenizer = ByteTokenizer(bos, lossy)
    folder = folder_of(tmp_path, WORDS, tokenizer)
    store = open_shards(folder, "valid")
    assert (store.token_bytes is None) == lossy
    held = cut(store, 37, mode)
    batches = Batches(cut(open_shards(folder), 37, mode), 4, valid=held)
    found = list(batches.validation())
    assert [batch.tokens.tolist() for batch in found] == [batch.tokens.tolist() for batch in batches.validation()]
    assert {tuple(batch.tokens.shape) for batch in found} == {(4, 37)}
    scored = sum(batch.num_targets for batch in found)
    assert scored == store.num_tokens - (0 if mode == "stream" else store.num_documents)
    unread = 0 if bos or mode == "stream" else store.num_documents  # one ASCII letter a document is never predicted
    total = sum(batch.num_bytes for batch in found)
    # Where a tokenizer drops text, a first token stands for its even share of the document instead.
    assert total == store.text_bytes - unread if not (lossy and unread) else unread <= store.text_bytes - total <= 2 * unread


@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_a_part_are_the_text_of_its_targets(tmp_path, mode: str) -> None:
    tokenizer = ByteTokenizer(bos_id=1)
    folder = folder_of(tmp_path, WORDS, tokenizer)
    batches = Batches(cut(open_shards(folder), 37, mode), 4, valid=cut(open_shards(folder, "valid"), 37, mode), seed=3)
    for batch in [*batches.validation(max_batches=3), *(batches.batch(step) for step in range(5))]:
        spelled = [tokenizer.token_bytes(target) for target in batch.targets[batch.loss_mask].tolist()]
        assert batch.num_bytes == len(b"".join(spelled)) > 0
        half = [batch.rows(0, 1), batch.rows(1, 4)]
        assert [part.num_rows for part in half] == [1, 3]
        assert sum(part.num_bytes for part in half) == batch.num_bytes
        assert torch.equal(torch.cat([part.targets for part in half]), batch.targets)
    assert batch.num_bytes != sum(batch.lengths.tolist())  # counting tokens instead would be noticed


def test_bits_per_byte_of_a_uniform_model_is_known(tmp_path) -> None:
    """A model that gives every one of 258 ids the same chance needs log2(258) bits a token: with the counts, bits per byte follow."""
    tokenizer = ByteTokenizer(bos_id=1)
    folder = folder_of(tmp_path, WORDS, tokenizer)
    held = open_shards(folder, "valid")
    batches = Batches(cut(open_shards(folder), 37), 4, valid=cut(held, 37))
    nats = num_bytes = 0.0
    for batch in batches.validation():
        logits = torch.zeros(*batch.tokens.shape, 258, dtype=torch.float64)
        nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"))
        num_bytes += batch.num_bytes
    expected = Fraction(held.text_bytes + held.num_documents, held.text_bytes) * Fraction(math.log2(258))
    assert nats / math.log(2) / num_bytes == pytest.approx(float(expected), rel=1e-12)


def test_an_added_first_space_is_not_counted(tmp_path) -> None:
    class Prefixing(ByteTokenizer):
        """SentencePiece's habit: every text begins with a space."""

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return super().encode_batch([f" {text}" for text in texts])

    for bos in (None, 1):
        out = tmp_path / str(bos)
        out.mkdir()
        folder = folder_of(out, WORDS, Prefixing(bos))
        store = open_shards(folder, "valid")
        assert store.prefix_bytes == 1
        total = sum(batch.num_bytes for batch in Batches(cut(store, 37), 4, valid=cut(store, 37)).validation())
        assert total == store.text_bytes  # without a BOS the unread first token is the added space itself


def test_limited_validation_is_spread_over_all_of_it() -> None:
    held = cut(store_of([5] * 1000), 10)
    batches = Batches(held, 5, valid=Mixture([("a", held, None), ("b", cut(store_of([5] * 100), 10), None)]))
    assert len(list(batches.validation())) == 110
    some = list(batches.validation(11))
    assert len(some) == 11
    firsts = torch.cat([batch.tokens[:, 0] for batch in some[:10]])
    assert firsts.max() > 4500
    assert firsts.diff().min() > 0
    with pytest.raises(UserError, match="at least one batch each"):
        list(batches.validation(1))
    with pytest.raises(UserError, match="no validation data"):
        next(Batches(held, 5).validation())


# Recipes.


def test_recipes_open_prepared_and_raw_data(tmp_path) -> None:
    tokenizer = ByteTokenizer(bos_id=1)
    folder = folder_of(tmp_path, WORDS, tokenizer)
    (tmp_path / "more.txt").write_text("another text\n" * 3000)
    spec = parse_data({"sources": [{"path": str(folder), "weight": 3, "name": "words"}, {"path": str(tmp_path / "more.txt"), "weight": 1}]})
    batches = open_batches(spec, 16, 8, seed=4, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert [(line["source"], line["proportion"]) for line in batches.report()] == [("words", 0.75), ("more.txt", 0.25)]
    assert len(list(batches.validation(4))) == 4
    again = open_batches(spec, 16, 8, seed=4, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert again.describe() == batches.describe()
    assert same(again.batch(9), batches.batch(9))
    (tmp_path / "more.txt").write_text("different text\n" * 3000)
    assert open_batches(spec, 16, 8, seed=4, tokenizer=tokenizer, cache=tmp_path / "cache").describe() != batches.describe()
    with pytest.raises(UserError, match="another tokenizer"):
        open_batches(parse_data(str(folder)), 16, 8, tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="weft data prepare"):
        open_batches(parse_data(tmp_path / "more.txt"), 16, 8)
    with pytest.raises(UserError, match="no data at"):
        open_batches(parse_data("nowhere"), 16, 8, tokenizer=tokenizer, cache=tmp_path)


def test_data_keys_are_checked() -> None:
    assert parse_data(["a", {"path": "b", "weight": 2}]).sources[1].weight == 2
    assert parse_data(parse_data("a/b.txt")).sources[0].label == "b.txt"
    for value, message in [
        ({"sources": [{"path": "a", "wieght": 2}]}, "Did you mean 'weight'"),
        ({"sources": [], "packing": "pack"}, "sources"),
        ({"sources": ["a"], "packing": "bestfit"}, "Did you mean 'best_fit'"),
        ({"sources": ["a"], "valid": 1.5}, "valid"),
        (3, "data"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_data(value)
