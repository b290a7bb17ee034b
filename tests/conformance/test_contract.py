"""The mixer contract, a clause a section, over everything registered. float64, so that equal means 1e-10."""

import random

import pytest
import torch
from cases import BATCH, CHUNK, COMPILED, LENGTH, NAMES, SPECS, VOCAB, make, make_memory, make_tokens
from torch import Tensor

from weft.errors import UserError
from weft.nn import Arena, Model, Runner, Step, build
from weft.spec import model_spec

TOLERANCE = 1e-10
LAYOUTS = [None, 4]  # dense, and pages of four tokens


def reference(model: Model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, memory=make_memory(tokens.shape[0])).logits


def make_arena(model: Model, page: int | None = None, rows: int = BATCH, max_chunk: int = CHUNK) -> Arena:
    arena = Arena(model, rows, LENGTH, max_chunk, page=page)
    arena.prime(*make_memory(rows))
    arena.reserve(dict.fromkeys(range(rows), LENGTH))
    return arena


def feed(arena: Arena, tokens: Tensor, n_new: list[int], accepted: list[int], rows: list[int] | None = None, keep: str = "all") -> Tensor:
    """One pass: tokens [B, T] of which n_new a row are valid and `accepted` are committed. Returns logits [B, T, vocab]."""
    model, index = arena._model[0], None if rows is None else torch.tensor(rows)
    with torch.no_grad():
        step = arena.step(torch.tensor(n_new), tokens.shape[1], index, keep)
        output = model(tokens, step, arena.views(index))
        arena.commit(output.pending, torch.tensor(accepted), index)
        return output.logits


def drift_of_ragged_decoding(name: str, page: int | None, seed: int, max_chunk: int = CHUNK, arena_chunk: int = CHUNK) -> tuple[float, int]:
    """Feed sequences in random ragged chunks, in random company, with drafts of which a random prefix is accepted, and garbage
    in padding and rejected tails. Returns the largest difference from one parallel pass, and how many tokens were rejected."""
    rng = random.Random(seed)
    model, tokens = make(name), make_tokens(seed=seed)
    truth, arena = reference(model, tokens), make_arena(model, page, max_chunk=arena_chunk)
    worst, rejected = 0.0, 0
    while int(arena.lens.min()) < LENGTH - 1:
        lens, length = arena.lens.tolist(), rng.choice([1, 1, 3, max_chunk])
        rows = rng.sample(range(BATCH), rng.randint(1, BATCH)) if rng.random() < 0.4 else list(range(BATCH))
        n_new = [min(rng.randint(0, length), LENGTH - lens[row]) for row in rows]
        accepted = [rng.randint(0, n) if rng.random() < 0.5 else n for n in n_new]
        fed = make_tokens(len(rows), length, seed=rng.randrange(1 << 30))
        for i, row in enumerate(rows):
            fed[i, : accepted[i]] = tokens[row, lens[row] : lens[row] + accepted[i]]
        keep = "last" if accepted == n_new and rng.random() < 0.5 else "all"
        subset = None if rows == list(range(BATCH)) else rows
        logits = feed(arena, fed, n_new, accepted, subset, keep)
        assert torch.isfinite(logits).all()
        for i, row in enumerate(rows):
            rejected += n_new[i] - accepted[i]
            if accepted[i]:
                want = truth[row, lens[row] : lens[row] + accepted[i]]
                worst = max(worst, (logits[i, : accepted[i]] - want).abs().max().item())
    return worst, rejected


# 1 and 4: state advances in commit alone, and any split in any company equals one pass


