"""Which token gets which tier: a score for each token, then a ranking under budgets.

A score (`SCORES`, one function a policy) says how much a token is worth keeping; `plan` gives the
best tokens the best tiers. Nothing is ever reordered: a plan is one tier code a slot. Axes: `...`
any batch dims, H KV heads, n middle tokens, D head_dim. Scores are float64, larger is better.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from . import importance as imp
from .config import FadeConfig
from .tiers import INTEGER_TIERS, Tier

HIGH_SHARE, KEEP_SHARE = 0.9, 0.99  # of the attention that the middle received: `adaptive_plan`
MLP = {"net.0.weight": (32, 4), "net.2.weight": (32, 32), "net.4.weight": (1, 32)}
MLP |= {name.replace("weight", "bias"): shape[:1] for name, shape in MLP.items()}  # 1,249 numbers


@dataclass(frozen=True)
class Candidates:
    """The middle tokens of one layer, and all that a policy may know about them.

    Args:
        position: int64 [..., n], or [..., H, n] for plan_scope "head", where each head has its own
            survivors. Logical; -1 at padding and holes, which never get a place.
        now: position of the cache's newest token: int, or int64 [..., 1] ([..., 1, 1] with H).
        importance: attention received; every policy but position and the key-based needs it.
        keys, values: [..., H, n, D], rotated to their positions, for the key-based policies.
        queries: mean and covariance of future queries, see `importance.expected_attention`.
        spent: bool, shape of `position`: tokens that are INT2 already, see `plan`; None: none is.
        layer, layers, weights: this layer's index, their number, `MLP` tensors; for learned.

    Raises `ValueError`: position not int64, below -1 or after `now`; numbers of tokens that differ.
    """

    position: Tensor
    now: int | Tensor
    importance: imp.Importance | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    queries: tuple[Tensor, Tensor] | None = None
    spent: Tensor | None = None
    layer: int = 0
    layers: int = 1
    weights: dict[str, Tensor] | None = None

    def __post_init__(self):
        if self.position.dtype != torch.int64 or (self.position < -1).any() or (self.age < 0).any():
            raise ValueError(f"position must be int64 from -1 to now={self.now}")
        counts = {x.shape[-2] for x in (self.keys, self.values) if x is not None}
        counts |= {self.importance.mass.shape[-1]} if self.importance else set()
        if counts - {self.position.shape[-1]}:
            raise ValueError(f"{self.position.shape[-1]} positions, but {counts} tokens")

    @property
    def age(self) -> Tensor:
        """How many tokens are newer: int64, shape of `position`; meaningless at holes."""
        return torch.as_tensor(self.now) - self.position

    def need(self, field: str):
        """The field's value; `ValueError` if it was not given."""
        if getattr(self, field) is None:
            raise ValueError(f"this eviction_policy needs Candidates.{field}")
        return getattr(self, field)


def _h2o(c: Candidates) -> Tensor:
    # H2O ranks by the sum (arXiv 2306.14048, algorithm 1). Divided by the queries that could see
    # the token, all that merely came early no longer beats a late heavy hitter.
    return c.need("importance").mass / c.importance.queries.clamp(min=1)


def features(c: Candidates) -> Tensor:
    """What `learned` sees of each token, in [0, 1]: [..., H, n, 4]. Source: fade-kv 1.1.0.

    0: position, 1: h2o's score, both min-max scaled over the candidates, 0 if all are equal;
    2: layer / (layers - 1); 3: age / now. `position` must have the axis H or 1, as in `SCORES`.
    """
    hole = (c.position < 0).unsqueeze(-1)
    x = torch.stack(torch.broadcast_tensors(c.position.double(), _h2o(c)), dim=-1)
    low = x.masked_fill(hole, torch.inf).amin(-2, keepdim=True)
    high = x.masked_fill(hole, -torch.inf).amax(-2, keepdim=True)
    depth = torch.full_like(x[..., 0], c.layer / max(c.layers - 1, 1))
    age = (c.age.double() / torch.as_tensor(c.now).clamp(min=1)).expand(depth.shape)
    scaled = torch.where(low == high, 0.0, (x - low) / (high - low))
    return torch.cat([scaled, torch.stack([depth, age], dim=-1)], dim=-1).clamp(0, 1)


