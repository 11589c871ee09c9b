"""fade_ref.scores against slow loops written from the formulas. `fade_fast` uses the same functions."""

import math

import pytest
import torch

from fade_ref.plan import adaptive_plan, aggregate, plan
from fade_ref.scores import MLP, features, keep_probability, key_diff, key_norm, pool_neighbors


def test_pooling_against_a_loop_and_avg_pool1d():
    scores = torch.rand(2, 3, 11, dtype=torch.float64)
    pooled = pool_neighbors(scores, torch.arange(11))
    for t in range(11):
        near = [scores[..., s] for s in range(t - 2, t + 3) if 0 <= s < 11]
        torch.testing.assert_close(pooled[..., t], sum(near) / 5)
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool1d(scores, 5, 1, 2))


def test_pooling_depends_on_positions_not_on_storage():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 8, generator=generator).double()
    position = torch.tensor([3, 4, 7, 9, 10, 11, 20, 21])
    want = pool_neighbors(scores, position)
    shuffle = torch.randperm(8, generator=generator)
    assert torch.equal(pool_neighbors(scores[:, shuffle], position[shuffle]), want[:, shuffle])
    holes = torch.tensor([-1, 3, 4, 7, -1, 9, 10, 11, 20, 21, -1])
    padded = torch.full((1, 11), 1e6).double()
    padded[:, holes >= 0] = scores
    assert torch.equal(pool_neighbors(padded, holes)[:, holes >= 0], want)
    assert pool_neighbors(scores[:, :1], position[:1]).tolist() == [[scores[0, 0].item() / 5]]
    nan, zero = (scores.index_fill(-1, torch.tensor([3]), x) for x in (math.nan, 0.0))
    assert torch.equal(pool_neighbors(nan, position), pool_neighbors(zero, position))


def test_key_scores_against_loops():
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(2, 3, 7, 4, generator=generator) + 1
    valid = torch.tensor([[True] * 7, [False] * 2 + [True] * 5]).unsqueeze(1)
    keys[1, :, :2] = math.nan  # padding may hold anything
    norm, diff = key_norm(keys), key_diff(keys, valid)
    assert norm.dtype == diff.dtype == torch.float64
    for b, h in ((0, 0), (0, 2), (1, 1)):
        real = [t for t in range(7) if valid[b, 0, t]]
        k = [keys[b, h, t].double() for t in range(7)]
        anchor = sum(k[t] / math.sqrt(sum(x * x for x in k[t])) for t in real) / len(real)
        for t in real:
            length = math.sqrt(sum(x * x for x in k[t]))
            assert norm[b, h, t].item() == pytest.approx(-length, rel=1e-12)
            cosine = sum(k[t] * anchor) / (length * anchor.norm())
            assert diff[b, h, t].item() == pytest.approx(-cosine.item(), rel=1e-10)


def test_bf16_keys_keep_distinct_norms():
    """Pitfall 115: norms rounded to bf16 tie for most tokens."""
    keys = torch.randn(1, 400, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert keys.norm(dim=-1).unique().numel() < 200
    assert key_norm(keys).unique().numel() == 400


def test_shared_arithmetic_never_asks_for_a_value():
    """On the "meta" device there are none: what would make a GPU wait raises here."""
    with torch.device("meta"):
        scores, keys = torch.rand(2, 3, 50, dtype=torch.float64), torch.rand(2, 3, 50, 8)
        position, now = torch.zeros(2, 1, 50, dtype=torch.int32), torch.zeros(2, 1, 1, dtype=torch.int32)
        weights = {name: torch.rand(shape, dtype=torch.float64) for name, shape in MLP.items()}
        spent = torch.zeros(2, 1, 50, dtype=torch.bool)
    x = features(scores, position, now, 0.5)
    found = [pool_neighbors(scores, position), keep_probability(x, weights), key_norm(keys)]
    found.append(key_diff(keys, position >= 0))
    one = aggregate(scores, "sequence")[:, None]
    found.append(aggregate(scores, "layer", (position >= 0)[:, 0]))
    found += [planner(one, position, 9, 4, spent=spent) for planner in (plan, adaptive_plan)]
    assert all(y.device.type == "meta" for y in found)
