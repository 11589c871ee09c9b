"""Eviction by attention inside generate(): what is stored, what it costs, and what cannot change it."""

import copy

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_fast.policies import scores
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import SMALL, generate, prompt, teacher_forced, tiny_llama

BY_ATTENTION = tuple(p for p in scores.OBSERVERS if p != "learned")


def config(policy, **changes):
    return FadeConfig(**(SMALL | dict(int4_budget=12, int2_budget=7, eviction_policy=policy) | changes))


def fields(cache) -> set[str]:
    """Names of what the first layer stores besides keys, values and where they are."""
    layer = cache.tiered[0]
    found = set(layer.dense.fields) - {"key", "value"}
    for tier in layer.middle.tiers:
        found |= {n for n in tier.records.fields if "_" not in n} - {"position"}
    return found


@pytest.mark.parametrize(
    "settings",
    [config("position"), *(config(p, int4_budget=None, int2_budget=0) for p in BY_ATTENTION)],
    ids=lambda c: c.eviction_policy,
)
def test_nothing_is_stored_where_nothing_asks(settings, monkeypatch):
    """By position, or where no token ever has to leave: no field, no observer, no second pass."""
    model = tiny_llama()
    cache = fade_fast.create_cache(model, settings)
    monkeypatch.delattr(scores.Observer, "arrive")
    generate(model, cache, prompt(60), new=30)
    assert fields(cache) == set() and all(layer.observer is None for layer in cache.tiered)
    assert not any(layer.counts_in_attend(1) for layer in cache.tiered)


@pytest.mark.slow
@pytest.mark.parametrize("policy", slow_but(BY_ATTENTION, "h2o", "snapkv"))
def test_budgets(policy):
    """Tiers hold what their budgets allow, and no more; the choice differs from that by position."""
    model, inputs = tiny_llama(), prompt(90, batch=2, pads=(0, 20))
    cache = fade_fast.create_cache(model, config(policy))
    other = fade_fast.create_cache(model, config("position"))
    for c in (cache, other):
        generate(model, c, inputs, new=50)
    tokens = cache.memory().tokens
    assert tokens["INT4"] <= 24 and tokens["INT2"] <= 14 and tokens["EVICTED"] > 0
    assert tokens["INT4"] + tokens["INT2"] == 38 or policy == "adaptive"
    places = [[t.records["position"] for t in c.tiered[0].middle.tiers] for c in (cache, other)]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(*places))
    assert fields(cache) == set(cache.tiered[0].observer.fields)
    assert cache.memory().packed <= cache.memory().allocated


@pytest.mark.slow
@pytest.mark.parametrize("policy", slow_but(BY_ATTENTION, "h2o", "snapkv"))
def test_copies_resets_and_offloads(policy):
    """A copy goes on as the cache itself, a cache that was reset as a new one; moving changes nothing."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(120, batch=2, pads=(0, 9))
    first, rest = [60, 1, 1, 1, 30], [1] * 12 + [10, 5]
    cache = fade_fast.create_cache(model, config(policy))
    expected = teacher_forced(model, cache, inputs, first + rest)
    cache.reset()
    assert torch.equal(teacher_forced(model, cache, inputs, first + rest), expected)
    cache.reset()
    teacher_forced(model, cache, inputs, first)
    twin = copy.deepcopy(cache)
    for c in (cache, twin):
        for layer in c.layers:
            layer.offload()
            layer.prefetch()
        found = continued(model, c, inputs, sum(first), rest)
        assert torch.equal(found, expected[:, sum(first) : sum(first) + sum(rest)])


def continued(model, cache, inputs, start, chunks):
    """Logits of further chunks of the input, from column `start` on."""
    ids, mask, out = inputs["input_ids"], inputs["attention_mask"], []
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for n in chunks:
            part = slice(start, start + n)
            step = model(
                input_ids=ids[:, part],
                attention_mask=mask[:, : start + n],
                position_ids=position[:, part],
                **{CACHE_NAME: cache},
            )
            out.append(step.logits)
            start += n
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("policy", slow_but(BY_ATTENTION, "h2o", "snapkv"))
def test_padded_rows_choose_as_rows_alone(policy):
    """What a row keeps does not depend on padding or on the other rows."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(70, batch=2, pads=(0, 30))
    cache = fade_fast.create_cache(model, config(policy))
    teacher_forced(model, cache, inputs, [70])
    alone = fade_fast.create_cache(model, config(policy))
    row = {name: x[1:, 30:] for name, x in inputs.items()}
    teacher_forced(model, alone, row, [40])
    # One plan over all that has left the window: of 70 and 40 columns, the same tokens of row 1.
    for ours, theirs in zip(cache.tiered, alone.tiered):
        both = [_received(layer, row) for layer, row in ((ours, 1), (theirs, 0))]
        common = both[0].keys() & both[1].keys()
        assert len(common) > 16
        for position in common:
            torch.testing.assert_close(both[0][position], both[1][position], rtol=1e-9, atol=1e-12)


