"""Which middle tokens stay, and in which tier: scores and budgets to a plan, vectorised."""

import torch
from torch import Tensor

from fade_ref.tiers import Tier

from .importance import OBSERVERS, Observer, pool_neighbours

#: Policies this package can run inside generate().
SUPPORTED = ("position", *OBSERVERS)

HIGH_SHARE, KEEP_SHARE = 0.9, 0.99  # of the attention that the middle received: `adaptive`


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
    scores: Tensor,
    position: Tensor,
    int4_budget: int | None,
    int2_budget: int | None,
    first: Tier,
    spent: Tensor | None = None,
    adaptive: bool = False,
) -> Tensor:
    """Tier codes of the middle, int8 of the shape of `scores` [..., n].

    The best `int4_budget` candidates get tier `first`, the next `int2_budget` INT2, the rest are
    evicted; None is no limit. Padding is always evicted.

    Args:
        scores: float64 [..., n], larger is better. position: the same shape; negative where there is
            no token.
        spent: bool [..., n], tokens that are INT2 already: their finer bits are gone, so they never
            climb.
        adaptive: whether a token must also earn its tier by its share of all scores: tokens before
            which others hold at most `HIGH_SHARE` are high, up to `KEEP_SHARE` worth keeping. High
            ones get `first`; others worth keeping INT2, or `first` when INT2 is full (fade-kv 1.1.0,
            under budgets).
    """
    n = scores.shape[-1]
    high, low = (n if budget is None else budget for budget in (int4_budget, int2_budget))
    if adaptive and int4_budget is not None:
        high, low = _earned(scores, position, int4_budget, int2_budget)
    spent = torch.zeros_like(position, dtype=torch.bool) if spent is None else spent
    real = position >= 0
    finer = (rank(scores, position.masked_fill(spent, -1)) < high) & ~spent & real
    coarser = (rank(scores, position.masked_fill(finer, -1)) < low) & ~finer & real
    tiers = torch.full_like(position, Tier.EVICTED, dtype=torch.int8)
    return tiers.masked_fill_(finer, first).masked_fill_(coarser, Tier.INT2)


def _earned(scores: Tensor, position: Tensor, int4_budget: int, int2_budget: int | None):
    """How many tokens of each row earn the first tier, and how many INT2: see `plan`."""
    real = position >= 0
    mass = torch.where(real & (scores > 0), scores, 0.0)
    best = rank(scores, position).argsort(dim=-1)
    better = torch.nn.functional.pad(mass.gather(-1, best), (1, -1)).cumsum(-1)
    total, most = mass.sum(-1, keepdim=True), real.sum(-1, keepdim=True)
    high, keep = (
        (better <= share * total).sum(-1, keepdim=True).minimum(most) for share in (HIGH_SHARE, KEEP_SHARE)
    )
    if int2_budget is None:
        return high.clamp(max=int4_budget), position.shape[-1]
    keep = keep.clamp(max=int4_budget + int2_budget)
    first = high.maximum(keep - int2_budget).clamp(max=int4_budget)
    return first, keep - first


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


def scores(
    policy: str, position: Tensor, observer: Observer | None = None, received: dict[str, Tensor] | None = None
) -> Tensor:
    """Scores of middle tokens, larger is better, float64 [B, 1, n], as `position`.

    Args:
        policy: one of `SUPPORTED`; `ValueError` if it is not.
        position: logical positions, negative where there is no token.
        observer, received: what is known of the attention that the tokens received, where the
            policy asks. Heads count alike: their mean is taken (as TOVA's, arXiv 2401.06104).
    """
    if policy == "position":
        return position.double()
    if policy not in SUPPORTED:
        raise ValueError(f"eviction_policy={policy!r}: one of {', '.join(SUPPORTED)} is supported here")
    found = observer.score(received)
    if policy == "snapkv":
        found = pool_neighbours(found, position)
    # Sorted first: a sum in another order rounds differently, and that would break ties.
    return found.sort(dim=1).values.mean(1, keepdim=True)
