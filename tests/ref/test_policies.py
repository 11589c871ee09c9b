"""fade_ref.policies: the properties of plans, and each score compared with its formula."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fade_ref import importance as imp
from fade_ref import policies as pol
from fade_ref.config import PLAN_SCOPES, POLICIES, FadeConfig
from fade_ref.plan import HIGH_SHARE, KEEP_SHARE, adaptive_plan, aggregate, plan
from fade_ref.scores import MLP
from fade_ref.tiers import Tier
from parity.subjects.plans import sorted_plan

from ..marks import slow_but

PLANS = (plan, adaptive_plan)
BUDGETS = [*itertools.product((None, 0, 1, 5, 100), (0, 3, 100, None))]
BUDGETS = slow_but(BUDGETS, (None, 0), (0, 3), (5, 3), (1, None), (100, 100))
ROWS, HEADS, GROUP, N, DIM, PAST = 2, 4, 2, 24, 8, 3  # PAST: the number of sinks before the middle


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_rows(seed, rows=5, n=20):
    """Scores with ties, NaN and infinities, and unsorted positions with padding."""
    generator = seeded(seed)
    scores = torch.randint(0, 6, (rows, n), generator=generator).double()
    scores[torch.rand(rows, n, generator=generator) < 0.1] = math.nan
    scores[torch.rand(rows, n, generator=generator) < 0.05] = math.inf
    scores[torch.rand(rows, n, generator=generator) < 0.05] = -math.inf
    position = torch.stack([torch.randperm(n, generator=generator) + 7 for _ in range(rows)])
    return scores, position.masked_fill(torch.rand(rows, n, generator=generator) < 0.2, -1)


def candidates(seed=0, scope="sequence", holes=0, n=N):
    """Candidates with all inputs that a policy may need. The first `holes` slots of row 1 are padding."""
    generator = seeded(seed)
    total = PAST + n
    visible = torch.ones(total, total).tril().bool().expand(ROWS, total, total).clone()
    visible[1, :, PAST : PAST + holes] = False
    logits = 2 * torch.randn(ROWS, HEADS, total, total, generator=generator).double()
    p = logits.masked_fill(~visible.unsqueeze(1), -math.inf).softmax(-1)
    state = imp.observe(imp.empty(ROWS, HEADS, window=8), p, visible)
    position = torch.arange(PAST, total).repeat(ROWS, 1)
    position[1, :holes] = -1
    draws = torch.randn(2, ROWS, HEADS, n, DIM, generator=generator).double() + 0.3
    root = torch.randn(ROWS, HEADS * GROUP, DIM, DIM, generator=generator).double() / 4
    return pol.Candidates(
        position=position.unsqueeze(1).repeat(1, HEADS, 1) if scope == "head" else position,
        now=total + 10,
        importance=imp.keep(state, torch.arange(PAST, total)),
        keys=draws[0],
        values=draws[1],
        queries=(
            torch.randn(ROWS, HEADS * GROUP, DIM, generator=generator).double(),
            root @ root.mT,
        ),
        layer=2,
        layers=5,
        weights={k: torch.randn(s, generator=generator) / 2 for k, s in MLP.items()},
    )


def by_token(c, f):
    """Apply f(tensor, axis) to each tensor of the candidates with a token axis."""
    state = imp.Importance(**{k: f(getattr(c.importance, k), -1) for k in imp.FRESH})
    return replace(
        c, position=f(c.position, -1), importance=state, keys=f(c.keys, -2), values=f(c.values, -2)
    )


def by_head(c, order):
    """The candidates with reordered KV heads."""
    fields = {k: getattr(c.importance, k)[:, order] for k in imp.FRESH}
    grouped = [x.unflatten(1, (HEADS, GROUP))[:, order].flatten(1, 2) for x in c.queries]
    position = c.position[:, order] if c.position.dim() == 3 else c.position
    return replace(
        c, position=position, importance=imp.Importance(**fields), keys=c.keys[:, order],
        values=c.values[:, order], queries=tuple(grouped),
    )  # fmt: skip


def config(policy, scope="sequence", int4=6, int2=5, **more):
    return FadeConfig(eviction_policy=policy, plan_scope=scope, int4_budget=int4, int2_budget=int2, **more)


def with_axis(c):
    """The candidates as make_plan() passes them to a score: `position` has the axis H or 1."""
    return replace(c, position=c.position.unsqueeze(-2))


def kept(tiers):
    return tiers != Tier.EVICTED


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(("int4", "int2"), BUDGETS)
def test_plan_against_a_slow_sort(int4, int2):
    for seed in range(10):
        scores, position = random_rows(seed)
        tiers = plan(scores, position, int4, int2)
        assert tiers.dtype == torch.int8
        rows = zip(scores.tolist(), position.tolist(), strict=True)
        assert tiers.tolist() == [sorted_plan(*row, int4, int2) for row in rows]


@pytest.mark.parametrize("planner", PLANS)
@pytest.mark.parametrize(("int4", "int2"), BUDGETS)
def test_plans_respect_budgets_and_never_keep_padding(planner, int4, int2):
    """Pitfall 117 for the adaptive plan."""
    for seed in range(10):
        scores, position = random_rows(seed)
        tiers, real = planner(scores, position, int4, int2), position >= 0
        assert (tiers[~real] == Tier.EVICTED).all()
        assert set(tiers.unique().tolist()) <= {Tier.INT4, Tier.INT2, Tier.EVICTED}
        if int4 is not None:
            assert ((tiers == Tier.INT4).sum(-1) <= int4).all()
            if int2 is not None:
                assert ((tiers == Tier.INT2).sum(-1) <= int2).all()
        if int4 is None or int2 is None:
            assert kept(tiers)[real].all()  # a plan without a limit evicts nothing


@pytest.mark.parametrize("budgets", [(4, 3), (15, 0), (1, 19)])
@pytest.mark.parametrize("planner", PLANS)
def test_rows_are_planned_as_if_alone_and_slots_may_be_permuted(planner, budgets):
    for seed in range(10):
        scores, position = random_rows(seed)
        scores = scores.nan_to_num(0.5, 50.0, -50.0) if seed % 2 else scores
        tiers = planner(scores, position, *budgets)
        for row in range(len(scores)):
            real = position[row] >= 0
            alone = planner(scores[row, real], position[row, real], *budgets)
            assert torch.equal(tiers[row, real], alone)
        shuffle = torch.randperm(scores.shape[-1], generator=seeded(seed))
        moved = planner(scores[:, shuffle], position[:, shuffle], *budgets)
        assert torch.equal(moved, tiers[:, shuffle])


@pytest.mark.parametrize("planner", PLANS)
def test_larger_budgets_keep_supersets(planner):
    for seed in range(5):
        scores, position = random_rows(seed)
        for int4, int2 in itertools.product((0, 2, 6), (0, 2, 6)):
            now = kept(planner(scores, position, int4, int2))
            for more in ((int4 + 1, int2), (int4, int2 + 1), (int4, None), (None, int2)):
                assert (kept(planner(scores, position, *more)) | ~now).all()


def test_ties_and_nan():
    position = torch.tensor([5, 6, 7, 8])
    assert plan(torch.ones(4), position, 2, 1).tolist() == [6, 4, 2, 2]  # the older loses,
    assert plan(torch.ones(4), position.flip(0), 2, 1).tolist() == [2, 2, 4, 6]  # anywhere
    nan = torch.tensor([math.nan, -math.inf, math.nan, -1e300]).double()
    assert plan(nan, position, 1, 1).tolist() == [6, 4, 6, 2]
    assert plan(nan, position, 2, 1).tolist() == [6, 2, 4, 2]
    assert plan(torch.tensor([0.0, -0.0]), position[:2], 1, 0).tolist() == [6, 2]


def test_nothing_to_plan():
    for planner in PLANS:
        assert planner(torch.rand(2, 4), torch.full((2, 4), -1), 2, 1).tolist() == [[6] * 4] * 2
    empty = pol.Candidates(torch.zeros(2, 0).long(), now=3)
    assert pol.make_plan(FadeConfig(int4_budget=2), empty).shape == (2, 0)


def test_first_tier():
    scores, position = torch.arange(4.0), torch.arange(4)
    assert plan(scores, position, 2, 1, Tier.INT8).tolist() == [6, 4, 1, 1]
    assert adaptive_plan(scores, position, 2, 1, Tier.INT3)[-1] == Tier.INT3


@pytest.mark.parametrize(
    "call",
    [
        lambda planner: planner(torch.ones(4), torch.arange(5), 1, 1),
        lambda planner: planner(torch.ones(2, 4), torch.arange(4), 1, 1),
        lambda planner: planner(torch.ones(4), torch.arange(4.0), 1, 1),
        lambda planner: planner(torch.ones(4), torch.arange(4), -1, 1),
        lambda planner: planner(torch.ones(4), torch.arange(4), 1, -1),
        lambda planner: planner(torch.ones(4), torch.arange(4), None, -1),
    ],
)
@pytest.mark.parametrize("planner", PLANS)
def test_bad_plans_raise(planner, call):
    with pytest.raises(ValueError):
        call(planner)


# ---------------------------------------------------------------- the adaptive plan


def test_adaptive_splits_by_share_of_mass():
    mass = torch.tensor([50.0, 30.0, 11.0, 4.0, 4.5, 0.3, 0.2])  # the sum is 100
    position = torch.arange(7)

    def codes(*budgets):
        return adaptive_plan(mass, position, *budgets).tolist()

    assert codes(100, 100) == [2, 2, 2, 4, 4, 6, 6]  # the better tokens have 91, 95.5 and 99.5
    assert codes(2, 100) == [2, 2, 4, 4, 4, 6, 6]  # tokens above the INT4 budget go to INT2
    assert codes(2, 2) == [2, 2, 4, 6, 4, 6, 6]
    assert codes(100, 1) == [2, 2, 2, 4, 2, 6, 6]  # INT2 is full, INT4 is not
    assert codes(100, 0) == [2, 2, 2, 2, 2, 6, 6]
    assert codes(0, 100) == [4, 4, 4, 4, 4, 6, 6]
    assert codes(4, None) == [2, 2, 2, 4, 4, 4, 4]
    assert codes(None, 0) == [2] * 7


def slow_adaptive(mass, position, int4, int2):
    """One row, token by token, best first, from the definition; the mass is a whole number of units."""
    ranked = sorted((i for i, p in enumerate(position) if p >= 0), key=lambda i: (mass[i], position[i]))[::-1]
    before, high, worthy = 0, 0, 0
    for i in ranked:
        high += before <= HIGH_SHARE * sum(mass[i] for i in ranked)
        worthy += before <= KEEP_SHARE * sum(mass[i] for i in ranked)
        before += mass[i]
    worthy = len(ranked) if int2 is None else min(worthy, int4 + int2)
    first = min(high if int2 is None else max(high, worthy - int2), int4)
    tiers = [Tier.EVICTED] * len(mass)
    for place, i in enumerate(ranked[:worthy]):
        tiers[i] = Tier.INT4 if place < first else Tier.INT2
    return tiers


@pytest.mark.parametrize(("int4", "int2"), [(0, 3), (3, 0), (5, 3), (5, None), (100, 100)])
def test_adaptive_against_a_slow_loop(int4, int2):
    for seed in range(20):
        generator = seeded(seed)
        mass = (4 * torch.randn(5, 20, generator=generator)).exp().round().clamp(max=1e5).double()
        position = random_rows(seed)[1]
        rows = zip(mass.tolist(), position.tolist(), strict=True)
        expected = [slow_adaptive(*row, int4, int2) for row in rows]
        assert adaptive_plan(mass, position, int4, int2).tolist() == expected


@pytest.mark.parametrize("planner", PLANS)
def test_tokens_that_are_int2_already_never_climb(planner):
    """The plan of the others is then the plan without them, as far as the first tier goes."""
    for seed in range(10):
        _, position = random_rows(seed)
        scores = torch.rand(position.shape, generator=seeded(seed)).double()
        spent = torch.rand(position.shape, generator=seeded(seed + 100)) < 0.3
        tiers = planner(scores, position, 4, 6, spent=spent)
        assert not (tiers[spent] == Tier.INT4).any()
        if planner is plan:
            others = plan(scores, position.masked_fill(spent, -1), 4, 0)
            assert torch.equal(tiers == Tier.INT4, others == Tier.INT4)
            assert (kept(tiers).sum(-1) == (position >= 0).sum(-1).clamp(max=10)).all()


def test_plans_are_the_same_for_both_integer_types():
    scores, position = random_rows(0)
    for planner in PLANS:
        long, short = planner(scores, position, 4, 3), planner(scores, position.int(), 4, 3)
        assert torch.equal(long, short) and short.dtype == torch.int8


def test_adaptive_keeps_a_better_part_of_what_plan_keeps():
    for seed in range(10):
        scores, position = random_rows(seed)
        for budgets in ((4, 3), (1, 0), (0, 5), (50, 50)):
            limits = plan(scores, position, *budgets)
            tiers = adaptive_plan(scores, position, *budgets)
            assert (kept(limits) | ~kept(tiers)).all()
            for tier, score, real in zip(tiers, scores.nan_to_num(-9), position >= 0, strict=True):
                for better, worse in itertools.pairwise((Tier.INT4, Tier.INT2, Tier.EVICTED)):
                    upper, lower = score[(tier == better) & real], score[(tier == worse) & real]
                    assert not upper.numel() or not lower.numel() or upper.min() >= lower.max()


def test_adaptive_without_any_mass_is_plan():
    _, position = random_rows(0)
    for budgets in ((3, 4), (0, 2), (40, 0), (2, None)):
        for nothing in (0.0, -1.0):
            scores = torch.full(position.shape, nothing)
            want = plan(scores, position, *budgets)
            assert torch.equal(adaptive_plan(scores, position, *budgets), want)


# ---------------------------------------------------------------- aggregation


def test_aggregate_against_means():
    scores = torch.rand(ROWS, HEADS, N, generator=seeded(0)).double()
    valid = torch.ones(ROWS, N).bool()
    valid[1, :5] = False
    valid[:, 7] = False
    assert aggregate(scores, "head") is scores
    torch.testing.assert_close(aggregate(scores, "sequence"), scores.mean(1))
    torch.testing.assert_close(aggregate(scores, "layer"), scores.mean((0, 1)))
    layer = aggregate(scores.masked_fill(~valid.unsqueeze(1), math.nan), "layer", valid)
    torch.testing.assert_close(layer[:5], scores[0, :, :5].mean(0))
    torch.testing.assert_close(layer[8:], scores[..., 8:].mean((0, 1)))
    with pytest.raises(ValueError, match="plan_scope='batch'"):
        aggregate(scores, "batch")


def test_aggregate_is_bit_equal_in_any_order_of_heads():
    scores = torch.randn(ROWS, 9, 300, generator=seeded(1)).double().exp()
    for scope, order in itertools.product(("sequence", "layer"), range(5)):
        shuffled = scores[:, torch.randperm(9, generator=seeded(order))]
        assert torch.equal(aggregate(shuffled, scope), aggregate(scores, scope))


# ---------------------------------------------------------------- each policy with each scope


def test_the_registry_holds_every_policy():
    assert set(pol.SCORES) == set(POLICIES)


@pytest.mark.parametrize("scope", slow_but(PLAN_SCOPES, "sequence"))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_a_plan(policy, scope):
    c = candidates(scope=scope, holes=4)
    tiers = pol.make_plan(config(policy, scope), c)
    assert tiers.dtype == torch.int8 and tiers.shape == c.position.shape
    assert (tiers[c.position < 0] == Tier.EVICTED).all()
    assert ((tiers == Tier.INT4).sum(-1) <= 6).all() and ((tiers == Tier.INT2).sum(-1) <= 5).all()
    if policy != "adaptive" and scope != "layer":
        assert (kept(tiers).sum(-1) == 11).all()
    if scope == "layer":  # one plan for all rows, except for padding
        assert torch.equal(tiers[0, 4:], tiers[1, 4:]) and kept(tiers[0]).sum() <= 11
    for unlimited in ({"int4": None, "int2": 0}, {"int4": 6, "int2": None}):
        assert kept(pol.make_plan(config(policy, scope, **unlimited), c))[c.position >= 0].all()


@pytest.mark.parametrize("scope", slow_but(PLAN_SCOPES, "head"))
@pytest.mark.parametrize("policy", slow_but(POLICIES, "h2o", "knorm"))
def test_permuting_tokens_or_heads_permutes_the_plan(policy, scope):
    c = candidates(seed=1, scope=scope)
    tiers = pol.make_plan(config(policy, scope), c)
    shuffle = torch.randperm(N, generator=seeded(2))
    moved = by_token(c, lambda x, axis: x.index_select(axis, shuffle))
    assert torch.equal(pol.make_plan(config(policy, scope), moved), tiers[..., shuffle])
    order = torch.tensor([2, 0, 3, 1])
    heads = pol.make_plan(config(policy, scope), by_head(c, order))
    assert torch.equal(heads, tiers[:, order] if scope == "head" else tiers)


@pytest.mark.parametrize("policy", slow_but(POLICIES, "h2o", "knorm"))
def test_ragged_rows_equal_each_row_alone(policy):
    """No mean, softmax, pool or budget includes padding, for any content of the padding."""
    holes = 9
    c = candidates(seed=3, holes=holes)
    junk = torch.zeros(ROWS, 1, N, 1).bool()
    junk[1, :, :holes] = True
    c = replace(c, **{k: getattr(c, k).masked_fill(junk, math.nan) for k in ("keys", "values")})
    tiers = pol.make_plan(config(policy), c)
    for row, real in ((0, torch.arange(N)), (1, torch.arange(holes, N))):
        alone = by_token(c, lambda x, axis, real=real: x.index_select(axis, real))
        alone = by_token(alone, lambda x, _, row=row: x[row : row + 1])
        alone = replace(alone, queries=tuple(x[row : row + 1] for x in c.queries))
        assert torch.equal(pol.make_plan(config(policy), alone)[0], tiers[row, real])


@pytest.mark.parametrize("policy", slow_but(POLICIES, "h2o", "knorm"))
def test_head_scope_plans_each_head_by_itself(policy):
    """Heads may keep different tokens. Dropping tokens of one head does not change the others."""
    c = candidates(seed=4, scope="head")
    tiers = pol.make_plan(config(policy, "head"), c)
    holes = torch.zeros_like(c.position).bool()
    holes[:, 1, ::3] = True
    apart = pol.make_plan(config(policy, "head"), replace(c, position=c.position.masked_fill(holes, -1)))
    assert torch.equal(apart[:, [0, 2, 3]], tiers[:, [0, 2, 3]])
    assert not kept(apart[:, 1, ::3]).any() and kept(apart[:, 1]).any()


def test_policies_differ():
    c = candidates(seed=5)
    plans = [pol.make_plan(config(p), c) for p in POLICIES if p != "adaptive"]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(plans, 2))
    ema, adaptive = (pol.make_plan(config(p, int4=23), c) for p in ("ema", "adaptive"))
    assert not torch.equal(ema, adaptive)  # with small budgets both agree


def test_the_plan_scope_has_an_effect():
    c = candidates(seed=6)
    layer, sequence = (pol.make_plan(config("h2o", s), c) for s in ("layer", "sequence"))
    head = pol.make_plan(config("h2o", "head"), candidates(seed=6, scope="head"))
    assert torch.equal(layer[0], layer[1]) and not torch.equal(sequence[0], sequence[1])
    assert not torch.equal(head[0, 0], head[0, 1])


def test_layer_scope_orders_left_padded_rows_by_age():
    """Positions count from the first real token of each row, so a slot has a different position per row."""
    position = torch.tensor([[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]])
    c = pol.Candidates(position, now=torch.tensor([[9], [7]]))
    tiers = pol.make_plan(config("position", "layer", int4=2, int2=2), c)
    assert tiers.tolist() == [[6, 6, 4, 4, 2, 2]] * 2
    tiers = pol.make_plan(config("position", "layer", int4=3, int2=2), c)
    assert tiers.tolist() == [[6, 4, 4, 2, 2, 2], [6, 6, 4, 2, 2, 2]]


@pytest.mark.parametrize(
    ("widths", "tier"),
    [((8, 8), Tier.INT8), ((4, 2), Tier.INT4), ((2, 4), Tier.INT4), ((2, 2), Tier.INT2)],
)
def test_the_first_tier_follows_the_wider_of_keys_and_values(widths, tier):
    keys, values = widths
    made = config("position", int4=2, int2=1, middle_k_bits=keys, middle_v_bits=values)
    tiers = pol.make_plan(made, pol.Candidates(torch.arange(4), now=9))
    assert tiers.tolist() == [6, 4, tier, tier]


@pytest.mark.parametrize("policy", slow_but(POLICIES, "h2o", "knorm"))
def test_missing_knowledge_is_named(policy):
    bare = pol.Candidates(torch.arange(4).expand(2, 4), now=9)
    if policy == "position":
        assert kept(pol.make_plan(config(policy), bare)).all()
    else:
        with pytest.raises(ValueError, match="needs Candidates"):
            pol.make_plan(config(policy), bare)


@pytest.mark.parametrize("scope", ["sequence", "head"])
def test_positions_that_do_not_fit_the_scope_raise(scope):
    other = {"sequence": "head", "head": "sequence"}[scope]
    with pytest.raises(ValueError):
        pol.make_plan(config("h2o", scope), candidates(scope=other))


@pytest.mark.parametrize(
    "make",
    [
        lambda c: pol.Candidates(torch.arange(4.0), now=9),
        lambda c: pol.Candidates(torch.tensor([-2]), now=9),
        lambda c: pol.Candidates(torch.arange(4), now=2),
        lambda c: replace(c, position=c.position[:, 1:]),
        lambda c: replace(c, keys=c.keys[..., 1:, :]),
        lambda c: replace(c, importance=imp.append(c.importance, 1)),
    ],
)
def test_bad_candidates_raise(make):
    with pytest.raises(ValueError):
        make(candidates())


# ---------------------------------------------------------------- scores against formulas


def test_attention_scores_against_formulas():
    c = candidates(seed=7)
    state, scores = c.importance, {p: pol.SCORES[p](with_axis(c)) for p in POLICIES}
    assert all(s.dtype == torch.float64 for s in scores.values())
    for b, h, t in itertools.product(range(ROWS), range(HEADS), range(N)):
        at = b, h, t
        queries = N - t  # causal prefill: token t is visible to itself and to all later tokens
        assert scores["h2o"][at].item() == pytest.approx(state.mass[at].item() / queries)
        rows = [x for x in state.window[b, h, :, t].tolist() if not math.isnan(x)]
        assert len(rows) == min(8, N - t) and scores["tova"][at] == rows[-1]
        assert scores["position"][b, 0, t] == PAST + t - (PAST + N + 10)
    assert torch.equal(scores["ema"], state.ema) and torch.equal(scores["adaptive"], state.ema)
    assert torch.equal(scores["hybrid"], state.hybrid)


def test_snapkv_against_kvpress_formula():
    """The mean over the window, then avg_pool1d over the prefix, for tokens visible to the whole window."""
    c = candidates(seed=8)
    prefix = by_token(c, lambda x, axis: x.narrow(axis, 0, N - 8))
    want = torch.nn.functional.avg_pool1d(prefix.importance.window.mean(-2), 5, 1, 2)
    torch.testing.assert_close(pol.SCORES["snapkv"](with_axis(prefix)), want)


def test_tova_averages_over_all_heads_unless_each_head_plans():
    c = candidates(seed=9)
    mean = c.importance.window[..., -1, :].mean(1)
    want = plan(mean, c.position, 6, 5)
    assert torch.equal(pol.make_plan(config("tova"), c), want)


def test_late_heavy_hitters_survive():
    """Pitfall 112: among 60 prefilled and 20 generated tokens, generated slot 70 gets the most attention.

    Its sum is smaller than the sum of an early token that gets a small share of every query.
    """
    total = 80
    p = torch.full((1, 1, total, total), 1e-4, dtype=torch.float64)
    p[..., 0] = 0.1
    p[..., 71:, 70] = 0.5
    visible = torch.ones(1, total, total).tril().bool()
    state = imp.observe(imp.empty(1, 1), p[..., :60, :60], visible[:, :60, :60])
    for i in range(60, total):
        state = imp.observe(state, p[..., i : i + 1, : i + 1], visible[:, i : i + 1, : i + 1])
    assert state.mass[0, 0, 0] > state.mass[0, 0, 70]
    c = pol.Candidates(torch.arange(total)[None], now=total - 1, importance=state)
    for policy in ("h2o", "ema", "snapkv", "tova", "hybrid", "adaptive"):
        tiers = pol.make_plan(config(policy, int4=5, int2=0), c)
        assert tiers[0, 70] == Tier.INT4, policy


def test_features():
    c = candidates(seed=10, holes=4)
    x = pol.features(with_axis(c))
    assert x.shape == (ROWS, HEADS, N, 4) and x.dtype == torch.float64
    real = c.position[1] >= 0
    assert ((x[0] >= 0) & (x[0] <= 1)).all() and ((x[1][:, real] >= 0) & (x[1][:, real] <= 1)).all()
    h2o = (c.importance.mass / c.importance.queries)[1, 2, real]
    now = PAST + N + 10
    for place, t in enumerate(real.nonzero().flatten().tolist()):
        score = (h2o[place] - h2o.min()) / (h2o.max() - h2o.min())
        want = [place / (N - 5), score.item(), 2 / 4, (now - PAST - t) / now]
        assert x[1, 2, t].tolist() == pytest.approx(want, rel=1e-12)
    one = pol.Candidates(torch.tensor([[0]]), now=0, importance=imp.append(imp.empty(1), 1))
    assert pol.features(one).tolist() == [[[0, 0, 0, 0]]]


def test_learned_against_torch_modules():
    c = candidates(seed=11)
    layers = [torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(32, 1), torch.nn.Sigmoid()).double()
    model = torch.nn.ModuleDict({"net": net})
    model.load_state_dict(c.weights)
    assert sum(w.numel() for w in c.weights.values()) == 1249
    want = net(pol.features(with_axis(c))).squeeze(-1).detach()
    torch.testing.assert_close(pol.SCORES["learned"](with_axis(c)), want)


def test_learned_refuses_other_weights():
    c = candidates()
    for change in ({"net.0.bias": None}, {"net.4.weight": torch.zeros(32)}, {"x": torch.zeros(1)}):
        weights = {k: v for k, v in (c.weights | change).items() if v is not None}
        with pytest.raises(ValueError, match="weights"):
            pol.make_plan(config("learned"), replace(c, weights=weights))
