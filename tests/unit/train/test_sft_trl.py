"""The loss of fine-tuning against TRL's SFTTrainer, from the same records to the same number."""

import pytest
import torch
import train_cases as cases

from record_cases import TAGGED, TALK, chat_tokenizer, write
from weft.data.batches import Batches
from weft.data.prepare_records import RecordSettings, prepare_records
from weft.data.shards import open_shards
from weft.data.windows import cut
from weft.objectives.sft import SFT
from weft.train.objective import POLICY
from weft.weights.save import save_model

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets", reason="needs datasets")

TALKS = [TALK, TALK[:2], ({"role": "system", "content": "Be brief."}, *TALK), (TALK[0] | {"content": "hm " * 20}, TALK[1])]


@pytest.fixture
def trainer(tmp_path):
    """TRL's trainer, over the same four conversations in one batch, and a model with the weights of ours."""
    tokenizer = chat_tokenizer(TAGGED)
    save_model(cases.model_of(torch.float32, vocab=tokenizer.vocab_size, context=200), tmp_path / "model", tokenizer)
    return trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager", dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "model", pad_token="</s>"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            assistant_only_loss=True,
            per_device_train_batch_size=len(TALKS),
            max_length=200,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": list(talk)} for talk in TALKS]),
    )


@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_the_loss_is_trls_on_the_same_records(tmp_path, trainer, packing):
    tokenizer = chat_tokenizer(TAGGED)
    path = write(tmp_path / "a.jsonl", [{"messages": list(talk)} for talk in TALKS])
    prepare_records(str(path), tokenizer, tmp_path / "data", RecordSettings(200, valid=0.0))
    windows = cut(open_shards(tmp_path / "data"), 199, packing)
    batch = Batches(windows, windows.num_rows, shuffle=False).batch(0)
    model = cases.model_of(torch.float32, vocab=tokenizer.vocab_size, context=200)
    (inputs,) = list(trainer.get_train_dataloader())
    theirs = trainer.compute_loss(trainer.model, dict(inputs))
    terms, _ = SFT().loss({POLICY: model}, batch)
    ours = terms["sft"].sum / terms["sft"].count
    assert int(terms["sft"].count) == int((inputs["labels"][:, 1:] != -100).sum())
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(model.embed.weight.grad, trainer.model.get_input_embeddings().weight.grad, rtol=0, atol=1e-5)
    # Negative control: with prompts trained on too it is another loss.
    everything = trainer.compute_loss(trainer.model, {**inputs, "labels": inputs["input_ids"].where(inputs["attention_mask"] == 1, -100)})
    assert abs(ours.item() - everything.item()) > 1e-3
