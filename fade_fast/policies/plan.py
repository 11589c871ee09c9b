"""Plans: which middle tokens stay, and in which tier. Scores and budgets determine a plan.

This module takes the ranking and the budgets from `fade_ref.plan`, and the scores of keys from
`fade_ref.scores`. This is an exception to the rule that fade_fast takes no numerics from fade_ref. A second
copy would only repeat the same code. This module adds the information of a running cache.
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


def averages_heads(config: FadeConfig) -> bool:
    """Return whether plans average scores over the heads of a layer, and so must know all of them."""
    return config.relocatable and config.plan_scope != "head" and config.eviction_policy != "position"


def sizes(config: FadeConfig, held: list[int], new: int) -> list[int] | None:
    """Return the number of tokens in each tier after `new` tokens join the `held` tokens.

    The result equals the sizes of the tiers in a `plan` for a batch without padding. It is None if the sizes
    depend on scores.
    """
    if config.eviction_policy == "adaptive":
        return None
    total = sum(held) + new
    high, low = (total if n is None else n for n in (config.int4_budget, config.int2_budget))
    first = min(high, held[0] + new)
    second = min(low, total - first)
    return [first, second] if len(held) == 2 else [first + second]


def kept(tiers: Tensor, position: Tensor, tier: Tier, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the tokens of a tier, oldest first.

    Returns `(index, real)` of shape [..., m]. m is the largest number of tokens in any row. `index` is int64
    and indexes the last dimension of `tiers`. `real` is False where a row has fewer than m tokens. `most` is
    m. If `most` is None, the host waits until the GPU has computed m.
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
    """The tokens that compete for the middle of a layer, in any order, and the data that policies need.

    Attributes:
        position: int32 [B, 1, n], the logical positions, negative where there is no token. The shape is
            [B, H, n] with plan_scope "head", because each head then keeps its own tokens.
        now: int32 [B, 1, 1], the position of the newest token of each row.
        already_int2: bool with the shape of `position`, True for tokens that are already INT2.
        keys: a function that returns the keys as attention reads them, [B, H, n, D], float32 or float64.
        observer, attention_stats: the statistics of the attention that the tokens received, if the policy
            needs them.
        planned: a function that receives scores, positions and tiers. None if there is no listener.
        all_heads: a function that extends scores [B, H, n] by the heads that other processes hold. None if
            this process holds all heads.
    """

    position: Tensor
    now: Tensor
    already_int2: Tensor
    keys: Callable[[], Tensor]
    observer: Observer | None = None
    attention_stats: dict[str, Tensor] = field(default_factory=dict)
    planned: Callable[[Tensor, Tensor, Tensor], None] | None = None
    all_heads: Callable[[Tensor], Tensor] | None = None


#: Policies that score without attention: StreamingLLM (arXiv 2309.17453), Knorm (arXiv 2406.11430) and
#: KeyDiff (arXiv 2504.15364). Each returns float64 [B, 1 or H, n]. A larger score is better.
SCORES: dict[str, Callable[[Candidates], Tensor]] = {
    "position": lambda c: (c.position - c.now).double(),
    "knorm": lambda c: key_norm(c.keys()),
    "keydiff": lambda c: key_diff(c.keys(), c.position >= 0),
}

#: The policies that this package can run inside generate(), and the scopes in which tokens share a plan.
SUPPORTED = (*SCORES, *OBSERVERS)
SCOPES = ("sequence", "layer", "head")


def scores(policy: str, c: Candidates) -> Tensor:
    """Return the scores of candidates, float64 [B, 1 or H, n]. A larger score is better.

    Raises `ValueError` for a policy that is not in `SUPPORTED`.
    """
    if policy not in SUPPORTED:
        raise ValueError(f"eviction_policy={policy!r}: one of {', '.join(SUPPORTED)} is supported here")
    score = SCORES.get(policy)
    found = score(c) if score else c.observer.score_candidates(c.attention_stats, c.position, c.now)
    return found


def choose(config: FadeConfig, c: Candidates, first: Tier) -> tuple[Tensor, Tensor]:
    """Choose the tier of every candidate.

    Returns `(tiers, position)`. `tiers` is int8 with the shape of `c.position`. `position` gives the order of
    the candidates. With plan_scope "layer" all rows share one plan, and both tensors are [1, 1, n]. Slot i
    must then belong to the same step index in every row. A slot counts if any row has a token in it.
    """
    found, position, already_int2 = scores(config.eviction_policy, c), c.position, c.already_int2
    if c.all_heads is not None and averages_heads(config):
        found = c.all_heads(found)
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
