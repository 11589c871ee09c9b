"""Plans from given scores, and what the specification's other policies ask for.

Both packages share one ranking (`fade_ref.plan`), so it is compared with a plain sort of Python's.
"""

import itertools
import math

import torch

from fade_fast.policies import plan as fast
from fade_ref import importance, policies, scores
from fade_ref.config import POLICIES, FadeConfig
from fade_ref.policies import Candidates
from fade_ref.tiers import Tier

from ..case import Case, Draw, Found
from . import heads
from .refusals import refused_config

BUDGETS = list(itertools.product((None, 0, 1, 7, 1000), (None, 0, 3, 1000)))
SCORES = {
    "normal": lambda draw, size: draw.normal(*size),
    "ties everywhere": lambda draw, size: torch.zeros(size, dtype=torch.float64),
    "many ties": lambda draw, size: draw.integers(0, 3, *size).double(),
    "NaN and infinities": lambda draw, size: torch.tensor(
        [0.5, torch.nan, torch.inf, -torch.inf, -1.0], dtype=torch.float64
    )[draw.integers(0, 5, *size)],
    "denormals": lambda draw, size: draw.integers(-3, 4, *size).double() * 5e-324,
    "neighbouring numbers": lambda draw, size: 1 + draw.integers(0, 4, *size).double() * 2.0**-52,
}


def collect() -> list[Case]:
    found = []
    covers = (f"tier {Tier.EVICTED.name}", f"tier {Tier.FP16.name}")
    for name in SCORES:
        for n in (0, 1, 2, 63, 64, 65):
            found.append(Case("plans", f"from given scores, {name}", f"n{n}", _given(name, n), covers))
    for policy in dict.fromkeys([*POLICIES, *policies.SCORES]):
        if policy in fast.SUPPORTED:
            continue  # a trace in `life` covers this policy
        found.append(Case("plans", "spec only", policy, _spec_only(policy), (f"policy {policy}",)))
    found.append(Case("plans", "from positions", "position", _position, ("policy position",)))
    return found + heads.collect()


def _positions(draw: Draw, rows: int, n: int) -> torch.Tensor:
    """Positions [rows, 1, n] in random order, with some padding."""
    order = torch.stack([torch.randperm(n, generator=draw.generator) for _ in range(rows)])
    return order.masked_fill(draw.chance(0.2, rows, n), -1)[:, None]


def sorted_plan(scores: list[float], position: list[int], int4: int | None, int2: int | None) -> list[Tier]:
    """The plan of one row, by a sort: better is a number, then the higher score, then the newer token."""
    real = [i for i, p in enumerate(position) if p >= 0]
    number = [not math.isnan(x) for x in scores]
    real.sort(key=lambda i: (number[i], scores[i] if number[i] else 0.0, position[i]), reverse=True)
    int4 = len(real) if int4 is None else int4
    int2 = len(real) if int2 is None else int2
    tiers = [Tier.EVICTED] * len(scores)
    for place, i in enumerate(real[: int4 + int2]):
        tiers[i] = Tier.INT4 if place < int4 else Tier.INT2
    return tiers


def _sorted(scores: torch.Tensor, position: torch.Tensor, int4: int | None, int2: int | None) -> torch.Tensor:
    """`sorted_plan` of rows [rows, 1, n]: int8."""
    rows = zip(scores[:, 0].tolist(), position[:, 0].tolist())
    return torch.tensor([[sorted_plan(*row, int4, int2)] for row in rows], dtype=torch.int8)


def _given(name, n):
    def run(found: Found, seed: int):
        for round_ in range(4):
            draw = Draw(seed + round_)
            position = _positions(draw, 3, n)
            given = SCORES[name](draw, (3, 1, n))
            budgets = BUDGETS if n else [(1, 1)]
            exact = {pair: _sorted(given, position, *pair) for pair in [*budgets, (n // 2, n // 4)]}
            for dtype in (torch.int64, torch.int32):
                there = given.to(found.device), position.to(dtype).to(found.device)
                for high, low in budgets:
                    ours = fast.plan(*there, high, low, Tier.INT4)
                    found.same("plan", ours, exact[high, low], f"budgets {high}, {low}")
                tiers = exact[n // 2, n // 4]
                for tier in (Tier.INT4, Tier.INT2):
                    _kept(found, tiers, position, there[1], tier)

    return run


def _kept(found: Found, tiers, position, there, tier) -> None:
    """Check the indices of the tokens of a tier. The oldest token is first."""
    index, real = fast.kept(tiers.to(found.device), there, tier)
    index, real = index.cpu(), real.cpu()
    for row in range(len(tiers)):
        at = position[row, 0][tiers[row, 0] == tier].sort().values
        ours = position[row, 0][index[row, 0][real[row, 0]]]
        found.same("plan", ours, at, f"kept in {tier.name}")


def _position(found: Found, seed: int):
    """Compare the policy as generate() runs it with the plan of the specification."""
    for n, high, low in ((40, 10, 0), (40, 10, 6), (40, 0, 5), (40, 100, 0), (40, 10, None)):
        draw = Draw(seed + n + high)
        position = _positions(draw, 3, n)[:, 0]
        config = FadeConfig(int4_budget=high, int2_budget=low)
        exact = policies.make_plan(config, Candidates(position, now=n))
        there = position[:, None].to(found.device)
        now = there.amax(-1, keepdim=True)
        rivals = fast.Candidates(there, now, torch.zeros_like(there, dtype=torch.bool), lambda: None)
        ours = fast.plan(fast.SCORES["position"](rivals), there, high, low, Tier.INT4)
        found.same("plan", ours[:, 0], exact, f"budgets {high}, {low}")


def _spec_only(policy):
    """fade_fast refuses the policy by name. A digest of the specified plan allows comparing two machines."""

    def run(found: Found, seed: int):
        refused_config(found, "eviction_policy", policy, int4_budget=8)
        exact = policies.make_plan(
            FadeConfig(int4_budget=12, int2_budget=6, eviction_policy=policy), _candidates(Draw(seed))
        )
        found.bits("plan", exact)
        counts = [(exact == tier).sum(-1).max() for tier in (Tier.INT4, Tier.INT2)]
        found.holds("plan", counts[0] <= 12 and counts[1] <= 6 and counts[0] > 0, "budgets are kept")

    return run


def _candidates(draw: Draw, rows=2, heads=2, n=40, dim=8) -> Candidates:
    """Candidates with all inputs that a policy may need."""
    position = torch.arange(n).expand(rows, -1).masked_fill(draw.chance(0.1, rows, n), -1)
    state = importance.empty(rows, heads)
    p = draw.uniform(rows, heads, 5, n) / n
    state = importance.observe(state, p, (position >= 0)[:, None].expand(-1, 5, -1))
    keys, values = draw.normal(rows, heads, n, dim), draw.normal(rows, heads, n, dim)
    mean = draw.normal(rows, heads, dim)
    covariance = torch.eye(dim, dtype=torch.float64).expand(rows, heads, dim, dim)
    weights = {name: draw.normal(*shape) for name, shape in scores.MLP.items()}
    return Candidates(position, n, state, keys, values, (mean, covariance), weights=weights)
