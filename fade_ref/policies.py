"""Policies: each scores the middle tokens, and `plan` gives the best tokens the best tiers.

Axes: `...` any batch dims, H KV heads, n middle tokens, D head_dim. Scores are float64, larger is better.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import baselines, scores
from . import importance as imp
from .config import FadeConfig
from .moved import lookup
from .plan import adaptive_plan, aggregate, plan
from .scores import MLP
from .tiers import Tier, first_tier


@dataclass(frozen=True)
class Candidates:
    """The middle tokens of one layer, and all that a policy may know about them.

    Args:
        position: int64 [..., n], or [..., H, n] for plan_scope "head", where each head has its own survivors.
            Logical; -1 at padding and holes, which never get a place.
        now: position of the newest token of the cache: int, or int64 [..., 1] ([..., 1, 1] with H).
        importance: attention that the tokens received, for policies that rank by it.
        keys, values: [..., H, n, D], keys rotated to their positions, for policies that rank by them.
        queries: mean and covariance of future queries, see `baselines.expected_attention`.
        spent: bool, shape of `position`: tokens that are INT2 already, see `plan.plan`. None: no token is.
        layer, layers, weights: index of this layer, number of layers, and `MLP` tensors, for `learned`.

    Raises `ValueError` for a position that is not int64, below -1 or after `now`, and for numbers of tokens
    that differ.
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
        """Number of newer tokens: int64, shape of `position`; meaningless at holes."""
        return torch.as_tensor(self.now) - self.position

    def need(self, field: str) -> Any:
        """The value of a field. Raises `ValueError` if it was not given."""
        if getattr(self, field) is None:
            raise ValueError(f"this eviction_policy needs Candidates.{field}")
        return getattr(self, field)


def _h2o(c: Candidates) -> Tensor:
    # H2O ranks by the sum (arXiv 2306.14048, algorithm 1). An early token has a large sum because many
    # queries could see it, so the sum is divided by their number.
    return c.need("importance").mass / c.importance.queries.clamp(min=1)


def features(c: Candidates) -> Tensor:
    """What `learned` sees of each token, in [0, 1]: [..., H, n, 4], see `scores.features`.

    `position` must have the axis H or 1, as in `SCORES`.
    """
    return scores.features(_h2o(c), c.position, torch.as_tensor(c.now), c.layer / max(c.layers - 1, 1))


def _learned(c: Candidates) -> Tensor:
    if {k: tuple(v.shape) for k, v in c.need("weights").items()} != MLP:
        raise ValueError(f"weights must have the names and shapes {MLP}")
    return scores.keep_probability(features(c), {k: v.double() for k, v in c.weights.items()})


#: The score of each policy: [..., H or 1, n]. `position` must have this axis, which `make_plan` adds. A
#: missing field raises `ValueError`.
SCORES: dict[str, Callable[[Candidates], Tensor]] = {
    "position": lambda c: -c.age.double(),  # StreamingLLM, arXiv 2309.17453 section 3.2
    "h2o": _h2o,
    "ema": lambda c: c.need("importance").ema,  # fade-kv 1.1.0
    "adaptive": lambda c: c.need("importance").ema,  # fade-kv 1.1.0; see `adaptive_plan`
    "learned": _learned,
    # SnapKV, arXiv 2404.14469: mean over the window, pooled over 5 neighbors.
    "snapkv": lambda c: scores.pool_neighbors(c.need("importance").window.nanmean(-2), c.position),
    "tova": lambda c: c.need("importance").window[..., -1, :],  # arXiv 2401.06104, but per head
    "knorm": lambda c: scores.key_norm(c.need("keys")),
    "keydiff": lambda c: scores.key_diff(c.need("keys"), c.position >= 0),
    "expected_attention": lambda c: baselines.expected_attention(
        c.need("keys"), c.need("values"), *c.need("queries"), c.position >= 0
    ),
    "hybrid": lambda c: c.need("importance").hybrid,  # akv-cache 1.0.0
}


def make_plan(config: FadeConfig, candidates: Candidates) -> Tensor:
    """The tier of every candidate under `config`: int8, the shape of `candidates.position`.

    With plan_scope "layer", a slot must be of the same age in all rows that have a token there. Raises
    `ValueError` if a field that the policy needs is missing, and for shapes that do not fit.

    >>> make_plan(FadeConfig(int4_budget=2), Candidates(torch.arange(4, 8), now=20)).tolist()
    [6, 6, 2, 2]
    """
    c, position, scope = candidates, candidates.position, config.plan_scope
    if not position.numel():
        return torch.zeros(position.shape, dtype=torch.int8)
    if scope != "head":  # the axis H, which all heads share
        c = replace(c, position=position.unsqueeze(-2), now=torch.as_tensor(c.now).unsqueeze(-1))
    score = aggregate(SCORES[config.eviction_policy](c), scope, position >= 0)
    spent = c.spent
    if scope == "layer":  # in the order of the row that has the longest history
        position = position.reshape(-1, position.shape[-1]).amax(0)
        spent = spent if spent is None else spent.reshape(-1, spent.shape[-1]).any(0)
    finest = first_tier(config.middle_k_bits, config.middle_v_bits)
    chosen = adaptive_plan if config.eviction_policy == "adaptive" else plan
    tiers = chosen(score, position, config.int4_budget, config.int2_budget, finest, spent)
    return tiers.masked_fill(candidates.position < 0, Tier.EVICTED)


__getattr__ = lookup(__name__)
