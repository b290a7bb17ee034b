"""Losses of DPO and reward models against TRL's on the same records and weights: text to loss, each library its own way."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from hf_cases import decoder

from weft.data.collate import Compared, collate_compared
from weft.data.encode_records import RecordEncoder
from weft.data.read_records import read_records
from weft.data.record_kinds import Preference
from weft.nn import Model
from weft.objectives.dpo import DPO
from weft.objectives.reference import REFERENCE
from weft.objectives.reward import Reward
from weft.objectives.settings import DPOSettings, RewardSettings
from weft.tokenizer import load_tokenizer
from weft.train.objective import POLICY, Term
from weft.weights.load import load_model

trl = pytest.importorskip("trl", reason="TRL, the reference of these losses, is not installed")
datasets = pytest.importorskip("datasets", reason="datasets, which TRL reads from, is not installed")

TOLERANCE = 1e-5
ROWS: list[dict[str, Any]] = [
    {"prompt": "Say it: ", "chosen": "a fox.", "rejected": "no, and never will I say it", "margin": 0.5},
    {"prompt": "Which?", "chosen": "all of them are", "rejected": "x", "margin": 0.0},
    {"prompt": "Now ", "chosen": "then.", "rejected": "them.", "margin": 1.25},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Records, a tokenizer of bytes for both libraries, and the folders of two language models and a reward model."""
    folder = tmp_path_factory.mktemp("trl")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=258, initial_alphabet=alphabet, special_tokens=["<pad>", "</s>"], show_progress=False
    )
    made.train_from_iterator([], trainer)
    theirs = hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")
    theirs.save_pretrained(folder / "tokenizer")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {"vocab_size": 258, "pad_token_id": 0, "eos_token_id": 1}
    for seed, (name, kind) in enumerate((("policy", hf.LlamaForCausalLM), ("reference", hf.LlamaForCausalLM))):
        torch.manual_seed(seed)
        _sharp(kind(decoder("Llama", **config)())).save_pretrained(folder / name)
    reward = decoder("Llama", **config)()
    reward.num_labels = 1
    _sharp(hf.LlamaForSequenceClassification(reward)).save_pretrained(folder / "reward")
    return SimpleNamespace(folder=folder, theirs=theirs, ours=load_tokenizer(folder / "tokenizer"))