def _received(layer, row) -> dict[int, torch.Tensor]:
    """Scores [H] by position, of the recent tokens of a row."""
    scores = layer.observer.score({name: layer.dense[name] for name in layer.observer.fields})[row]
    places = layer.dense_positions()[row, 0].tolist()
    return {p: scores[:, i] for i, p in enumerate(places) if p >= layer.config.n_sink}


@pytest.mark.slow
def test_half_precision_chooses_almost_as_float64():
    """bfloat16 models rank by what they see: most of the survivors are those of float64."""
    inputs = prompt(300)
    for policy in BY_ATTENTION:
        kept = []
        for dtype in (torch.float64, torch.bfloat16):
            model = tiny_llama(dtype=dtype, layers=1)
            cache = fade_fast.create_cache(model, config(policy, int4_budget=60, int2_budget=0))
            teacher_forced(model, cache, inputs, [290] + [1] * 10)
            kept.append(set(cache.tiered[0].middle.tiers[0].records["position"].flatten().tolist()))
        assert len(kept[0] & kept[1]) >= 0.8 * len(kept[0]), policy


class TestRefusals:
    def test_models_whose_attention_cannot_be_replaced(self):
        falcon = FalconForCausalLM(
            FalconConfig(
                vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, alibi=True
            )
        )
        with pytest.raises(ValueError, match="'h2o' ranks by attention, but FalconForCausalLM"):
            fade_fast.create_cache(falcon, config("h2o", positions="original"))

    def test_detached_models(self):
        model = tiny_llama()
        cache = fade_fast.create_cache(model, config("ema"))
        fade_fast.detach(model)
        with pytest.raises(ValueError, match="attach"):
            generate(model, cache, prompt(40))
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("policy", slow_but(BY_ATTENTION, "h2o"))
def test_padding_between_captured_steps(policy):
    """A query that is padding counts nowhere, in captured steps as in eager ones."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(60, batch=2, pads=(0, 3))
    inputs["attention_mask"][1, [45, 50, 51]] = 0
    caches = [fade_fast.create_cache(model, config(policy)) for _ in range(2)]
    for cache in caches:
        teacher_forced(model, cache, inputs, [40])
    expected = continued(model, caches[0], inputs, 40, [1] * 20)
    for column in range(40, 60):
        assert caches[1].decode_graph.begin(1, 2)
        found = continued(model, caches[1], inputs, column, [1])[:, 0]
        caches[1].decode_graph.end(1)
        real = inputs["attention_mask"][:, column].bool()
        torch.testing.assert_close(found[real], expected[real, column - 40], rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(*(cache.tiered for cache in caches)):
        ours.compact(), theirs.compact()
        for row in range(2):
            a, b = _received(ours, row), _received(theirs, row)
            assert a.keys() == b.keys()
            for position in a:
                torch.testing.assert_close(a[position], b[position], rtol=1e-9, atol=1e-12, equal_nan=True)