@pytest.mark.parametrize("page", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_split_with_rejected_drafts_equals_one_pass(name, page):
    worst, rejected = zip(*(drift_of_ragged_decoding(name, page, seed) for seed in range(3)), strict=True)
    assert max(worst) < TOLERANCE
    assert sum(rejected) > 0


@pytest.mark.parametrize("name", NAMES)
def test_forward_changes_no_fixed_state(name):
    arena = make_arena(make(name))
    feed(arena, make_tokens(length=5), [5] * BATCH, [5] * BATCH)
    fixed = {key: arena._buffer(key).clone() for key, leaf in arena.leaves.items() if leaf.kind in ("fixed", "static")}
    feed(arena, make_tokens(length=5, seed=9), [5] * BATCH, [0] * BATCH)
    assert all(torch.equal(arena._buffer(key), value) for key, value in fixed.items())
    if any(leaf.kind == "fixed" for leaf in arena.leaves.values()):  # control: committing does change it
        feed(arena, make_tokens(length=5, seed=9), [5] * BATCH, [5] * BATCH)
        moved = [key for key, value in fixed.items() if arena.leaves[key].kind == "fixed" and not torch.equal(arena._buffer(key), value)]
        assert moved


@pytest.mark.parametrize("name", NAMES)
def test_keep_last_and_keep_all_commit_the_same_state(name):
    arenas = []
    for keep in ("last", "all"):
        arena = make_arena(make(name))
        feed(arena, make_tokens(length=7), [7, 3, 0], [7, 3, 0], keep=keep)
        arenas.append(arena)
    for key, leaf in arenas[0].leaves.items():
        if leaf.kind == "fixed":
            torch.testing.assert_close(arenas[0]._buffer(key), arenas[1]._buffer(key), rtol=0, atol=1e-12)


# 2: writes beyond lens are invisible, and forks do not disturb each other


@pytest.mark.parametrize("page", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_forks_of_a_half_filled_page_do_not_disturb_each_other(name, page):
    model, tokens = make(name), make_tokens()
    truth = reference(model, tokens)
    other = tokens.clone()
    other[0, 6:] = make_tokens(seed=5)[0, 6:]
    truth_other = reference(model, other)
    arena = Arena(model, BATCH, LENGTH, CHUNK, page=page)
    arena.prime(*make_memory())
    arena.reserve({0: 6})
    feed(arena, tokens[:1, :6], [6], [6], rows=[0])
    arena.fork(0, 2)
    arena.reserve({0: 13, 2: 13})
    ours = feed(arena, tokens[:1, 6:13], [7], [7], rows=[0])
    theirs = feed(arena, other[:1, 6:13], [7], [7], rows=[2])
    again = feed(arena, tokens[:1, 13:14], [1], [1], rows=[0]) if page is None else None
    assert (ours[0] - truth[0, 6:13]).abs().max() < TOLERANCE
    assert (theirs[0] - truth_other[0, 6:13]).abs().max() < TOLERANCE
    assert again is None or (again[0, 0] - truth[0, 13]).abs().max() < TOLERANCE
    if page is not None:
        assert arena.pages.owned[0][0] == arena.pages.owned[2][0], "the full first page is shared"
        assert arena.pages.owned[0][1] != arena.pages.owned[2][1], "the half-filled one was copied on write"


def test_a_shared_half_filled_page_without_copying_would_be_wrong():
    """Control: the fork test notices when the copy on write is left out."""
    model, tokens = make("mha"), make_tokens()
    truth = reference(model, tokens)
    arena = Arena(model, BATCH, LENGTH, CHUNK, page=4)
    arena.reserve({0: 6})
    feed(arena, tokens[:1, :6], [6], [6], rows=[0])
    arena.fork(0, 2)
    arena.pages.references = [min(count, 1) for count in arena.pages.references]
    arena.reserve({0: 8, 2: 8})
    feed(arena, tokens[:1, 6:7], [1], [1], rows=[0])
    feed(arena, make_tokens(seed=5)[:1, 6:7], [1], [1], rows=[2])
    wrong = feed(arena, tokens[:1, 7:8], [1], [1], rows=[0])
    assert (wrong[0, 0] - truth[0, 7]).abs().max() > 1e-4


@pytest.mark.parametrize("page", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_snapshot_restores_into_any_row(name, page):
    model, tokens = make(name), make_tokens()
    arena = make_arena(model, page)
    feed(arena, tokens[:, :7], [7, 7, 7], [7, 7, 7])
    saved = arena.snapshot(0)
    first = feed(arena, tokens[:1, 7:12], [5], [5], rows=[0])
    arena.restore(1, saved)
    arena.reserve({1: LENGTH})
    again = feed(arena, tokens[:1, 7:12], [5], [5], rows=[1])
    torch.testing.assert_close(first, again, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_begins_on_the_pages_of_another(name):
    """What a prefix cache does: full pages by reference, and for state that is kept a row a snapshot from their end."""
    model, tokens = make(name), make_tokens()
    truth = reference(model, tokens)
    other = tokens.clone()
    other[0, 4:] = make_tokens(seed=5)[0, 4:]
    truth_other = reference(model, other)
    worst = []
    for complete in (True, False):
        arena = Arena(model, BATCH, LENGTH, CHUNK, page=4)
        arena.prime(*make_memory())
        arena.reserve({0: 13})
        feed(arena, tokens[:1, :4], [4], [4], rows=[0])
        copy = arena.snapshot(0, paged=False)
        static = {key: arena._buffer(key)[0].clone() for key, leaf in arena.leaves.items() if leaf.kind == "static"}
        feed(arena, tokens[:1, 4:9], [5], [5], rows=[0])
        arena.attach(2, arena.pages.owned[0][:1], 4, {**copy, **static} if complete else None)
        if not complete:  # the memory is the request's own, and there either way
            for key, value in static.items():
                arena._buffer(key)[2] = value
        arena.reserve({2: 9})
        theirs = feed(arena, other[:1, 4:9], [5], [5], rows=[2])
        ours = feed(arena, tokens[:1, 9:13], [4], [4], rows=[0])
        assert (ours[0] - truth[0, 9:13]).abs().max() < TOLERANCE
        worst.append((theirs[0] - truth_other[0, 4:9]).abs().max())
        assert arena.pages.references[arena.pages.owned[0][0]] == 2
    assert worst[0] < TOLERANCE
    if any(leaf.kind in ("fixed", "ring") for leaf in arena.leaves.values()):
        assert worst[1] > 1e-6, "control: without the snapshot it would be another text's state, or none"


@pytest.mark.parametrize("page", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_going_back_to_before_a_draft(name, page):
    model, tokens = make(name), make_tokens()
    truth, arena = reference(model, tokens), make_arena(model, page)
    for start in (0, 3, 6):
        feed(arena, tokens[:, start : start + 3], [3] * BATCH, [3] * BATCH)
    copy = arena.snapshot(1, paged=False)
    feed(arena, make_tokens(length=CHUNK, seed=9), [0, CHUNK, 0], [0, CHUNK, 0])
    arena.rewind(1, 9, copy if any(leaf.kind == "fixed" for leaf in arena.leaves.values()) else None)
    logits = feed(arena, tokens[:, 9:14], [5, 5, 5], [5, 5, 5])
    assert (logits - truth[:, 9:14]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_rows_pages_and_lengths_grow_under_way(name):
    model, tokens = make(name), make_tokens()
    truth = reference(model, tokens)
    arena = Arena(model, 2, 11, CHUNK, page=4, num_pages=2, max_pages=40)
    arena.prime(*(each[:2] for each in make_memory()))
    for start in (0, 5):
        arena.reserve({0: start + 5, 1: start + 5})
        feed(arena, tokens[:2, start : start + 5], [5, 5], [5, 5])
    pools = [arena._buffer(key).data_ptr() for key, leaf in arena.leaves.items() if leaf.kind == "append"]
    arena.move(1, 0)
    arena.resize(3, LENGTH)
    assert pools == [arena._buffer(key).data_ptr() for key, leaf in arena.leaves.items() if leaf.kind == "append"]
    for start in (10, 15, 20):
        arena.reserve({0: start + 5})
        logits = feed(arena, tokens[1:2, start : start + 5], [5], [5], rows=[0])
        assert (logits[0] - truth[1, start : start + 5]).abs().max() < TOLERANCE
    assert arena.num_pages > 4
    arena.reset([0])
    assert arena.pages.num_used == 0


# 3: padding and idle rows are inert


@pytest.mark.parametrize("page", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_padding_and_idle_rows_are_inert(name, page):
    model, tokens = make(name), make_tokens()
    outcomes = []
    for garbage in (0, 1):
        arena = make_arena(model, page)
        feed(arena, tokens[:, :7], [7, 7, 7], [7, 7, 7])
        fed = make_tokens(length=7, seed=garbage)
        fed[0, :3] = tokens[0, 7:10]
        first = feed(arena, fed, [3, 0, 0], [3, 0, 0])
        assert torch.isfinite(first).all(), "outputs at padding are finite"
        fed = torch.stack([tokens[0, 10:12], tokens[1, 7:9], tokens[2, 7:9]])
        outcomes.append((first[0, :3], feed(arena, fed, [2, 2, 2], [2, 2, 2])))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("name", NAMES)
def test_right_padding_is_inert_in_the_parallel_pass(name):
    model, tokens = make(name), make_tokens()
    lengths = torch.tensor([LENGTH, 11, 1])
    garbled = torch.where(torch.arange(LENGTH) < lengths[:, None], tokens, make_tokens(seed=3))
    with torch.no_grad():
        clean, dirty = (model(t, Step.parallel(t, lengths), memory=make_memory()).logits for t in (tokens, garbled))
    assert torch.isfinite(dirty).all()
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(clean[row, :length], dirty[row, :length])


# 5: position 0 means fresh state


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_separate_ones(name):
    model = make(name)
    documents = [make_tokens(1, length, seed=length) for length in (5, 9, 1, 3)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    segments = torch.cat([torch.full((d.shape[1],), i) for i, d in enumerate(documents)])[None]
    memory = make_memory(1)
    with torch.no_grad():
        together = model(packed, Step.packed(positions, segments), memory=memory).logits
        separate = torch.cat([model(d, memory=memory).logits for d in documents], 1)
        leaking = model(packed, memory=memory).logits
    assert (together - separate).abs().max() < TOLERANCE
    if name != "cross":  # control: without restarts later documents see earlier ones
        assert (leaking - separate).abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_packed_gradients_equal_separate_ones(name):
    model = make(name)
    documents = [make_tokens(1, length, seed=length) for length in (5, 8)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    segments = torch.cat([torch.full((d.shape[1],), i) for i, d in enumerate(documents)])[None]
    gradients = []
    for logits in (
        model(torch.cat(documents, 1), Step.packed(positions, segments), memory=make_memory(1)).logits,
        torch.cat([model(d, memory=make_memory(1)).logits for d in documents], 1),
    ):
        model.zero_grad()
        logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("page", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_recycled_row_does_not_leak(name, page):
    model, tokens = make(name), make_tokens(seed=2)
    arena = make_arena(model, page)
    feed(arena, make_tokens(length=7), [7] * BATCH, [7] * BATCH)
    arena.reset([1])
    arena.reserve({1: LENGTH})
    logits = feed(arena, tokens[:, :7], [7] * BATCH, [7] * BATCH)
    truth = reference(model, tokens)
    assert (logits[1] - truth[1, :7]).abs().max() < TOLERANCE
    if name != "cross":  # control: a row that was not reset continues its old text
        assert (logits[0] - truth[0, :7]).abs().max() > 1e-6


# 6: one graph, no break, no recompilation as positions and raggedness change


@pytest.mark.parametrize("page", LAYOUTS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph_a_length(name, page):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, tokens = make(name), make_tokens()
    truth = reference(model, tokens)
    arena = make_arena(model, page)
    runner = torch.compile(Runner(model, arena), fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for length, passes in ((CHUNK, 2), (1, 4)):
            for i in range(passes):
                start = arena.lens.tolist()
                n_new = torch.tensor([length, length, length if i % 2 else 0])
                fed = torch.stack([tokens[row, start[row] : start[row] + length] for row in range(BATCH)])
                logits = runner(fed, n_new)
                for row in range(BATCH):
                    if n_new[row]:
                        assert (logits[row] - truth[row, start[row] + length - 1]).abs().max() < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


# controls and refusals


def test_a_ring_one_slot_too_short_is_noticed():
    """Capacity window - 1 + max_chunk is necessary: an arena made for shorter chunks gives wrong answers."""
    model, tokens = make("window"), make_tokens()
    truth = reference(model, tokens)
    for chunk, wrong in ((CHUNK, False), (CHUNK - 1, True)):
        arena, worst = make_arena(model, max_chunk=chunk), 0.0
        arena.max_chunk = CHUNK
        for start in range(0, LENGTH - CHUNK, CHUNK):
            logits = feed(arena, tokens[:, start : start + CHUNK], [CHUNK] * BATCH, [CHUNK] * BATCH)
            worst = max(worst, (logits - truth[:, start : start + CHUNK]).abs().max().item())
        assert (worst > 1e-3) == wrong


def test_committing_one_token_too_many_is_noticed():
    """Control for the split test: a state that is one token off shows at once in every recurrent mixer."""
    for name in ("lstm", "gru", "mamba", "rwkv_channel_mix"):
        model, tokens = make(name), make_tokens()
        truth, arena = reference(model, tokens), make_arena(model)
        feed(arena, tokens[:, :5], [5] * BATCH, [5] * BATCH)
        arena.lens.sub_(1)
        logits = feed(arena, tokens[:, 4:6], [2] * BATCH, [2] * BATCH)
        assert (logits - truth[:, 4:6]).abs().max() > 1e-4


def test_a_bidirectional_model_is_refused_with_a_sentence():
    layer = {"mixer": {"type": "attention", "heads": 4, "causal": False}, "channel": {"type": "mlp", "hidden": 24}}
    spec = model_spec({"vocab": VOCAB, "dim": 16, "layers": [layer]})
    model = build(spec, dtype=torch.float64, seed=0).eval()
    assert spec.state() is None
    with pytest.raises(UserError, match=r"causal: false.*cannot go token by token"):
        Arena(model, 1, 8, 4)
    tokens, lengths = make_tokens(), torch.tensor([LENGTH, 11, 2])
    garbled = torch.where(torch.arange(LENGTH) < lengths[:, None], tokens, 0)
    with torch.no_grad():
        whole, padded = (model(t, Step.parallel(t, lengths)).logits for t in (tokens, garbled))
        alone = model(tokens[1:2, :11]).logits
    assert torch.equal(whole[1, :11], padded[1, :11])
    assert (whole[1, :11] - alone[0]).abs().max() < TOLERANCE


def test_pages_running_out_is_a_sentence():
    arena = Arena(make("mha"), 2, 16, 4, page=4, num_pages=5)
    arena.reserve({0: 16})
    with pytest.raises(UserError, match="all 5 pages of state are in use"):
        arena.reserve({1: 8})
    arena.reset([0])
    arena.reserve({1: 16})


def test_a_text_longer_than_the_state_is_a_sentence():
    with pytest.raises(UserError, match="17 tokens are asked of a state that holds 16"):
        Arena(make("mha"), 1, 16, 4).reserve({0: 17})


def test_a_memory_that_is_too_long_or_missing_is_a_sentence():
    model = make("cross")
    with pytest.raises(UserError, match="12 entries but the model takes at most 9"):
        model(make_tokens(), memory=(torch.randn(3, 12, 10, dtype=torch.float64), torch.tensor([1, 1, 1])))
    with pytest.raises(UserError, match="attends to a memory, and none was given"):
        model(make_tokens())


@pytest.mark.parametrize("name", NAMES)
def test_initialisers_leave_nothing_unset(name):
    """Memory is poisoned with NaN before initialisation, so that a forgotten parameter or buffer is seen."""
    from weft.nn import initialise

    model = build(SPECS[name], device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    initialise(model, seed=0)
    assert all(torch.isfinite(tensor).all() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model = make(name).train()
    model(make_tokens(), memory=make_memory()).logits.square().mean().backward()
    silent = [key for key, parameter in model.named_parameters() if parameter.grad is None or not torch.isfinite(parameter.grad).all()]
    assert not silent


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    for checkpointing in (False, True):
        model = make(name).train()
        model.gradient_checkpointing = checkpointing
        model(make_tokens(), memory=make_memory()).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gqa", "window", "lstm", "gru", "mamba", "rwkv_channel_mix", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_decoding_follows_the_parallel_pass(name, dtype):
    """The same contract in the dtypes people run: not to 1e-10, but far below what a wrong state would cost."""
    model, tokens = make(name, dtype), make_tokens()
    with torch.no_grad():
        truth = model(tokens).logits.float()
    arena, worst = make_arena(model), 0.0
    for start in range(0, LENGTH - 3, 3):
        logits = feed(arena, tokens[:, start : start + 3], [3] * BATCH, [3] * BATCH, keep="last")
        worst = max(worst, (logits.float() - truth[:, start : start + 3]).abs().max().item())
    scale = truth.abs().max().item()
    assert worst < {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype] * scale
