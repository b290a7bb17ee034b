"""Loss, gradients and one optimiser step against transformers' Llama and torch's own AdamW."""

import pytest
import torch
import train_cases as cases

from weft.data.batches import Batches
from weft.data.windows import cut
from weft.objectives.next_token import NextToken
from weft.train.history import read_metrics
from weft.train.job import Compute
from weft.train.objective import POLICY
from weft.train.settings import EvalSettings, LogSettings, OptimSettings
from weft.train.trainer import Trainer
from weft.weights.save import save_model

transformers = pytest.importorskip("transformers")

SETTINGS = OptimSettings(lr=1e-2, warmup=0, schedule="constant", weight_decay=0.1, clip=0.7)


@pytest.fixture
def oracle(tmp_path):
    """Transformers' model with the weights of ours, through the real files."""
    save_model(cases.model_of(torch.float32), tmp_path / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").train()


def _batches():
    """One document a row, so that transformers' own shifted loss says the same."""
    return Batches(cut(cases.store_of(), 24, "pad"), 7, valid=cut(cases.store_of(8, seed=4), 24, "pad"), seed=5)


def _transformers_loss(oracle, batch):
    """Its loss with labels as ids: it shifts them itself, so the last target of a row goes in as one more token."""
    ids = torch.cat([batch.tokens, torch.zeros(7, 1, dtype=torch.long)], 1)
    labels = torch.cat([torch.full((7, 1), -100), batch.targets], 1)
    lengths = batch.lengths[:, None] + 1
    for row, length in enumerate(batch.lengths.tolist()):
        ids[row, length] = batch.targets[row, length - 1]
    return oracle(input_ids=ids, labels=labels, attention_mask=(torch.arange(25) < lengths).long()).loss


def test_the_loss_is_transformers_loss(oracle):
    batch = _batches().batch(0)
    terms, _ = NextToken(chunk=20).loss({POLICY: cases.model_of(torch.float32)}, batch)
    ours = terms["next_token"].sum / terms["next_token"].count
    theirs = _transformers_loss(oracle, batch)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    others = _transformers_loss(oracle, _batches().batch(1))
    assert abs(ours.item() - others.item()) > 1e-3, "negative control: another batch has another loss"


def test_steps_with_accumulation_are_torchs_adamw_on_transformers_loss(oracle, tmp_path):
    """Three steps of ours in micro-batches of 3, 3 and 1 rows, against whole batches there."""
    decayed = [p for name, p in oracle.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in oracle.named_parameters() if not name.endswith("proj.weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=SETTINGS.betas, eps=SETTINGS.eps)
    losses, norms = [], []
    for step in range(3):
        loss = _transformers_loss(oracle, _batches().batch(step))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.7).item())
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    model = cases.model_of(torch.float32)
    job = cases.job_of(
        tmp_path / "run",
        steps=3,
        models={POLICY: model},
        batches=_batches(),
        compute=Compute(torch.device("cpu")),
        optim=SETTINGS,
        micro=3,
        evaluation=EvalSettings(every=9),
        log=LogSettings(plot=False),
    )
    Trainer(job).run()
    job.folder.release()
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, abs=1e-5)
    assert min(norms) > 0.7, "clipping was at work"
    save_model(model, tmp_path / "after")
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after").state_dict()
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, expected in oracle.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=2e-4)
        assert (trained[name] - before[name]).abs().max() > 5e-3, "negative control: every weight has moved by far more"
