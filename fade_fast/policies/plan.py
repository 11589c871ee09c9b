"""Which middle tokens stay, and in which tier: scores and budgets to a plan.

The ranking and the budgets are those of `fade_ref.plan`, and the scores of keys those of `fade_ref.scores`:
the exception to the rule that fade_fast takes no numerics from fade_ref. A second copy would only repeat
them. This module adds what a running cache knows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fade_ref.config import FadeConfig
from fade_ref.plan import adaptive_plan, aggregate, plan
from fade_ref.scores import key_diff, key_norm
from fade_ref.tiers import Tier

from .scores import OBSERVERS, Observer


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


#: Policies that score without attention: StreamingLLM (arXiv 2309.17453), Knorm (2406.11430), KeyDiff
#: (2504.15364). Each gives float64 [B, 1 or H, n], larger is better.
SCORES: dict[str, Callable[[Candidates], Tensor]] = {
    "position": lambda c: (c.position - c.now).double(),
    "knorm": lambda c: key_norm(c.keys()),
    "keydiff": lambda c: key_diff(c.keys(), c.position >= 0),
}

#: Policies this package can run inside generate(), and who can share a plan.
SUPPORTED = (*SCORES, *OBSERVERS)
SCOPES = ("sequence", "layer", "head")


def scores(policy: str, c: Candidates) -> Tensor:
    """Scores of candidates, larger is better: float64 [B, 1 or H, n]. `ValueError` for a policy that is not
    `SUPPORTED`."""
    if policy not in SUPPORTED:
        raise ValueError(f"eviction_policy={policy!r}: one of {', '.join(SUPPORTED)} is supported here")
    score = SCORES.get(policy)
    found = score(c) if score else c.observer.score_candidates(c.attention_stats, c.position, c.now)
    return found


def choose(config: FadeConfig, c: Candidates, first: Tier) -> tuple[Tensor, Tensor]:
    """`(tiers, position)`: the tier of every candidate, int8 of the shape of `c.position`, and by what they
    are ordered.

    With plan_scope "layer" all rows share a plan, and both are [1, 1, n]: slot i must then be the same
    column in every row, and counts where any row has a token in it.
    """
    found, position, already_int2 = scores(config.eviction_policy, c), c.position, c.already_int2
    if config.plan_scope == "head":
        found = found.expand(position.shape)
    elif config.plan_scope == "sequence":
        found = aggregate(found, "sequence").unsqueeze(1)
    else:
        found = aggregate(found, "layer", (position >= 0).squeeze(1))[None, None]
        position, already_int2 = position.amax(0, keepdim=True), already_int2.any(0, keepdim=True)
    chosen = adaptive_plan if config.eviction_policy == "adaptive" else plan
    tiers = chosen(found, position, config.int4_budget, config.int2_budget, first, already_int2)
    if c.planned:
        c.planned(found, position, tiers)
    return tiers, position
