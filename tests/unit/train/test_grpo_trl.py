"""GRPO's loss against TRL's GRPOTrainer: the same model, prompts, answers and rewards, from these to the loss and its gradient."""

from dataclasses import replace

import online_cases as online
import pytest
import torch

from weft.objectives.grpo import GRPO
from weft.objectives.reference import REFERENCE
from weft.objectives.settings import GRPOSettings
from weft.train.objective import POLICY
from weft.train.rollout import Rollouts, Sampling
from weft.weights.save import save_model

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="TRL, the reference of this loss, is not installed")
datasets = pytest.importorskip("datasets", reason="datasets, which TRL reads from, is not installed")

SAMPLES, MAX_TOKENS, BETA, TEMPERATURE = 4, 7, 0.3, 0.9


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a policy and a reference, and their tokenizer."""
    folder = tmp_path_factory.mktemp("grpo")
    tokenizer = online.tokenizer_of(folder)
    models = {POLICY: online.policy_of(1, torch.float32), REFERENCE: online.policy_of(2, torch.float32)}
    for role, model in models.items():
        save_model(model, folder / role, tokenizer)
    return folder, tokenizer, models


def theirs_of(folder, batch, rewards, loss, settings):
    """Their inputs and loss for our answers; generation is replaced by handing these over."""
    prompts = [example.prompt for example in batch.examples for _ in range(SAMPLES)]
    answers = settings["answers"]
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / POLICY, attn_implementation="eager", dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / POLICY, pad_token="</s>", padding_side="left"),
        reward_funcs=lambda completions, **_: rewards,
        args=trl.GRPOConfig(
            output_dir=str(folder / "trl"),
            loss_type=loss,
            beta=BETA,
            temperature=TEMPERATURE,
            num_generations=SAMPLES,
            max_completion_length=MAX_TOKENS,
            scale_rewards="group" if settings["scale"] else "none",
            use_bias_correction_kl=settings["unbiased"],
            per_device_train_batch_size=len(prompts),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / REFERENCE, attn_implementation="eager", dtype=torch.float32)
    trainer.ref_model.load_state_dict(reference.state_dict())
    asked = [list(example.ids) for example in batch.examples for _ in range(SAMPLES)]
    trainer._generate = lambda prompts: (asked, answers, None, [""] * len(asked), None, {}, None, None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what its own loop would set
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    return trainer, inputs


@pytest.mark.parametrize(("loss", "scale", "unbiased"), [("dapo", True, False), ("grpo", True, True), ("dr_grpo", False, False)])
def test_one_step_is_trls(place, tmp_path, loss, scale, unbiased):
    folder, tokenizer, models = place
    objective = GRPO(
        GRPOSettings(
            rewards=online.judge_of(tmp_path),
            samples=SAMPLES,
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
            beta=BETA,
            loss=loss,
            scale=scale,
            unbiased_kl=unbiased,
            unfinished="keep",
        )
    )
    sampling = Sampling(MAX_TOKENS, TEMPERATURE, online.ENDS)
    engine = Rollouts(tokenizer, sampling, torch.device("cpu"), models=models)
    prompts = online.prompts_of(tokenizer, 3)
    batch = objective.rollout(engine, prompts)
    starts = [len(example.ids) for example in prompts.examples for _ in range(SAMPLES)]
    answers = [batch.texts.tokens[row, start : batch.texts.lengths[row]].tolist() for row, start in enumerate(starts)]
    assert len({len(answer) for answer in answers}) > 1
    rewards = batch.columns["reward"].tolist()
    trainer, inputs = theirs_of(folder, prompts, rewards, loss, {"answers": answers, "scale": scale, "unbiased": unbiased})
    torch.testing.assert_close(batch.columns["advantage"], inputs["advantages"], rtol=0, atol=1e-5)
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    policy = models[POLICY].train()
    policy.embed.weight.grad = None
    terms, _ = objective.loss(models, batch)
    ours = sum(term.weight * term.sum / term.count for term in terms.values())
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert abs(ours.item()) > 1e-3
    torch.testing.assert_close(policy.embed.weight.grad, trainer.model.get_input_embeddings().weight.grad, rtol=0, atol=1e-5)
    # Negative controls: k3's gradient taken the other way, and rewards in another order, are another step.
    other = GRPO(GRPOSettings(**objective.settings.model_dump() | {"unbiased_kl": not unbiased}))
    turned = replace(batch, columns={**batch.columns, "advantage": batch.columns["advantage"].roll(1)})
    for wrong, rows in ((other, batch), (objective, turned)):
        policy.embed.weight.grad = None
        sum(term.weight * term.sum / term.count for term in wrong.loss(models, rows)[0].values()).backward()
        assert (policy.embed.weight.grad - trainer.model.get_input_embeddings().weight.grad).abs().max() > 1e-3
