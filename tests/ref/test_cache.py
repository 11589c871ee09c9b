"""fade_ref.cache: the rules for the life of a token, and the effect of each configuration field."""

import dataclasses

import pytest
import torch

from fade_ref import attention, matched
from fade_ref.cache import LayerCache
from fade_ref.config import POLICIES, FadeConfig
from fade_ref.rope import Rope, rotate
from fade_ref.tiers import Tier

from ..marks import slow_but

HEADS, GROUP, D = 2, 2, 16
ROPE = Rope(10000.0 ** -torch.linspace(0, 0.9, D // 2, dtype=torch.float64))
SMALL = dict(recent_window=6, block_size=3)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "evict": FadeConfig(**SMALL, int4_budget=8),
    "two tiers": FadeConfig(**SMALL, int4_budget=6, int2_budget=5),
    "no end": FadeConfig(**SMALL, int4_budget=6, int2_budget=None),
    "original": FadeConfig(**SMALL, int4_budget=6, int2_budget=5, positions="original"),
    "heads": FadeConfig(**SMALL, int4_budget=6, int2_budget=5, plan_scope="head", eviction_policy="h2o"),
    "layer": FadeConfig(**SMALL, int4_budget=6, int2_budget=5, plan_scope="layer", eviction_policy="ema"),
}


def tokens(count, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(batch, heads, count, D, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(HEADS * GROUP), draw(HEADS) + 2.0, draw(HEADS)


def run(config, steps, *, batch=2, pads=(), seed=0, after=None, cache=None, **options):
    """Feed a cache with `steps[i]` tokens per row in step i. Returns the cache and the outputs."""
    cache = cache or LayerCache(config, batch, HEADS, D, ROPE, **options)
    outputs = []
    for i, n in enumerate(steps):
        valid = torch.ones(batch, n, dtype=torch.bool)
        for b, pad in enumerate(pads if i == 0 else ()):
            valid[b, :pad] = False
        outputs.append(cache.step(*tokens(n, batch, seed * 1000 + i), valid))
        if after:
            after(cache)
    return cache, torch.cat(outputs, dim=2)


def rows(cache):
    return [row for group in cache.rows for row in group]


STEPS = [12] + [1] * 25 + [9] + [1] * 5


@pytest.mark.parametrize("name", CONFIGS)
def test_rules_hold_after_every_step(name):
    config = CONFIGS[name]

    def check(cache):
        recent = cache.columns - max(cache.boundary, 0)
        assert cache.boundary == config.n_sink or recent >= config.recent_window
        assert recent < config.recent_window + config.block_size
        for row in rows(cache):
            middle = cache.middle(row)
            positions = [t.position for t in row.tokens]
            assert positions == sorted(set(positions)), "order is never lost"
            kept = {t.position for t in row.tokens if t.tier == Tier.FP16}
            sinks = set(range(min(config.n_sink, row.seen)))
            newest = {p for p in range(row.seen) if p >= row.seen - config.recent_window}
            assert sinks | newest <= kept, "sinks and recent tokens are exact"
            count = {tier: sum(t.tier == tier for t in middle) for tier in Tier}
            assert count[Tier.FP16] == count[Tier.EVICTED] == 0
            for tier, budget in ((Tier.INT4, config.int4_budget), (Tier.INT2, config.int2_budget)):
                assert budget is None or count[tier] <= budget
            at = cache.read_at(row)
            assert at[-config.recent_window :] == positions[-config.recent_window :]
            if config.contiguous:
                assert at == list(range(at[0], at[0] + len(at))) and at[0] == row.evicted
            else:
                assert at == positions

    cache, _ = run(config, STEPS, pads=(0, 5), after=check)
    assert all(cache.middle(row) for row in rows(cache))
    assert any(row.evicted for row in rows(cache)) == config.evicts


@pytest.mark.parametrize("name", slow_but(CONFIGS, "two tiers"))
def test_codes_are_written_once_a_tier(name):
    """No token is requantized inside its tier, and no token returns to a higher tier."""
    seen = {}

    def follow(cache):
        for i, row in enumerate(rows(cache)):
            for t in cache.middle(row):
                history = seen.setdefault((i, t.position), {})
                for side, record in (("key", t.key), ("value", t.value)):
                    before = history.setdefault((t.tier, side), record)
                    assert torch.equal(before.codes, record.codes) and torch.equal(before.scale, record.scale)
                assert t.tier == max(tier for tier, _ in history)

    run(CONFIGS[name], STEPS, after=follow)
    assert len(seen) > 25


def test_without_compression_it_is_attention():
    cache, output = run(FadeConfig(recent_window=None), [7, 1, 1, 5, 1], pads=(0, 3))
    parts = [tokens(n, 2, i) for i, n in enumerate([7, 1, 1, 5, 1])]
    query, keys, values = (torch.cat(x, dim=2) for x in zip(*parts))
    for b, pad in ((0, 0), (1, 3)):
        position = torch.arange(15 - pad)
        partial = attention.over_tensors(
            query[b, :, pad:], keys[b, :, pad:], values[b, :, pad:], position, position, cache.terms
        )
        torch.testing.assert_close(output[b, :, pad:], attention.merge([partial]), rtol=1e-12, atol=1e-12)
        assert (output[b, :, :pad] == 0).all()


def test_a_prefill_equals_its_tokens_one_by_one():
    """Compression follows attention. So the outputs differ, but the stored tokens do not."""
    for name in ("int4", "evict"):
        once, _ = run(CONFIGS[name], [40])
        each = LayerCache(CONFIGS[name], 2, HEADS, D, ROPE)
        query, keys, values = tokens(40, 2, 0)
        for i in range(40):
            each.step(query[:, :, i : i + 1], keys[:, :, i : i + 1], values[:, :, i : i + 1])
        for a, b in zip(rows(once), rows(each)):
            assert [(t.position, t.tier) for t in a.tokens] == [(t.position, t.tier) for t in b.tokens]
            if name == "int4":  # with eviction, the fixed mean depends on the first demotion
                assert all(
                    torch.equal(s.key.codes, t.key.codes) for s, t in zip(once.middle(a), each.middle(b))
                )


@pytest.mark.parametrize("name", slow_but(["int4", "evict", "two tiers", "heads"], "two tiers"))
def test_rows_do_not_see_each_other(name):
    """A row of a batch equals the row alone. Padding does not shift the uncompressed tokens."""
    together, output = run(CONFIGS[name], STEPS, batch=3)
    for b in range(3):
        alone = LayerCache(CONFIGS[name], 1, HEADS, D, ROPE)
        for i, n in enumerate(STEPS):
            part = [x[b : b + 1] for x in tokens(n, 3, i)]
            single = alone.step(*part)
            start = sum(STEPS[:i])
            torch.testing.assert_close(
                output[b : b + 1, :, start : start + n], single, rtol=1e-12, atol=1e-12
            )


def test_the_two_views_of_contiguous_positions_are_equal():
    """Live tokens moved forward with fixed queries equal live tokens from 0 with queries moved back."""
    cache, _ = run(CONFIGS["evict"], STEPS)
    query, keys, values = tokens(1, 2, 99)
    row = cache.rows[0][0]
    position = cache._arrive(row, keys[0], values[0], torch.tensor([True]))
    ours = cache._attend(row, query[0], position, cache.terms)
    shift = row.evicted
    assert shift > 0
    read, v = cache.read(row)
    at = torch.tensor(cache.read_at(row)) - shift
    moved = rotate(read, -shift, ROPE)
    back = rotate(query[0], -shift, ROPE)
    part = attention.over_tensors(back, moved, v, position - shift, at, cache.terms)
    assert at.tolist() == list(range(len(at)))
    torch.testing.assert_close(attention.merge([part]), ours, rtol=1e-10, atol=1e-12)


def test_crop_and_reorder():
    for name in CONFIGS:
        dropped, _ = run(CONFIGS[name], [30])
        dropped.crop(2)
        steps = rows(dropped)
        assert all(r.seen == 28 == r.tokens[-1].position + 1 for r in steps) and dropped.columns == 28
        for bad in (20, -3, 100):
            with pytest.raises(ValueError, match="uncompressed"):
                dropped.crop(bad)
        other, _ = run(CONFIGS[name], [30])
        other.reorder([1, 1])
        query, keys, values = tokens(1, 2, 5)
        same = [x[:1].expand(2, -1, -1, -1) for x in (query, keys, values)]
        a, b = other.step(*same)
        assert torch.equal(a, b)


def test_windows_go_by_positions_of_the_model():
    config = FadeConfig(**SMALL, positions="original", int4_budget=20)
    terms = attention.Terms(D**-0.5, window=8)
    cache, output = run(config, [30, 1], terms=terms)
    exact = LayerCache(FadeConfig(recent_window=None), 2, HEADS, D, ROPE, terms)
    _, expected = run(None, [30, 1], cache=exact)
    torch.testing.assert_close(output[:, :, :30], expected[:, :, :30])
    assert (output[:, :, 30] - expected[:, :, 30]).norm() < 0.1 * expected[:, :, 30].norm()


def test_slopes_and_sinks_belong_to_their_heads():
    """With one plan per head, each head uses its slopes and sinks."""
    config = FadeConfig(**SMALL)
    heads = HEADS * GROUP
    terms = attention.Terms(
        D**-0.5, slopes=torch.rand(heads, dtype=torch.float64), s_aux=torch.linspace(-1, 4, heads).double()
    )
    outputs = [
        run(dataclasses.replace(config, plan_scope=scope), STEPS, terms=terms)[1]
        for scope in ("sequence", "head")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(outputs[0], run(config, STEPS)[1])


BASE = FadeConfig(**SMALL, int4_budget=8, int2_budget=4)
VARIANTS = dict(
    n_sink=2, recent_window=9, block_size=2, int4_budget=5, int2_budget=2, middle_k_bits=8, middle_v_bits=2,
    positions="original", eviction_policy="h2o",
)  # fmt: skip


@pytest.mark.parametrize("field", slow_but(VARIANTS, "int2_budget"))
def test_every_field_has_an_effect(field):
    changed = dataclasses.replace(BASE, **{field: VARIANTS[field]})
    (_, a), (_, b) = run(BASE, STEPS), run(changed, STEPS)
    assert not torch.equal(a, b)


@pytest.mark.slow
def test_plan_scopes_differ_and_backends_are_known():
    policy = dataclasses.replace(BASE, eviction_policy="h2o")
    outputs = [
        run(dataclasses.replace(policy, plan_scope=s), STEPS)[1] for s in ("layer", "sequence", "head")
    ]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    with pytest.raises(ValueError, match="quant_backend"):
        LayerCache(FadeConfig(quant_backend="symmetric"), 1, 1, D)


@pytest.mark.parametrize(
    "policy", slow_but([p for p in POLICIES if p not in ("learned", "expected_attention")], "h2o", "snapkv")
)
def test_every_policy_lives_in_the_cache(policy):
    """In the cache, each policy evicts to its budgets, and has scores only for the stored tokens."""

    def check(cache):
        for row in rows(cache):
            assert row.importance.mass.shape[-1] == (len(row.tokens) if cache.observe else 0)

    cache, output = run(dataclasses.replace(BASE, eviction_policy=policy), STEPS, pads=(0, 5), after=check)
    assert output.isfinite().all()
    for row in rows(cache):
        assert 0 < len(cache.middle(row)) <= 12 and row.evicted > 0


@pytest.mark.slow
def test_heavy_hitters_survive_h2o_but_not_age():
    """Policies with attention scores keep a token that every query attends to. `position` evicts it."""
    kept = {}
    for policy in ("position", "h2o", "ema", "tova", "snapkv"):
        cache = LayerCache(FadeConfig(**SMALL, int4_budget=4, eviction_policy=policy), 1, HEADS, D)
        for i in range(60):
            query, keys, values = tokens(1, 1, i)
            keys = keys * 0.1
            if i == 10:
                keys = keys + 3.0
            cache.step(query.abs() + 0.5, keys, values)
        kept[policy] = 10 in {t.position for t in cache.rows[0][0].tokens}
    assert kept == dict(position=False, h2o=True, ema=True, tova=True, snapkv=True)


def selecting(**more):
    return FadeConfig(**dict(recent_window=6, block_size=8, select=8) | more)


class Watched(LayerCache):
    """Compares each attention over chosen pages with softmax over exactly these tokens, by plain loops."""

    skipped = 0

    def _attend_chosen(self, row, query, position, terms):
        output = super()._attend_chosen(row, query, position, terms)
        (keys, values), page = self.read(row), self.config.select_page
        for i, now in enumerate(position.tolist()):
            pages = self.chosen(row, query[:, i : i + 1], position[i : i + 1], terms)
            for hq in range(query.shape[0]):
                h, scores, vectors = hq // GROUP, [], []
                for t, token in enumerate(row.tokens):
                    in_page = (token.column - self.config.n_sink) // page in pages[h]
                    if token.position <= now and (token.tier == Tier.FP16 or in_page):
                        scores.append(terms.scaling * query[hq, i] @ keys[h, t])
                        vectors.append(values[h, t])
                    self.skipped += token.tier != Tier.FP16 and not in_page
                expected = torch.stack(scores).softmax(0) @ torch.stack(vectors)
                torch.testing.assert_close(output[hq, i], expected, rtol=1e-9, atol=1e-12)
        return output


@pytest.mark.parametrize("codec", slow_but(["rotated", "matched"], "rotated"))
@pytest.mark.parametrize("fields", [{}, dict(select=0.4, select_max=16)], ids=str)
def test_a_query_reads_sinks_recent_tokens_and_the_pages_it_chooses(fields, codec):
    config = selecting(quant_backend=codec, **fields)
    moments = random_moments() if codec == "matched" else None
    cache = Watched(config, 2, HEADS, D, ROPE, moments=moments)
    run(config, [40, 1, 1, 3, 1], pads=(0, 7), cache=cache)
    assert cache.skipped > 0


def random_moments():
    g = torch.Generator().manual_seed(3)
    second = [torch.randn(HEADS, D, 3 * D, generator=g, dtype=torch.float64) for _ in range(4)]
    mean = torch.randn(HEADS, D, generator=g, dtype=torch.float64)
    return matched.Moments(mean, *(x @ x.mT / D for x in second))


def test_below_the_budget_everything_is_read_and_long_steps_read_everything():
    for select, sizes in ((64, [40, 1, 3]), (8, [40, 17, 20])):
        ours, found = run(selecting(select=select), sizes)
        _, expected = run(FadeConfig(recent_window=6, block_size=8), sizes)
        assert torch.equal(found, expected) and ours.boundary - ours.config.n_sink > 8