def _learned(c: Candidates) -> Tensor:
    # fade-kv's keep-probability: an MLP 4-32-32-1 with ReLU, ReLU, sigmoid; its own names.
    if {k: tuple(v.shape) for k, v in c.need("weights").items()} != MLP:
        raise ValueError(f"weights must have the names and shapes {MLP}")
    w, x = {k: v.double() for k, v in c.weights.items()}, features(c)
    x = F.linear(x, w["net.0.weight"], w["net.0.bias"]).relu()
    x = F.linear(x, w["net.2.weight"], w["net.2.bias"]).relu()
    return F.linear(x, w["net.4.weight"], w["net.4.bias"]).sigmoid().squeeze(-1)


#: The score of each policy: [..., H or 1, n], the shape that `position` must have here (`make_plan`
#: adds the axis). A field that is missing raises `ValueError`.
SCORES: dict[str, Callable[[Candidates], Tensor]] = {
    "position": lambda c: -c.age.double(),  # StreamingLLM, arXiv 2309.17453 section 3.2
    "h2o": _h2o,
    "ema": lambda c: c.need("importance").ema,  # fade-kv 1.1.0
    "adaptive": lambda c: c.need("importance").ema,  # fade-kv 1.1.0; see `adaptive_plan`
    "learned": _learned,
    # SnapKV, arXiv 2404.14469: mean over the window, pooled over 5 neighbours as in kvpress 0.5.5.
    "snapkv": lambda c: imp.pool_neighbours(c.need("importance").window.nanmean(-2), c.position),
    "tova": lambda c: c.need("importance").window[..., -1, :],  # arXiv 2401.06104, but per head
    "knorm": lambda c: imp.key_norm(c.need("keys")),
    "keydiff": lambda c: imp.key_diff(c.need("keys"), c.position >= 0),
    "expected_attention": lambda c: imp.expected_attention(
        c.need("keys"), c.need("values"), *c.need("queries"), c.position >= 0
    ),
    "hybrid": lambda c: c.need("importance").hybrid,  # akv-cache 1.0.0
}


def aggregate(scores: Tensor, scope: str, valid: Tensor | None = None) -> Tensor:
    """Scores [..., H, n] of those who share a plan, the same in any order of heads.

    "head": as they are; "sequence": mean over heads (as TOVA's), [..., n]; "layer": and over rows,
    [n], each slot over those where `valid` (bool [..., n]; None: all). `ValueError`: another scope.
    """
    if scope not in ("layer", "sequence", "head"):
        raise ValueError(f"plan_scope={scope!r}: 'layer', 'sequence' or 'head' is allowed")
    # Sorted first: a sum in another order rounds differently, and that would break ties.
    mean = scores if scope == "head" else scores.sort(dim=-2).values.mean(-2)
    if scope != "layer":
        return mean
    valid = torch.ones_like(mean).bool() if valid is None else valid
    rows = torch.where(valid, mean, 0.0).reshape(-1, mean.shape[-1])
    return rows.sum(0) / valid.reshape(rows.shape).sum(0).clamp(min=1)


def _rank(scores: Tensor, position: Tensor) -> Tensor:
    """Place of each token, best 0: real before holes, numbers before NaN, by score, by newness."""
    if scores.shape != position.shape or position.dtype != torch.int64:
        raise ValueError(f"scores {scores.shape} for {position.dtype} position {position.shape}")
    order = position.argsort(dim=-1, descending=True, stable=True)
    for key in (torch.where(scores.isnan(), 0.0, scores), ~scores.isnan(), position >= 0):
        key = key.double().gather(-1, order)
        order = order.gather(-1, key.argsort(dim=-1, descending=True, stable=True))
    return order.argsort(dim=-1)


def _assign(scores, position, first, second, first_tier: Tier, spent: Tensor | None) -> Tensor:
    """The best `first` tokens that are not `spent` to `first_tier`, the next `second` to INT2."""
    spent = torch.zeros_like(position).bool() if spent is None else spent
    high = (_rank(scores, position.masked_fill(spent, -1)) < first) & ~spent & (position >= 0)
    low = (_rank(scores, position.masked_fill(high, -1)) < second) & ~high & (position >= 0)
    tiers = torch.full(position.shape, Tier.EVICTED, dtype=torch.int8)
    return tiers.masked_fill(high, first_tier).masked_fill(low, Tier.INT2)


