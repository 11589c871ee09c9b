"""plan_scope="head": every KV head keeps tokens of its own, as the specification has it."""

import pytest
import torch

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig
from parity.case import perform
from parity.subjects import heads

from ..cache.test_decode_graph import compiled
from ..marks import named
from ..models import compressed_tokens, generate, prompt, teacher_forced, tiny_llama, twin_logits

SMALL = dict(heads.SMALL, plan_scope="head")


@pytest.mark.parametrize("case", named(heads.collect(), "h2o, original, int2_budget 6"))
def test_every_head_keeps_what_the_specification_keeps(case):
    outcome = perform(case)
    assert outcome.passed, (outcome.raised, outcome.checks)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_generation(policy):
    """Heads keep different tokens, and compiled steps do as eager ones."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(60, batch=2, pads=(0, 20))
    config = FadeConfig(**SMALL, eviction_policy=policy)
    cache = fade_fast.create_cache(model, config)
    expected = generate(model, cache, inputs)
    assert compressed_tokens(cache) == 20
    places = cache.tiered[0].middle.positions_by_head(cache.tiered[0].middle.tiers[0])
    assert not torch.equal(places[:, 0], places[:, 1])
    torch._dynamo.reset()
    found = compiled(model, fade_fast.create_cache(model, config), inputs, new=40, min_new_tokens=40)
    assert torch.equal(found[:, 60:], expected)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["knorm", "keydiff"])
def test_logits_equal_those_over_the_same_codes_read_dense(policy):
    model, inputs = tiny_llama(dtype=torch.float64), prompt(110)
    for more in (dict(), dict(int2_budget=7, positions="original")):
        config, chunks = FadeConfig(**SMALL, eviction_policy=policy, **more), [60] + [1] * 20 + [25, 5]
        cache = fade_fast.create_cache(model, config)
        ours = teacher_forced(model, cache, inputs, chunks)
        assert compressed_tokens(cache) == 10 + more.get("int2_budget", 0)
        torch.testing.assert_close(ours, twin_logits(model, config, inputs, chunks), rtol=1e-5, atol=1e-5)


def test_copies_and_files(tmp_path):
    """A saved cache, and rows in another order, go on as they should."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(60, batch=2)
    config = FadeConfig(**SMALL, eviction_policy="h2o")
    cache = fade_fast.create_cache(model, config)
    generate(model, cache, inputs, new=10)
    cache.save(tmp_path / "cache.safetensors")
    loaded = fade_fast.load_cache(tmp_path / "cache.safetensors", model)
    for c in (cache, loaded):
        c.reorder_cache(torch.tensor([1, 0]))
    step = dict(input_ids=torch.tensor([[4] * 12, [9] * 12]), position_ids=torch.arange(69, 81).expand(2, -1))
    with torch.no_grad():
        a, b = (model(**step, **{CACHE_NAME: c}, use_cache=True).logits for c in (cache, loaded))
    assert torch.equal(a, b)
    assert heads.survivors(cache.tiered[0], 0, 1) == heads.survivors(loaded.tiered[0], 0, 1)
