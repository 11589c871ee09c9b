"""From scores to tiers: the mean over those who share a plan, a ranking, and budgets.

`fade_fast` imports this module, as it imports `scores`, which says why.

A **plan** is one tier code a token; tokens are never reordered. Axes: `...` any batch dims, H KV heads,
n tokens in any order. `scores` are floats, larger is better. `position` is int32 or int64, negative at
padding and holes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .tiers import Tier

HIGH_SHARE, KEEP_SHARE = 0.9, 0.99  # of the attention that the middle received: `adaptive_plan`


def aggregate(scores: Tensor, scope: str, valid: Tensor | None = None) -> Tensor:
    """Scores [..., H, n] averaged over those who share a plan. The order of heads makes no difference.

    `scope` "head" leaves them as they are, [..., H, n]. "sequence" takes the mean over heads, [..., n], as
    TOVA does. "layer" takes the mean over heads and rows, [n]; a row counts where `valid`, bool [..., n]
    (None: everywhere). Raises `ValueError` for another scope.
    """
    if scope not in ("layer", "sequence", "head"):
        raise ValueError(f"plan_scope={scope!r}: 'layer', 'sequence' or 'head' is allowed")
    # Sorted first: a sum in another order rounds differently, and that would break ties.
    mean = scores if scope == "head" else scores.sort(dim=-2).values.mean(-2)
    if scope != "layer":
        return mean
    valid = torch.ones_like(mean, dtype=torch.bool) if valid is None else valid
    rows = torch.where(valid, mean, 0.0).reshape(-1, mean.shape[-1])
    return rows.sum(0) / valid.reshape(rows.shape).sum(0).clamp_min(1)


def rank(scores: Tensor, position: Tensor) -> Tensor:
    """Rank of each token, 0 for the best: int64 [..., n]; `scores` and `position` are [..., n].

    Among equal scores the newer token is better. NaN is worse than every number, and padding comes last.

    >>> rank(torch.tensor([0.5, 0.9, 0.5]), torch.tensor([0, 1, 2])).tolist()
    [2, 0, 1]
    """
    scores = scores.nan_to_num(nan=-torch.inf, neginf=torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(position < 0, -torch.inf)
    newest_first = position.argsort(dim=-1, descending=True, stable=True)
    best = scores.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    order = newest_first.gather(-1, best)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def plan(
    scores: Tensor,
    position: Tensor,
    int4_budget: int | None,
    int2_budget: int | None,
    first_tier: Tier = Tier.INT4,
    spent: Tensor | None = None,
) -> Tensor:
    """Tier codes, int8 [..., n]. The best `int4_budget` tokens get `first_tier`, the next `int2_budget`
    get INT2, and the rest are EVICTED.

    Args:
        scores, position: [..., n], ranked as in `rank`. Padding is EVICTED and uses no budget.
        int4_budget, int2_budget: tokens of a row; None is no limit.
        spent: bool [..., n], tokens that are INT2 already. Their finer bits are lost, so they never get
            `first_tier`. None: no token is.

    Raises `ValueError` for shapes or dtypes that do not fit, and for a negative budget.

    >>> plan(torch.tensor([0.5, 0.9, 0.5, 0.1]), torch.arange(4), 2, 1).tolist()  # EVICTED is 6
    [4, 2, 2, 6]
    """
    _check(scores, position, int4_budget, int2_budget)
    n = scores.shape[-1]
    first, second = (n if budget is None else budget for budget in (int4_budget, int2_budget))
    return _assign(scores, position, first, second, first_tier, spent)


def adaptive_plan(
    scores: Tensor,
    position: Tensor,
    int4_budget: int | None,
    int2_budget: int | None,
    first_tier: Tier = Tier.INT4,
    spent: Tensor | None = None,
) -> Tensor:
    """`plan`, but a token must also earn its tier by its share of the attention mass, `scores`.

    A token is high while the better ones hold at most HIGH_SHARE of the row's mass. It is worth keeping
    while they hold at most KEEP_SHARE. High tokens get `first_tier`. Others worth keeping get INT2, or
    `first_tier` when INT2 is full. Both stay within the budgets. Without a limit nothing is evicted; without
    any mass, this is `plan`. Source: fade-kv 1.1.0, which splits by count, beyond its budgets.

    >>> adaptive_plan(torch.tensor([91.0, 8.5, 0.5]), torch.arange(3), 2, 2).tolist()
    [2, 4, 6]
    """
    _check(scores, position, int4_budget, int2_budget)
    if int4_budget is None:
        return plan(scores, position, None, int2_budget, first_tier, spent)
    real = position >= 0
    mass = torch.where(real & (scores > 0), scores.double(), 0.0)
    best_first = rank(scores, position).argsort(dim=-1)
    better = F.pad(mass.gather(-1, best_first), (1, -1)).cumsum(-1)  # mass of those that rank better
    total, most = mass.sum(-1, keepdim=True), real.sum(-1, keepdim=True)
    high = (better <= HIGH_SHARE * total).sum(-1, keepdim=True).minimum(most)
    kept = (better <= KEEP_SHARE * total).sum(-1, keepdim=True).minimum(most)
    if int2_budget is None:
        first, second = high.clamp(max=int4_budget), position.shape[-1]
    else:
        kept = kept.clamp(max=int4_budget + int2_budget)
        first = high.maximum(kept - int2_budget).clamp(max=int4_budget)
        second = kept - first
    return _assign(scores, position, first, second, first_tier, spent)


def _assign(scores, position, first, second, first_tier: Tier, spent: Tensor | None) -> Tensor:
    """The best `first` tokens that are not `spent` to `first_tier`, the next `second` to INT2."""
    real = position >= 0
    spent = torch.zeros_like(real) if spent is None else spent
    high = (rank(scores, position.masked_fill(spent, -1)) < first) & ~spent & real
    tiers = torch.full_like(position, Tier.EVICTED, dtype=torch.int8).masked_fill_(high, first_tier)
    if isinstance(second, int) and not second:  # the usual case, which spares a ranking
        return tiers
    low = (rank(scores, position.masked_fill(high, -1)) < second) & ~high & real
    return tiers.masked_fill_(low, Tier.INT2)


def _check(scores: Tensor, position: Tensor, *budgets: int | None) -> None:
    if scores.shape != position.shape or position.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"scores {scores.shape} for {position.dtype} position {position.shape}")
    if any(budget is not None and budget < 0 for budget in budgets):
        raise ValueError(f"negative budget: {budgets}")