def plan(scores, position, int4_budget, int2_budget, first_tier=Tier.INT4, spent=None) -> Tensor:
    """Tier codes, int8 [..., n]: the best `int4_budget` tokens, then `int2_budget`, then EVICTED.

    Of equal `scores` [..., n] the older token loses; NaN is worst. `position` int64 [..., n]; -1
    (padding, hole) is EVICTED and uses no budget, which each row has for itself. A budget of None
    is no limit. `spent`, bool [..., n], marks tokens that are INT2 already and cannot climb: their
    finer bits are gone. `ValueError`: shapes or dtypes that do not fit, a negative budget.

    >>> plan(torch.tensor([0.5, 0.9, 0.5, 0.1]), torch.arange(4), 2, 1).tolist()  # EVICTED is 6
    [4, 2, 2, 6]
    """
    if min(int4_budget or 0, int2_budget or 0) < 0:
        raise ValueError(f"negative budget: {int4_budget}, {int2_budget}")
    n = scores.shape[-1]
    first, second = (n if budget is None else budget for budget in (int4_budget, int2_budget))
    return _assign(scores, position, first, second, first_tier, spent)


def adaptive_plan(scores, position, int4_budget, int2_budget, first_tier=Tier.INT4, spent=None) -> Tensor:
    """`plan`, but a token must also earn its tier by its share of the attention mass, `scores`.

    A token is high while those better than it hold at most HIGH_SHARE of the row's mass, and worth
    keeping up to KEEP_SHARE. High ones go to `first_tier`, others worth keeping to INT2, or to
    `first_tier` when INT2 is full, all within the budgets. Without a limit nothing is evicted, and
    without any mass, this is `plan`. Source: fade-kv, which splits by count, beyond its budgets.

    >>> adaptive_plan(torch.tensor([91.0, 8.5, 0.5]), torch.arange(3), 2, 2).tolist()
    [2, 4, 6]
    """
    limits = plan(scores, position, int4_budget, int2_budget, first_tier, spent)
    if int4_budget is None:
        return limits
    valid = position >= 0
    mass = torch.where(valid & (scores > 0), scores.double(), 0.0)
    best_first = _rank(scores, position).argsort(dim=-1)
    better = F.pad(mass.gather(-1, best_first), (1, -1)).cumsum(-1)
    shares = (better <= s * mass.sum(-1, keepdim=True) for s in (HIGH_SHARE, KEEP_SHARE))
    high, kept = (s.sum(-1, keepdim=True).minimum(valid.sum(-1, keepdim=True)) for s in shares)
    if int2_budget is None:
        first, second = high.clamp(max=int4_budget), position.shape[-1]
    else:
        kept = kept.clamp(max=int4_budget + int2_budget)
        first = high.maximum(kept - int2_budget).clamp(max=int4_budget)
        second = kept - first
    return _assign(scores, position, first, second, first_tier, spent)


def make_plan(config: FadeConfig, candidates: Candidates) -> Tensor:
    """The tier of every candidate under `config`: int8, the shape of `candidates.position`.

    With plan_scope "layer", all rows that have a token in a slot have it at one age. `ValueError`:
    a field that the policy needs is missing, or shapes do not fit.

    >>> make_plan(FadeConfig(int4_budget=2), Candidates(torch.arange(4, 8), now=20)).tolist()
    [6, 6, 2, 2]
    """
    c, position, scope = candidates, candidates.position, config.plan_scope
    if not position.numel():
        return torch.zeros(position.shape, dtype=torch.int8)
    if scope != "head":  # the axis H, which all heads share
        c = replace(c, position=position.unsqueeze(-2), now=torch.as_tensor(c.now).unsqueeze(-1))
    scores = aggregate(SCORES[config.eviction_policy](c), scope, position >= 0)
    spent = c.spent
    if scope == "layer":  # in the order of the row that has the longest history
        position = position.reshape(-1, position.shape[-1]).amax(0)
        spent = spent if spent is None else spent.reshape(-1, spent.shape[-1]).any(0)
    first_tier = INTEGER_TIERS[max(config.middle_k_bits, config.middle_v_bits)]
    chosen = adaptive_plan if config.eviction_policy == "adaptive" else plan
    tiers = chosen(scores, position, config.int4_budget, config.int2_budget, first_tier, spent)
    return tiers.masked_fill(candidates.position < 0, Tier.EVICTED)
