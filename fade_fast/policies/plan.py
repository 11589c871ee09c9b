"""Which middle tokens stay, and in which tier: scores and budgets to a plan, vectorised."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fade_ref.config import FadeConfig
from fade_ref.tiers import Tier

from .scores import OBSERVERS, Observer

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
    already_int2: Tensor | None = None,
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
    already_int2 = torch.zeros_like(position, dtype=torch.bool) if already_int2 is None else already_int2
    real = position >= 0
    finer = (rank(scores, position.masked_fill(already_int2, -1)) < high) & ~already_int2 & real
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


def sizes(config: FadeConfig, held: list[int], new: int) -> list[int] | None:
    """Tokens of each tier once `new` ones have joined those `held`: what `plan` comes to, for a batch
    without padding. None where that depends on scores."""
    if config.eviction_policy == "adaptive":
        return None
    total = sum(held) + new
    high, low = (total if n is None else n for n in (config.int4_budget, config.int2_budget))
    first = min(high, held[0] + new)
    second = min(low, total - first)
    return [first, second] if len(held) == 2 else [first + second]


def kept(tiers: Tensor, position: Tensor, tier: Tier, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Where a tier's tokens are, oldest first.

    Returns `(index, real)` of shape [..., m], m the most any row has: `index` int64 into the last
    dimension of `tiers`, and `real` False where a row has fewer than m. Without `most`, which is m,
    the host waits for it.
    """
    chosen = tiers == tier
    counts = chosen.sum(-1, keepdim=True)
    if most is None:
        most = int(counts.max()) if counts.numel() else 0
    last = torch.iinfo(position.dtype).max
    index = position.masked_fill(~chosen, last).argsort(dim=-1, stable=True)[..., :most]
    return index, torch.arange(most, device=tiers.device) < counts


@dataclass(frozen=True)
class Candidates:
    """The tokens that compete for the middle of a layer, in any order, and all that policies ask of them.

    Attributes:
        position: int32 [B, 1, n], logical, negative where there is no token; [B, H, n] with
            plan_scope "head", where each head has its own survivors.
        now: int32 [B, 1, 1], position of each row's newest token.
        spent: bool of the shape of `position`, tokens that are INT2 already.
        keys: gives the keys as they are read, [B, H, n, D] of float32 or float64.
        observer, received: what is known of the attention that they received, where the policy asks.
        planned: is told scores, positions and tiers, where anything listens.
    """

    position: Tensor
    now: Tensor
    already_int2: Tensor
    keys: Callable[[], Tensor]
    observer: Observer | None = None
    attention_stats: dict[str, Tensor] = field(default_factory=dict)
    planned: Callable[[Tensor, Tensor, Tensor], None] | None = None


def _key_norm(c: Candidates) -> Tensor:
    return -torch.linalg.vector_norm(c.keys(), dim=-1, dtype=torch.float64)


def _key_diff(c: Candidates) -> Tensor:
    keys, real = c.keys().double(), (c.position >= 0).unsqueeze(-1)
    unit = torch.nn.functional.normalize(keys, dim=-1).masked_fill(~real, 0.0)
    anchor = unit.sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)
    return -torch.nn.functional.cosine_similarity(keys, anchor, dim=-1)


#: Policies that score without attention: StreamingLLM (arXiv 2309.17453), Knorm (2406.11430), KeyDiff
#: (2504.15364). Each gives float64 [B, 1 or H, n], larger is better.
SCORES: dict[str, Callable[[Candidates], Tensor]] = {
    "position": lambda c: (c.position - c.now).double(),
    "knorm": _key_norm,
    "keydiff": _key_diff,
}

#: Policies this package can run inside generate(), and who can share a plan.
SUPPORTED = (*SCORES, *OBSERVERS)
SCOPES = ("sequence", "layer", "head")


def scores(policy: str, c: Candidates, scope: str = "sequence") -> Tensor:
    """Scores of candidates, larger is better, float64 [B, 1, n]: heads count alike, by their mean.

    With scope "head" each has its own, [B, H, n]. `ValueError` for a policy that is not `SUPPORTED`.
    """
    if policy not in SUPPORTED:
        raise ValueError(f"eviction_policy={policy!r}: one of {', '.join(SUPPORTED)} is supported here")
    score = SCORES.get(policy)
    found = score(c) if score else c.observer.score_candidates(c.attention_stats, c.position, c.now)
    if scope == "head":
        return found.expand(c.position.shape)
    # Sorted first: a sum in another order rounds differently, and that would break ties.
    return found.sort(dim=1).values.mean(1, keepdim=True)


def choose(config: FadeConfig, c: Candidates, first: Tier) -> tuple[Tensor, Tensor]:
    """`(tiers, position)`: the tier of every candidate, int8 of the shape of `c.position`, and by what they
    are ordered.

    With plan_scope "layer" all rows share a plan, and both are [1, 1, n]: slot i must then be the same
    column in every row, and counts where any row has a token in it.
    """
    found, position, already_int2 = (
        scores(config.eviction_policy, c, config.plan_scope),
        c.position,
        c.already_int2,
    )
    if config.plan_scope == "layer":
        real = position >= 0
        found = torch.where(real, found, 0.0).sum(0, keepdim=True) / real.sum(0, keepdim=True).clamp_min(1)
        position, already_int2 = position.amax(0, keepdim=True), already_int2.any(0, keepdim=True)
    budgets = config.int4_budget, config.int2_budget
    adaptive = config.eviction_policy == "adaptive"
    tiers = plan(found, position, *budgets, first, already_int2, adaptive)
    if c.planned:
        c.planned(found, position, tiers)
    return tiers, position
