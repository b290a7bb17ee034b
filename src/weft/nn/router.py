"""Which experts a token is sent to, with what weights, and what is said about it: losses that keep experts busy, and statistics."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.fill import fill_normal
from weft.spec import Experts


class Routing:
    """The routes of N tokens, in float32 (float64 stays).

    logits [N, E]; scores [N, E], affinities; chosen [N, k] int64; weights [N, k], what the chosen experts' outputs are multiplied by.
    """

    def __init__(self, logits: Tensor, spec: Experts, bias: Tensor | None) -> None:
        self.logits = logits
        self.scores = torch.sigmoid(logits) if spec.score == "sigmoid" else torch.softmax(logits, -1)
        with torch.no_grad():
            self.chosen = _choose(self.scores if bias is None else self.scores + bias, spec)
        weights = self.scores.gather(-1, self.chosen)
        if spec.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        self.weights = weights * spec.scale if spec.scale != 1 else weights


def _choose(scores: Tensor, spec: Experts) -> Tensor:
    """The `top_k` best of each token, [N, k], within its best groups where there are groups."""
    if spec.top_groups < spec.groups:
        grouped = scores.unflatten(-1, (spec.groups, -1))
        worth = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        best = worth.topk(spec.top_groups, -1).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best, False)
        scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    return scores.topk(spec.top_k, -1).indices


class Router(nn.Module):
    """Affinities from one matrix [E, D], and the bias that balances choices without a loss (Wang et al. 2024)."""

    choice_bias: Tensor | None

    def __init__(self, spec: Experts, dim: int, std: float) -> None:
        super().__init__()
        self.spec, self.std = spec, std
        self.weight = nn.Parameter(torch.empty(spec.experts, dim))
        self.register_buffer("choice_bias", torch.zeros(spec.experts) if spec.choice_bias else None)

    def reset_parameters(self) -> None:
        fill_normal(self.weight, self.std)
        if self.choice_bias is not None:
            self.choice_bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves with the model, but the bias stays float32: in 16 bits its steps would be lost."""
        bias = self.choice_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.choice_bias = fn(bias.view(torch.int32)).view(torch.float32)
        return self

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.spec.experts,)}

    def forward(self, x: Tensor) -> Routing:
        """Routes of x [N, D]. Logits are float32 whatever x is, for an expert hangs on their order.

        On a CPU they are summed in float64, but for training in float32: float32 products depend on the number of rows, and where a token
        goes must not.
        """
        device = x.device.type
        narrow = device == "cpu" and x.dtype != torch.float64 and (not self.training or self.weight.dtype.itemsize == 2)
        wide = torch.float64 if narrow or x.dtype == torch.float64 else torch.float32
        with torch.autocast(device, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))
        return Routing(logits.float() if narrow else logits, self.spec, self.choice_bias)

    @torch.no_grad()
    def move_bias(self, counts: Tensor) -> None:
        """Raise the bias of experts that had fewer tokens than the average of counts [E], lower that of the others, by one speed."""
        if self.choice_bias is not None:
            self.choice_bias += self.spec.bias_speed * torch.sign(counts.mean() - counts).to(self.choice_bias.dtype)


def statistics(routing: Routing, valid: Tensor) -> dict[str, Tensor]:
    """What is known of routes after a pass, over tokens that are not padding (valid [N]); sums, so that passes can be added.

    chosen [E]: choices an expert.   entropy: of each token's shares, in nats.   tokens: how many.
    """
    with torch.no_grad():
        kept = valid.to(routing.scores.dtype)
        shares = _shares(routing)
        entropy = -(torch.special.xlogy(shares, shares).sum(-1) * kept).sum()
        return {"chosen": _counts(routing.chosen[None], kept[None], shares.shape[-1])[0], "entropy": entropy, "tokens": kept.sum()}


def losses(routing: Routing, valid: Tensor, spec: Experts) -> dict[str, Tensor]:
    """The losses that the spec asks for, valid [B, T]: each a sum that stands for as many addends as there are valid tokens.

    balance: E / (k n) sum_e c_e S_e of each row, or of the whole batch, times its n valid tokens, where c_e counts choices of expert e
    and S_e sums its share of every token's scores; so n times 1 where all experts are chosen alike.
    """
    kept = valid.to(routing.scores.dtype)
    found: dict[str, Tensor] = {}
    if spec.balance_loss:
        rows = kept if spec.balance_over == "sequence" else kept.reshape(1, -1)
        shares = _shares(routing).unflatten(0, rows.shape)
        summed = (shares * rows[..., None]).sum(1)
        counts = _counts(routing.chosen.unflatten(0, rows.shape), rows, spec.experts)
        tokens = rows.sum(1).clamp(min=1)
        found["balance"] = ((counts * summed).sum(-1) / tokens).sum() * (spec.experts / spec.top_k)
    if spec.z_loss:
        found["router_z"] = (routing.logits.logsumexp(-1).square() * kept.flatten()).sum()
    return found


def within_capacity(chosen: Tensor, valid: Tensor, spec: Experts) -> Tensor:
    """bool [N, k]: choices, in the order of their tokens, that find room in their expert; valid [N]. Padding takes no room."""
    taken = F.one_hot(chosen, spec.experts).flatten(0, 1) * valid.repeat_interleave(chosen.shape[1])[:, None]
    rank = (taken.cumsum(0) * taken).sum(-1)  # from 1
    assert spec.capacity is not None
    room = torch.ceil(valid.sum() * (spec.capacity * spec.top_k / spec.experts))
    return (rank <= room).view_as(chosen)


def _shares(routing: Routing) -> Tensor:
    """Scores as shares of a token that sum to one (DeepSeek-V3, equation 19)."""
    return routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)


def _counts(chosen: Tensor, kept: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen a row: chosen [B, T, k], kept [B, T] -> [B, E]."""
    weights = kept[..., None].expand(chosen.shape).flatten(1)
    return kept.new_zeros(chosen.shape[0], experts).scatter_add(1, chosen.flatten(1), weights)
