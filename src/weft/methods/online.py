"""What all kinds of training have in common that learn from the policy's own answers: prompts, a reward model, a reference."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from weft.data.encode_records import RecordEncoder
from weft.data.examples import split_examples
from weft.data.prompts import PromptBatches, PromptExample, collate
from weft.data.record_kinds import Prompt
from weft.errors import UserError
from weft.files import sha256
from weft.methods.frozen import check_frozen, has_fresh_adapter, open_frozen
from weft.methods.method import Place, Setup
from weft.methods.records import encoded, read_split
from weft.nn import Model
from weft.nn.dropout import without_dropout
from weft.objectives.grpo import GRPO
from weft.objectives.online import REWARD
from weft.objectives.reference import REFERENCE, reference_of
from weft.objectives.rejection import Rejection
from weft.objectives.settings import GRPOSettings, OnlineSettings, PPOSettings, RejectionSettings
from weft.rewards import own_files
from weft.tokenizer import Tokenizer
from weft.train.job import BatchSource
from weft.train.objective import POLICY, Objective
from weft.train.plan import Plan
from weft.train.rollout import Rollouts, Sampling, check_sampling

S = TypeVar("S", bound=OnlineSettings)
P = TypeVar("P", GRPOSettings, PPOSettings)


@dataclass(frozen=True)
class OnlineMethod(ABC, Generic[S]):
    """Prompts from records, and whatever judges the answers. `kind` is what the recipe's `objective` is read as."""

    kind: type[S]

    def settings(self, plan: Plan) -> S:
        settings = plan.recipe.objective
        assert isinstance(settings, self.kind)
        return settings

    def check(self, plan: Plan) -> None:
        settings, recipe = self.settings(plan), plan.recipe
        check_sampling(_sampling(settings), tokenizer_of(plan))
        if recipe.compile:
            raise UserError(
                "compile is true, but the answers of every step have another shape, each of which would be compiled; set it to false."
            )
        if settings.max_tokens >= plan.length:
            raise UserError(
                f"objective.max_tokens is {settings.max_tokens}, but a row has {plan.length} tokens, prompt and answer together; raise "
                "batch.length, or lower max_tokens."
            )
        if settings.reward is not None and check_frozen(settings.reward, "objective.reward", plan).spec.score != 1:
            raise UserError(
                f"objective.reward is {settings.reward}, which is no reward model: it has no score head of one output; give one that was "
                "trained with objective: reward."
            )

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        recipe, world = plan.recipe, place.world
        most = self.settings(plan).max_tokens
        train, valid = (prompt_examples(records, plan, place, most) for records in read_split(plan, place, Prompt))
        if not valid:
            train, valid = split_examples(train, plan.data.valid, recipe.seed)
        mean = round(sum(example.num_tokens for example in train) / max(1, len(train)))
        name = ", ".join(source.label for source in plan.data.sources)
        shape = {"seed": recipe.seed, "rank": world.rank, "world": world.size}
        # How long answers are is only known when they are there; half of the most is what is said of the pace.
        length = mean + self.settings(plan).max_tokens // 2
        batches = PromptBatches(train, collate, recipe.batch.rows, length, valid=valid, **shape, name=name)
        batches.samples = self.settings(plan).samples
        files = own_files(self.settings(plan).rewards)
        batches.facts = {"judges": {str(path): sha256(path) for path in files}} if files else {}
        return batches

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return policy

    @abstractmethod
    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        """As `Method.begin`."""

    def judges(self, plan: Plan, place: Place) -> dict[str, Model]:
        """The reward model by its role, where there is one."""
        reward = self.settings(plan).reward
        return {} if reward is None else {REWARD: open_frozen(reward, "objective.reward", plan, place)}

    def setup(self, plan: Plan, policy: Model, place: Place, objective: Objective[Any], models: dict[str, Model]) -> Setup:
        """Everything put together, with the engine that rollouts are made on."""
        engine = Rollouts(
            tokenizer_of(plan),
            _sampling(self.settings(plan)),
            place.device,
            place.products,
            plan.recipe.batch.micro,
            place.world,
            {POLICY: policy, **models},
        )
        return Setup(objective, models, engine)


