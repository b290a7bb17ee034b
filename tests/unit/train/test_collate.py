"""Whole texts as padded rows: what is in them, and how a batch of examples is cut."""

import preference_cases as cases
import torch

from weft.data.collate import MULTIPLE, TextRows


def test_rows_hold_the_texts_and_what_follows_each_token():
    texts = [cases.text(1, 9, 4), cases.text(2, 3, 1)]
    rows = TextRows.lay(texts)
    assert rows.tokens.shape == (2, 2 * MULTIPLE)
    assert rows.lengths.tolist() == [9, 3]
    for row, text in enumerate(texts):
        length = len(text.ids)
        assert rows.tokens[row, :length].tolist() == list(text.ids)
        assert rows.targets[row, : length - 1].tolist() == list(text.ids[1:])
        assert rows.mask[row, : length - 1].tolist() == list(text.trained[1:])
        assert not rows.mask[row, length - 1 :].any()
    assert rows.num_targets == sum(sum(text.trained[1:]) for text in texts)
    assert TextRows.lay(texts, 40).tokens.shape == (2, 40)


def test_parts_of_a_batch_are_its_examples_whole():
    batch = cases.compared()
    assert batch.num_rows == 6
    assert batch.num_answers.count(3) == 1
    parts = [batch.rows(start, start + 2) for start in (0, 2, 4)]
    assert sum(part.num_rows for part in parts) == 6
    assert sum(len(part.texts.lengths) for part in parts) == len(batch.texts.lengths) == 13
    found = [
        (part.texts.lengths[a].item(), part.texts.lengths[b].item())
        for part in parts
        for a, b in zip(part.chosen, part.rejected, strict=True)
    ]
    assert found == [
        (batch.texts.lengths[a].item(), batch.texts.lengths[b].item()) for a, b in zip(batch.chosen, batch.rejected, strict=True)
    ]
    assert torch.equal(torch.cat([part.margins for part in parts]), batch.margins)
    assert torch.equal(torch.cat([part.company for part in parts]), batch.company)
    assert sorted(batch.company.tolist()) == [1] * 5 + [3] * 3
    assert parts[2].texts.tokens.shape[1] < batch.texts.tokens.shape[1], "a part is no wider than its texts need"
    assert cases.compared(40).rows(4, 6).texts.tokens.shape[1] == 40, "unless the width is fixed"


def test_the_longest_texts_come_first():
    batch = cases.classified()
    assert batch.texts.lengths.tolist() == [17, 11, 9, 4, 2]
    assert batch.labels.tolist() == [1, 0, 0, 2, 2]
    assert batch.rows(3, 5).labels.tolist() == [2, 2]


def test_an_answer_is_read_once_however_many_pairs_it_is_in():
    assert len(cases.RANKED.pairs) == len(cases.RANKED.answers) == 3
    assert cases.RANKED.num_tokens == 9 + 13 + 6
