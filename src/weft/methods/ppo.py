"""PPO: prompts, a reward model, a reference, a critic, and other text to be learned beside."""

from pathlib import Path

from weft.data.load import open_batches, parse_data
from weft.data.packing import PackedBatch
from weft.data.prompts import PromptBatches
from weft.errors import UserError
from weft.methods.frozen import check_frozen
from weft.methods.method import Place, Setup
from weft.methods.online import PolicyGradientMethod, open_reference, tokenizer_of
from weft.nn import Model, add_score, build
from weft.nn.dropout import without_dropout
from weft.objectives.ppo import CRITIC, PPO
from weft.objectives.reference import REFERENCE
from weft.objectives.settings import PPOSettings
from weft.train.job import BatchSource
from weft.train.plan import Plan
from weft.weights.load import load_weights, open_checkpoint


class PPOMethod(PolicyGradientMethod[PPOSettings]):
    def check(self, plan: Plan) -> None:
        super().check(plan)
        settings = self.settings(plan)
        if settings.critic.model not in ("reward", "policy"):
            check_frozen(settings.critic.model, "objective.critic.model", plan)
        for source in () if settings.pretrain is None else parse_data(settings.pretrain.data).sources:
            if not Path(source.path).exists():
                raise UserError(
                    f"there is no data at {source.path} (objective.pretrain); give text, or a folder made by `weft data prepare`."
                )

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        settings, batches = self.settings(plan), super().batches(plan, place)
        assert isinstance(batches, PromptBatches)
        if settings.pretrain is not None:
            world = place.world
            text = open_batches(
                parse_data(settings.pretrain.data),
                plan.length,
                settings.pretrain.rows * settings.epochs * settings.minibatches,
                seed=plan.recipe.seed,
                tokenizer=tokenizer_of(plan),
                cache=place.cache,
                rank=world.rank,
                world=world.size,
                progress=place.progress,
            )

            def rows(step: int) -> PackedBatch:
                return text.batch(step)

            batches.text, batches.facts = rows, {**batches.facts, "text": text.describe()}
        return batches

    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = self.settings(plan)
        models = open_reference(plan, policy, place, settings.reference)
        objective = PPO(settings, policy.spec, own_reference=REFERENCE in models)
        models = {**models, **self.judges(plan, place), CRITIC: _critic(plan, settings, place)}
        setup = self.setup(plan, policy, place, objective, models)
        optims = {} if settings.critic.optim is None else {CRITIC: settings.critic.optim}
        return Setup(setup.objective, setup.models, setup.engine, optims)


def _critic(plan: Plan, settings: PPOSettings, place: Place) -> Model:
    """A trained model with a score head of one output: the one it begins as has it, or gets a fresh one."""
    begins = settings.critic.model
    if begins == "policy":
        where, checkpoint = (place.device, place.dtype), plan.checkpoint
        model = build(plan.spec, *where, plan.recipe.seed) if checkpoint is None else load_weights(checkpoint, *where)
    else:
        source = settings.reward if begins == "reward" else begins
        assert source is not None
        model = load_weights(open_checkpoint(source), place.device, place.dtype)
    if model.spec.score != 1:
        model = add_score(model, 1, plan.recipe.seed)
    return without_dropout(model)
