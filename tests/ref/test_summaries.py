"""fade_ref.summaries: numbers of pages, and the scores that they give, compared with plain loops."""

import math

import pytest
import torch

from fade_ref import select, summaries
from fade_ref.attention import Terms

PAGE = 8


def problem(seed=0, heads=2, group=3, pages=6, dim=16):
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, pages * PAGE, dim, generator=draw, dtype=torch.float64)
    keys += 3 * torch.randn(heads, 1, dim, generator=draw, dtype=torch.float64)
    real = torch.rand(pages * PAGE, generator=draw) < 0.8
    real[PAGE : 2 * PAGE] = False  # a page of padding
    query = torch.randn(heads * group, 1, dim, generator=draw, dtype=torch.float64)
    return query, keys.masked_fill(~real[:, None], torch.nan), real


def test_numbers_of_pages():
    _, keys, real = problem()
    bounds, spread = (summaries.summarize(kind, keys, real, PAGE) for kind in ("bounds", "deviation"))
    for h in range(2):
        for p in range(6):
            for d in range(16):
                own = [float(keys[h, i, d]) for i in range(p * PAGE, (p + 1) * PAGE) if real[i]]
                if not own:
                    assert not bounds[h, p].any() and not spread[h, p].any()
                    continue
                mean = sum(own) / len(own)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in own) / len(own))
                for found, exact in (
                    (bounds[h, p, :, d], (min(own), max(own))),
                    (spread[h, p, :, d], (mean, deviation)),
                ):
                    assert found.tolist() == pytest.approx(exact, rel=2**-11, abs=2**-14)
                    assert torch.equal(found, found.half().double())  # stored as float16


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_key_scores_above_its_bound(softcap):
    query, keys, real = problem(seed=1)
    terms = Terms(0.25, softcap)
    summary = summaries.summarize("bounds", keys, real, PAGE)
    bound = summaries.scores("bounds", query, summary, terms)[:, 0]
    exact = 0.25 * torch.einsum("hgd,hnd->hgn", query[:, 0].unflatten(0, (2, 3)), keys).flatten(0, 1)
    exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    best = exact.masked_fill(~real, -torch.inf).unflatten(-1, (-1, PAGE)).amax(-1)
    assert (best <= bound + 1e-3).all() and (best > bound - 20).any()  # rounded to float16
    brute = [
        sum(max(float(q) * float(lo), float(q) * float(hi)) for q, lo, hi in zip(query[4, 0], *summary[1, p]))
        for p in range(6)
    ]
    brute = [0.25 * x for x in brute]
    brute = brute if softcap is None else [softcap * math.tanh(x / softcap) for x in brute]
    assert bound[4].tolist() == pytest.approx(brute, rel=1e-12)


def test_a_page_scores_as_a_key_some_deviations_along_the_query():
    query, keys, real = problem(seed=2)
    summary = summaries.summarize("deviation", keys, real, PAGE)
    found = summaries.scores("deviation", query, summary, Terms(0.25))
    for h in range(6):
        for p in range(6):
            mean, deviation = summary[h // 3, p]
            along = math.sqrt(sum((float(q) * float(s)) ** 2 for q, s in zip(query[h, 0], deviation)))
            exact = 0.25 * (float(query[h, 0] @ mean) + 2 * along)
            assert float(found[h, 0, p]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("kind", ["bounds", "deviation"])
def test_mass_counts_tokens_that_are_seen(kind):
    query, keys, real = problem(seed=3)
    summary = summaries.summarize(kind, keys, real, PAGE)
    seen = real.clone()
    seen[:11] = False  # a window has passed them
    found = summaries.log_mass(kind, query, summary, seen, PAGE, Terms(0.25))
    assert found.isneginf().any(0).tolist() == [True, True, False, False, False, False]
    scores = summaries.scores(kind, query, summary, Terms(0.25))[:, 0]
    count = seen.reshape(-1, PAGE).sum(-1)
    exact = scores.exp() * count / (scores.exp() * count).sum(-1, keepdim=True)
    exact = exact.unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(select.mass_of(found, 2), exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["bounds", "deviation"])
def test_a_page_with_a_key_along_the_query_is_found(kind):
    query, keys, real = problem(seed=4, group=1)
    keys, real = keys.nan_to_num(0.0), torch.ones_like(real)
    for h in range(2):
        keys[h, 3 * PAGE + 5] = 4 * query[h, 0]
    summary = summaries.summarize(kind, keys, real, PAGE)
    mass = select.mass_of(summaries.log_mass(kind, query, summary, real, PAGE, Terms(1.0)), 2)
    assert select.choose(mass, 1) == [[3], [3]]