def _sharp(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def ours(place: SimpleNamespace) -> list[Compared]:
    encoder = RecordEncoder(place.ours, 64)
    pairs = [encoder.preference(record) for record in read_records([place.folder / "pairs.jsonl"], Preference)]
    return [Compared((pair.chosen, pair.rejected), ((0, 1),), (pair.margin,)) for pair in pairs]


def options(place: SimpleNamespace, **more: Any) -> dict[str, Any]:
    plain = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    return {"output_dir": str(place.folder / "out"), "max_length": 64, **plain, **more}


def _loss(terms: dict[str, Term]) -> torch.Tensor:
    return torch.stack([term.weight * term.sum / term.count for term in terms.values()]).sum()


def _compare(theirs: torch.Tensor, mine: torch.Tensor, model: Any, policy: Model) -> None:
    assert abs(float(theirs.detach()) - float(mine.detach())) < TOLERANCE
    theirs.backward()
    mine.backward()
    expected, found = model.get_input_embeddings().weight.grad, policy.embed.weight.grad
    assert expected.abs().max() > 1e-3
    assert (expected - found).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ({"loss_type": ["sigmoid"]}, {}),
        ({"loss_type": ["sigmoid"], "beta": 0.4}, {"beta": 0.4}),
        ({"loss_type": ["ipo"], "beta": 0.4}, {"loss": "ipo", "beta": 0.4}),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, {"nll": 0.2}),
    ],
    ids=["sigmoid", "beta", "ipo", "nll"],
)
def test_dpo(place: SimpleNamespace, kind: dict[str, Any], settings: dict[str, Any]) -> None:
    model, reference = (hf.LlamaForCausalLM.from_pretrained(place.folder / name).eval() for name in (POLICY, REFERENCE))
    rows = datasets.Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS])
    trainer = trl.DPOTrainer(
        model, reference, args=trl.DPOConfig(**options(place, **kind)), train_dataset=rows, processing_class=place.theirs
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    model.eval()
    expected = trainer.compute_loss(model, dict(batch))

    models = {name: load_model(place.folder / name).model for name in (POLICY, REFERENCE)}
    made = collate_compared(ours(place))
    _same_ids(batch["input_ids"], batch["attention_mask"], made)
    terms, metrics = DPO(DPOSettings(**settings)).loss(models, made)
    _compare(expected, _loss(terms), model, models[POLICY])
    logged = trainer._metrics["eval"]
    assert abs(logged["rewards/margins"][0] - float(metrics["margin"].sum.detach()) / 3) < TOLERANCE
    assert abs(logged["rewards/accuracies"][0] - float(metrics["accuracy"].sum) / 3) < TOLERANCE
    # Negative controls: another beta, the wrong reference, the answers the wrong way round.
    for wrong in (
        DPO(DPOSettings(**{**settings, "beta": 0.7})).loss(models, made)[0],
        DPO(DPOSettings(**settings)).loss({POLICY: models[POLICY], REFERENCE: models[POLICY]}, made)[0],
        DPO(DPOSettings(**settings)).loss(models, collate_compared([Compared(e.answers[::-1], e.pairs, e.margins) for e in ours(place)]))[
            0
        ],
    ):
        assert abs(float(expected.detach()) - float(_loss(wrong).detach())) > 100 * TOLERANCE


@pytest.mark.parametrize("centre", [0.0, 0.3])
@pytest.mark.parametrize("margin", [False, True])
def test_reward(place: SimpleNamespace, margin: bool, centre: float) -> None:
    model = hf.LlamaForSequenceClassification.from_pretrained(place.folder / "reward").eval()
    columns = ("prompt", "chosen", "rejected", *(("margin",) if margin else ()))
    rows = datasets.Dataset.from_list([{key: row[key] for key in columns} for row in ROWS])
    settings = options(place, center_rewards_coefficient=centre or None)
    trainer = trl.RewardTrainer(model, args=trl.RewardConfig(**settings), train_dataset=rows, processing_class=place.theirs)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    model.eval()
    expected = trainer.compute_loss(model, dict(batch))

    models = {POLICY: load_model(place.folder / "reward").model}
    examples = [Compared(e.answers, e.pairs, e.margins if margin else (0.0,)) for e in ours(place)]
    made = collate_compared(examples)
    _same_ids(batch["input_ids"], batch["attention_mask"], made)
    terms, metrics = Reward(RewardSettings(centre=centre)).loss(models, made)
    _compare(expected, _loss(terms), model, models[POLICY])
    assert abs(trainer._metrics["eval"]["accuracy"][0] - float(metrics["accuracy"].sum) / 3) < TOLERANCE
    assert abs(trainer._metrics["eval"]["margin"][0] - float(metrics["margin"].sum.detach()) / 3) < TOLERANCE
    other = collate_compared([Compared(e.answers, e.pairs, tuple(m + 0.1 for m in e.margins)) for e in examples])
    wrong = _loss(Reward(RewardSettings(centre=centre)).loss(models, other)[0])
    assert abs(float(expected.detach()) - float(wrong.detach())) > 100 * TOLERANCE


def _same_ids(ids: torch.Tensor, valid: torch.Tensor, made: Any) -> None:
    """Both libraries read the same texts, though not in the same order."""
    theirs = sorted(row[kept.bool()].tolist() for row, kept in zip(ids, valid, strict=True))
    mine = sorted(row[:length].tolist() for row, length in zip(made.texts.tokens, made.texts.lengths, strict=True))
    assert theirs == mine