class PolicyGradientMethod(OnlineMethod[P]):
    """What compares the policy with what it was: with a reference, and before each of several updates from one rollout."""

    def check(self, plan: Plan) -> None:
        super().check(plan)
        settings = self.settings(plan)
        check_updates(plan, settings.samples, settings.minibatches)
        check_reference(plan, settings.reference)

    def batches(self, plan: Plan, place: Place) -> BatchSource:
        settings = self.settings(plan)
        check_updates(plan, settings.samples, settings.minibatches, place.world.size)
        return super().batches(plan, place)

    def policy(self, plan: Plan, policy: Model, place: Place) -> Model:
        return without_dropout(policy)


class GRPOMethod(PolicyGradientMethod[GRPOSettings]):
    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        settings = self.settings(plan)
        models = {} if settings.beta == 0 else open_reference(plan, policy, place, settings.reference)
        objective = GRPO(settings, policy.spec, own_reference=REFERENCE in models)
        return self.setup(plan, policy, place, objective, {**models, **self.judges(plan, place)})


class RejectionMethod(OnlineMethod[RejectionSettings]):
    def begin(self, plan: Plan, policy: Model, place: Place) -> Setup:
        return self.setup(plan, policy, place, Rejection(self.settings(plan), policy.spec), self.judges(plan, place))


def tokenizer_of(plan: Plan) -> Tokenizer:
    """Raises UserError where there is none."""
    if plan.tokenizer is None:
        raise UserError(
            "there is no tokenizer to read prompts and write answers with; give tokenizer=PATH, or a model that has one beside it."
        )
    return plan.tokenizer


def prompt_examples(records: Sequence[Prompt], plan: Plan, place: Place, max_tokens: int) -> list[PromptExample]:
    """Prompts as ids. One that leaves too little of a row to answer in is refused, or left out where the recipe says `data.drop_bad`."""
    encoder = RecordEncoder(tokenizer_of(plan))
    room = plan.length - max_tokens

    def example(record: Prompt) -> PromptExample:
        found = PromptExample(encoder.prompt(record.prompt, record.origin, record.tools), record.prompt, record.origin, dict(record.facts))
        if not found.num_tokens:
            raise UserError(f"{record.origin}: the prompt has no tokens; write one, or drop the record.")
        return found

    found = encoded(plan, place, records, example)
    over = [example for example in found if example.num_tokens > room]
    if over and (len(over) == len(found) or not plan.data.drop_bad):
        longest = max(example.num_tokens for example in over)
        raise UserError(
            f"{over[0].origin}: the prompt has {over[0].num_tokens} tokens, and {max_tokens} of a row's {plan.length} are for the answer "
            f"({len(over)} of {len(found)} prompts are too long); set batch.length to {longest + max_tokens}, lower "
            "objective.max_tokens, or leave such prompts out: data: {sources: [FILE], drop_bad: true}."
        )
    place.dropped.update(f"{example.origin}: the prompt is too long" for example in over)
    return [example for example in found if example.num_tokens <= room]


def check_updates(plan: Plan, samples: int, minibatches: int, processes: int = 1) -> None:
    """Raise UserError where a process would have fewer answers of a step than there are minibatches to make of them."""
    rows = plan.recipe.batch.rows // processes * samples
    if minibatches > rows:
        where = f" on each of {processes} processes" if processes > 1 else ""
        raise UserError(f"objective.minibatches is {minibatches}, but a step has {rows} answers{where}; lower it, or raise batch.rows.")


def check_reference(plan: Plan, reference: str | None) -> None:
    if reference is not None:
        check_frozen(reference, "objective.reference", plan)


def open_reference(plan: Plan, policy: Model, place: Place, reference: str | None) -> dict[str, Model]:
    """What is held beside a policy so that it stays near: see `reference_of`."""
    other = None if reference is None else open_frozen(reference, "objective.reference", plan, place, policy.dtype)
    return reference_of(policy, other, has_fresh_adapter(plan))


def _sampling(settings: OnlineSettings) -> Sampling:
    return Sampling(settings.max_tokens, settings.temperature, settings.stop, settings.in_flight)
