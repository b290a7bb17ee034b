"""What a trainer minimises. Pretraining, fine-tuning, DPO, PPO and distillation are objectives; none of them is a trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from weft.nn import Model
from weft.train.watched import Watched

POLICY = "policy"  # the role of the model a run is about
ENDS = ("head", "score", "mtp")  # what is read of a model behind its last layer, by one objective and not by another
Models = Mapping[str, Model]


@dataclass(frozen=True)
class Role:
    """A model an objective works with.

    trained   True for the policy and a critic, which get an optimiser each; False for a reference or a reward model, which are frozen.
    reads     those of `ENDS` that the loss comes from. The others of a trained model are frozen: they would have no gradient.
    """

    trained: bool
    reads: frozenset[str] = frozenset({"head"})


@dataclass(frozen=True)
class Term:
    """One addend of a loss: `weight * sum / count`.

    sum     scalar that carries the gradient: a sum over this micro-batch, never a mean.
    count   what the sum runs over (tokens, examples, pairs): a scalar tensor or a number.
    weight  factor of this addend in the loss.

    The trainer divides by the count over all micro-batches and ranks of a step, so that accumulation equals one large batch.
    """

    sum: Tensor
    count: Tensor | float
    weight: float = 1.0


class Batch(Protocol):
    """The rows of one step, cut into micro-batches by the trainer."""

    @property
    def num_rows(self) -> int: ...

    def rows(self, start: int, stop: int) -> "Batch": ...

    def to(self, device: Any) -> "Batch": ...


B = TypeVar("B")


class Objective(Protocol[B]):
    """A loss over a batch, and the models it needs.

    `counts` says, from the batch alone and on the CPU, the count of every term of its loss: all micro-batches are known before the
    first is run, so each is scaled by the global count at once, whatever number of terms there are. The trainer checks, when it
    rehearses step 0, that `loss` returns the same counts.
    """

    @property
    def roles(self) -> Mapping[str, Role]: ...

    @property
    def watched(self) -> Sequence[Watched]:
        """What people follow in a run, first the figure that says whether it goes well."""
        ...

    def rollout(self, engine: Any, batch: B) -> B:
        """What is generated before the loss (PPO, GRPO, on-policy distillation); offline objectives return the batch itself."""
        ...

    def minibatches(self, batch: B) -> Sequence[B]:
        """The updates made from one batch, in order, as many on every process: the batch itself, or a rollout's inner epochs (PPO)."""
        ...

    def counts(self, batch: B) -> dict[str, int]: ...

    def loss(self, models: Models, batch: B) -> tuple[dict[str, Term], dict[str, Term]]:
        """Terms to minimise, and metrics: sums and counts that are averaged in the same way and carry no gradient.

        A metric whose sum is a vector is no number to show but a statistic, named `<role>/<name in aux>`: summed over micro-batches and
        processes, it is handed to the model's `after_step` once its weights are updated.
        """
        ...


def set_trained(model: Model, role: Role) -> None:
    """Put a model in the mode of its role, and freeze what is not trained in it. A tied head is the embedding's, which is trained on."""
    model.train(role.trained)
    if not role.trained:
        model.requires_grad_(False)
    for name in ENDS:
        part = getattr(model, name)
        if part is not None and name not in role.reads:
            part.requires_grad_(False)


@runtime_checkable
class Stateful(Protocol):
    """An objective with something to remember from step to step, such as a controller's price; a checkpoint holds it."""

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Measured(Protocol):
    """An objective whose held-out data is not a loss to compute: it is looked at in another way, such as the reward of fresh answers."""

    def measure(self, engine: Any, batch: Any) -> tuple[dict[str, Term], dict[str, Term]]:
        """Terms whose weighted means add up to what is to be small, and metrics, as `loss` gives them."""
        ...
