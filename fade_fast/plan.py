"""Which middle tokens stay, and in which tier: scores and budgets to a plan, vectorised."""

import torch
from torch import Tensor

from fade_ref.tiers import Tier

#: Policies this package can run inside generate().
SUPPORTED = ("position",)


def rank(scores: Tensor, position: Tensor) -> Tensor:
    """Rank of each candidate, 0 for the best; int64 [..., n], as `scores` and `position`.

    Ties go to the newer token, NaN scores lose to all others, and padding (`position` < 0) comes
    last. The candidates may stand in any order.
    """
    scores = scores.nan_to_num(nan=-torch.inf, neginf=torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(position < 0, -torch.inf)
    newest_first = position.argsort(dim=-1, descending=True, stable=True)
    best = scores.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    order = newest_first.gather(-1, best)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def plan(
    scores: Tensor, position: Tensor, int4_budget: int | None, int2_budget: int | None, first: Tier
) -> Tensor:
    """Tier codes of the middle, int8 of the shape of `scores` [..., n].

    The best `int4_budget` candidates get tier `first`, the next `int2_budget` INT2, the rest are
    evicted; None is no limit. Padding is always evicted.
    """
    place, n = rank(scores, position), scores.shape[-1]
    high = n if int4_budget is None else int4_budget
    low = n if int2_budget is None else high + int2_budget
    tiers = torch.full_like(place, Tier.EVICTED, dtype=torch.int8)
    tiers[place < low] = Tier.INT2
    tiers[place < high] = first
    return tiers.masked_fill(position < 0, Tier.EVICTED)


def kept(tiers: Tensor, position: Tensor, tier: Tier) -> tuple[Tensor, Tensor]:
    """Where a tier's tokens are, oldest first.

    Returns `(index, real)` of shape [..., m], m the most any row has: `index` int64 into the last
    dimension of `tiers`, and `real` False where a row has fewer than m.
    """
    chosen = tiers == tier
    counts = chosen.sum(-1, keepdim=True)
    most = int(counts.max()) if counts.numel() else 0
    last = torch.iinfo(position.dtype).max
    index = position.masked_fill(~chosen, last).argsort(dim=-1, stable=True)[..., :most]
    return index, torch.arange(most, device=tiers.device) < counts


def scores(policy: str, position: Tensor) -> Tensor:
    """Scores of middle tokens, larger is better, float64 of the shape of `position` [..., n]."""
    if policy == "position":
        return position.double()
    raise ValueError(f"eviction_policy={policy!r}: one of {', '.join(SUPPORTED)} is supported here")
