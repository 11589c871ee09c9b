"""fade_ref.importance compared with slow loops over the formulas, and its invariants."""

import math
from dataclasses import fields, replace

import pytest
import torch

from fade_ref import importance as imp
from fade_ref.baselines import expected_attention

from ..marks import slow_but

NAMES = [f.name for f in fields(imp.Importance)]


def same(a, b, rtol=1e-12):
    """Check that each field of two states agrees. NaN equals NaN."""
    for name in NAMES:
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape and x.dtype == torch.float64, name
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-14, equal_nan=True, msg=name)


def causal(past, q, pads=(0,)):
    """A causal mask, bool [B, q, past + q]. The first pads[b] slots of row b are padding."""
    n = past + q
    seen = torch.arange(n) <= torch.arange(past, n).unsqueeze(-1)
    return torch.stack([seen & (torch.arange(n) >= pad) for pad in pads])


def attention(visible, heads, seed, sharpness=3.0):
    """Random softmax probabilities [B, H, q, n] under `visible`. A row without a visible token is 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (visible.shape[0], heads, *visible.shape[1:])
    logits = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.masked_fill(~visible.unsqueeze(1), -math.inf).softmax(-1).nan_to_num(0.0)


def step_by_step(state, probabilities, visible, known):
    """Call observe() with one query at a time. Query i arrives with slot known + i."""
    for i in range(probabilities.shape[-2]):
        n = known + i + 1
        now = slice(i, i + 1)
        state = imp.observe(state, probabilities[..., now, :n], visible[..., now, :n])
    return state


# ---------------------------------------------------------------- state over time


@pytest.mark.parametrize("pads", [(0,), (0, 3), (5, 0, 2)])
@pytest.mark.parametrize("window", slow_but([1, 4, 64], 4))
def test_many_queries_equal_one_by_one(pads, window):
    visible = causal(0, 17, pads)
    p = attention(visible, 3, seed=window)
    state = imp.observe(imp.empty(len(pads), 3, window=window), p, visible)
    same(state, step_by_step(imp.empty(len(pads), 3, window=window), p, visible, 0))
    # The same from a state with a history, also in two chunks of different length.
    visible = causal(17, 9, pads)
    p = attention(visible, 3, seed=99)
    after = imp.observe(state, p, visible)
    same(after, step_by_step(state, p, visible, 17))
    parts = imp.observe(state, p[:, :, :4, :21], visible[:, :4, :21])
    same(after, imp.observe(parts, p[:, :, 4:], visible[:, 4:]))


def test_no_batch_dim_and_two_batch_dims_equal_one():
    visible = causal(0, 8, (0, 2))
    p = attention(visible, 2, seed=0)
    one = imp.observe(imp.empty(2, 2), p, visible)
    none = imp.observe(imp.empty(2), p[1], visible[1])
    two = imp.observe(imp.empty(1, 2, 2), p[None], visible[None])
    for name in NAMES:
        for other, mine in ((none, getattr(one, name)[1]), (two, getattr(one, name)[None])):
            assert torch.equal(getattr(other, name).nan_to_num(-1), mine.nan_to_num(-1))


def test_fields_against_slow_loops():
    pads, heads, w = (0, 4), 2, 5
    visible = causal(0, 14, pads)
    p = attention(visible, heads, seed=5)
    state = imp.observe(imp.empty(2, heads, window=w), p, visible)
    for b in range(2):
        for h in range(heads):
            hybrid = {}
            for i in range(14):  # AKV: decay, add, normalize by the maximum, mix with recency
                seen = range(pads[b], i + 1)
                hybrid |= {t: 0.95 * hybrid.get(t, 0.0) + p[b, h, i, t].item() for t in seen}
                top = max([*hybrid.values(), 1e-10])
                for rank, t in enumerate(seen):
                    recency = rank / (len(seen) - 1) if len(seen) > 1 else 0.0
                    hybrid[t] = 0.7 * hybrid[t] / top + 0.3 * recency
            for t in range(14):
                got = [p[b, h, i, t].item() for i in range(14) if i >= t >= pads[b]]
                assert state.mass[b, h, t].item() == pytest.approx(sum(got))
                assert state.queries[b, h, t].item() == len(got)
                ema = got[0] if got else 0.0
                for x in got[1:]:
                    ema = 0.95 * ema + 0.05 * x
                assert state.ema[b, h, t].item() == pytest.approx(ema, rel=1e-12)
                assert state.hybrid[b, h, t].item() == pytest.approx(hybrid.get(t, 0.0), rel=1e-12)
                for j in range(w):
                    i = 14 - w + j
                    x = state.window[b, h, j, t]
                    assert x == p[b, h, i, t] if i >= t >= pads[b] else x.isnan()


def test_akv_hybrid_equals_akv_code_for_one_row_and_head():
    """The update of akv-cache for decode steps: one row, one head, one query per call."""
    p = attention(causal(0, 12), 1, seed=8)
    state, scores = imp.empty(1, 1), torch.zeros(0, dtype=torch.float64)
    for i in range(12):
        state = imp.observe(state, p[:, :, i : i + 1, : i + 1], torch.ones(1, 1, i + 1).bool())
        scores = torch.cat([scores, scores.new_zeros(1)]) * 0.95 + p[0, 0, i, : i + 1]
        recency = torch.linspace(0, 1, i + 1, dtype=torch.float64)
        scores = 0.7 * scores / scores.max().clamp(min=1e-10) + 0.3 * recency
    torch.testing.assert_close(state.hybrid[0, 0], scores, rtol=1e-12, atol=0)


def test_padded_row_equals_the_row_alone():
    visible = causal(0, 12, (5,))
    p = attention(visible, 2, seed=3)
    padded = imp.keep(imp.observe(imp.empty(1, 2), p, visible), torch.arange(5, 12))
    alone = imp.observe(imp.empty(1, 2), p[:, :, 5:, 5:], visible[:, 5:, 5:])
    same(padded, alone)


def test_invisible_probabilities_are_ignored_even_nan():
    visible = causal(0, 6, (2,))
    p = attention(visible, 1, seed=4)
    junk = torch.where(visible.unsqueeze(1), p, math.nan)
    same(imp.observe(imp.empty(1, 1), junk, visible), imp.observe(imp.empty(1, 1), p, visible))


def test_a_query_that_sees_nothing_changes_only_the_window():
    visible = causal(0, 6)
    before = imp.observe(imp.empty(1, 2), attention(visible, 2, seed=6), visible)
    after = imp.observe(before, torch.rand(1, 2, 1, 6), torch.zeros(1, 1, 6).bool())
    same(replace(after, window=before.window), before)
    assert after.window[..., -1, :].isnan().all()


def test_generated_tokens_start_from_their_first_mass():
    visible = causal(0, 50)
    state = imp.observe(imp.empty(1, 1), attention(visible, 1, seed=1), visible)
    p = torch.full((1, 1, 1, 51), 0.01)
    p[..., -1] = 0.5
    state = imp.observe(state, p, torch.ones(1, 1, 51).bool())
    assert state.ema[0, 0, -1] == 0.5 and state.mass[0, 0, -1] == 0.5
    assert state.queries[0, 0, -1] == 1


def test_prefill_mass_does_not_dominate():
    """Pitfall 111: after a prefill of 500 tokens, a token that decode attends to leads within a few steps.

    If the prefill counted as one step, its weight would be 500 times as large. It would lead for about 100
    steps.
    """
    n = 500
    p = torch.zeros(1, 1, n, n, dtype=torch.float64)
    p[..., 0] = 0.1  # all queries of the prefill attend to slot 0
    state = imp.observe(imp.empty(1, 1), p, causal(0, n))
    assert state.ema[0, 0, 0] <= 1 and state.ema[0, 0, 0] == pytest.approx(0.1)
    steps = 0
    while state.ema[0, 0, 1] <= state.ema[0, 0, 0]:
        one = torch.zeros(1, 1, 1, n + steps + 1, dtype=torch.float64)
        one[..., 1] = 0.5  # only decode steps attend to slot 1
        state = imp.observe(state, one, torch.ones(1, 1, n + steps + 1).bool())
        steps += 1
    assert steps <= 5


def test_half_precision_input_neither_overflows_nor_ties():
    """Pitfall 110: fp16 sums are limited to 65504."""
    state = replace(imp.append(imp.empty(1), 1), mass=torch.tensor([[65504.0]]).double())
    state = imp.observe(state, torch.ones(1, 40, 1).half(), torch.ones(40, 1).bool())
    assert state.mass.item() == 65544.0


# ---------------------------------------------------------------- append and keep


def observed(n=9, rows=2, heads=3, seed=0, window=4):
    visible = causal(0, n, (0,) * rows)
    p = attention(visible, heads, seed)
    return imp.observe(imp.empty(rows, heads, window=window), p, visible)


def test_scores_follow_tokens():
    """Pitfalls 113, 114: after eviction, new tokens and eviction, each score still belongs to its token."""
    state = observed()
    tag = torch.arange(9.0).double().expand(2, 3, 9)
    state = replace(state, mass=tag, ema=tag, window=tag.unsqueeze(-2).expand(2, 3, 4, 9))
    state = imp.append(imp.keep(state, torch.tensor([1, 4, 5, 8])), 2)
    assert state.mass[1, 2].tolist() == [1, 4, 5, 8, 0, 0]
    assert state.window[0, 0, 3, :4].tolist() == [1, 4, 5, 8]
    assert state.window[..., 4:].isnan().all() and (state.queries[..., 4:] == 0).all()
    rows = imp.keep(state, torch.tensor([[0, 3, 4], [2, 5, -1]]))
    assert rows.ema[:, 1].tolist() == [[1, 8, 0], [5, 0, 0]]
    heads = imp.keep(state, torch.tensor([[[0], [1], [2]], [[3], [2], [1]]]))
    assert heads.mass[..., 0].tolist() == [[1, 4, 5], [8, 5, 4]]


def test_a_hole_is_a_fresh_token_and_keeping_all_changes_nothing():
    state = observed()
    same(imp.keep(state, torch.arange(9)), state)
    same(imp.keep(state, torch.tensor([0, -1])), imp.append(imp.keep(state, torch.tensor([0])), 1))
    assert imp.keep(imp.empty(2, 3), torch.tensor([-1, -1])).mass.tolist() == [[[0, 0]] * 3] * 2


def test_observing_after_keep_equals_keeping_after_observing():
    """Later queries cannot see evicted tokens. These do not change the scores of other tokens."""
    state, kept = observed(), torch.tensor([0, 2, 3, 7])
    visible = torch.zeros(2, 2, 9).bool()
    visible[..., kept] = True
    p = attention(visible, 3, seed=7)
    late = imp.keep(imp.observe(state, p, visible), kept)
    early = imp.observe(imp.keep(state, kept), p[..., kept], visible[..., kept])
    same(early, late)


def test_functions_are_pure():
    state = observed()
    copy = imp.Importance(*(getattr(state, name).clone() for name in NAMES))
    visible = causal(9, 2, (0, 0))
    imp.observe(state, attention(visible, 3, seed=2), visible)
    imp.keep(state, torch.tensor([0, -1]))
    same(state, copy, rtol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: imp.empty(),
        lambda s: imp.empty(2, window=0),
        lambda s: imp.append(s, -1),
        lambda s: imp.keep(s, torch.tensor([9])),
        lambda s: imp.keep(s, torch.tensor([-2])),
        lambda s: imp.keep(s, torch.tensor([0.0])),
        lambda s: imp.keep(s, torch.zeros(4, 1).long()),  # rows that do not exist
        lambda s: imp.keep(s, torch.zeros(1, 2, 3, 1).long()),
        lambda s: imp.observe(s, torch.rand(2, 3, 1, 8), torch.ones(2, 1, 8).bool()),  # too short
        lambda s: imp.observe(s, torch.rand(2, 4, 1, 9), torch.ones(2, 1, 9).bool()),  # heads
        lambda s: imp.observe(s, torch.rand(3, 1, 9), torch.ones(1, 9).bool()),  # no batch dim
        lambda s: imp.observe(s, torch.rand(2, 3, 1, 9), torch.ones(2, 1, 9)),  # float mask
        lambda s: imp.observe(s, torch.rand(2, 3, 1, 9), torch.ones(2, 2, 9).bool()),
        lambda s: imp.observe(imp.empty(1), torch.rand(1, 1, 0), torch.ones(1, 0).bool()),
        lambda s: imp.group_mean(torch.rand(6, 1, 9), 4),
        lambda s: imp.group_mean(torch.rand(6, 1, 9), 0),
    ],
)
def test_bad_input_raises(call):
    with pytest.raises(ValueError):
        call(observed())


# ---------------------------------------------------------------- means, and queries to come


def test_group_mean_takes_consecutive_query_heads():
    p = torch.rand(2, 6, 4, 5)
    mean = imp.group_mean(p, 2)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean[:, 1], (p[:, 3] + p[:, 4] + p[:, 5]).double() / 3)


def expected_by_loop(k, v, mu, sigma, group, valid):
    """Section 6 of the formulas for one row, with plain sums over tokens and query heads."""
    heads, n, dim = k.shape
    out = torch.zeros(heads, n, dtype=torch.float64)
    for h in range(heads):
        for g in range(h * group, (h + 1) * group):
            logit = [
                (k[h, t] @ mu[g]).item() / math.sqrt(dim) + (k[h, t] @ sigma[g] @ k[h, t]).item() / (2 * dim)
                for t in range(n)
            ]
            total = sum(math.exp(logit[t]) for t in range(n) if valid[t])
            for t in range(n):
                out[h, t] += math.exp(logit[t]) / total / group * v[h, t].norm().item()
    return out


def test_expected_attention_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 2, 2, 6, 4, generator=generator, dtype=torch.float64)
    queries = torch.randn(2, 6, 50, 4, generator=generator, dtype=torch.float64) + 0.5
    mu, centered = queries.mean(-2), queries - queries.mean(-2, keepdim=True)
    sigma = centered.transpose(-1, -2) @ centered / 50
    valid = torch.tensor([[True] * 6, [False] + [True] * 5])
    score = expected_attention(k, v, mu, sigma, valid.unsqueeze(1))
    for b in range(2):
        want = expected_by_loop(k[b], v[b], mu[b], sigma[b], 3, valid[b])
        torch.testing.assert_close(score[b][:, valid[b]], want[:, valid[b]])


def test_expected_attention_is_the_mean_over_gaussian_queries():
    """A simulation of E[exp(q.k / sqrt(D))] = exp(k.mu / sqrt(D) + k' Sigma k / (2 D))."""
    generator = torch.Generator().manual_seed(4)
    k = torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    mu = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    root = 0.5 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    q = mu + torch.randn(400_000, 8, generator=generator, dtype=torch.float64) @ root.T
    drawn = (q @ k[0].T / math.sqrt(8)).exp().mean(0)
    unit = torch.nn.functional.normalize(torch.ones_like(k), dim=-1)
    score = expected_attention(k, unit, mu, (root @ root.T)[None], torch.ones(5).bool())
    torch.testing.assert_close(score[0], drawn / drawn.sum(), rtol=0.03, atol=0)


def test_expected_attention_refuses_heads_that_do_not_fit():
    k = torch.randn(2, 5, 4)
    for mu, sigma in ((torch.randn(3, 4), torch.randn(3, 4, 4)), (torch.randn(4, 4), torch.eye(4))):
        with pytest.raises(ValueError):
            expected_attention(k, k, mu, sigma, torch.ones(5).bool())
