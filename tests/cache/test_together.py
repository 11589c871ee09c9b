"""Blocks of several layers that are demoted at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fade_fast.cache import together
from fade_fast.hf.models import CACHE_NAME
from fade_fast.policies import plan
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import compressed_tokens, new_cache, prompt, tiny_llama
from .test_decode_graph import CONFIGS, SMALL, compiled

#: Configurations whose layers are demoted one by one: they have tables, plans or sizes of their own.
ALONE = ("matched, evict", "matched, two tiers", "adaptive", "learned")
CASES = {name: config for name, config in CONFIGS.items() if name not in (*ALONE, "off")}
CASES["contiguous"] = FadeConfig(**SMALL, positions="contiguous")
CASES["by head"] = FadeConfig(**SMALL, int4_budget=10, eviction_policy="h2o", plan_scope="head")


def run(config, monkeypatch, most, pads=(), layers=3, new=24):
    """Tokens, the cache, and how many layers were demoted together each time."""
    sizes, real = [], together._compact
    with monkeypatch.context() as patch:
        patch.setattr(together, "MOST", most)
        patch.setattr(together, "_compact", lambda x, counters: (sizes.append(len(x)), real(x, counters)))
        model = tiny_llama(dtype=torch.float16, layers=layers)
        cache = new_cache(model, config, verify=False)
        out = compiled(model, cache, prompt(60, batch=2, pads=pads), backend="eager", new=new)
    return out, cache, sizes


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(CASES, "int4", "h2o"))
def test_layers_together_hold_the_bits_of_layers_alone(name, padded, monkeypatch):
    pads = (0, 11) if padded else ()
    found, cache, sizes = run(CASES[name], monkeypatch, together.MOST, pads)
    expected, other, alone = run(CASES[name], monkeypatch, 0, pads)
    assert set(sizes) == {3} and not alone
    assert torch.equal(found, expected) and compressed_tokens(cache) > 0
    ours, theirs = cache.state_dict()[0], other.state_dict()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.slow
def test_a_part_of_the_layers_together(monkeypatch):
    """No more than fit the limit, and only layers of equal widths."""
    block = 2 * 2 * 64 * SMALL["block_size"]  # elements of a layer's keys
    *_, sizes = run(CONFIGS["int4"], monkeypatch, 2 * block, layers=5, new=9)
    assert set(sizes) == {2} and len(sizes) % 2 == 0  # the fifth layer is alone
    config = FadeConfig(**SMALL, layer_bits={1: (8, 8)})
    *_, sizes = run(config, monkeypatch, together.MOST, layers=4, new=9)
    assert set(sizes) == {3}


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    count = 0
    VIEWS = ("view", "slice", "select", "squeeze", "expand", "transpose", "detach", "alias", "split", "t")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.__name__.split(".")[0].lstrip("_un").startswith(self.VIEWS)
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [p for p in plan.SUPPORTED if p not in ALONE])
def test_more_layers_take_few_more_launches(policy, monkeypatch):
    """A plan is made once for all: each layer adds what it stores, and no sorts and sums."""
    counted = {}
    config = FadeConfig(**SMALL, int4_budget=12, int2_budget=8, eviction_policy=policy)
    for layers in (2, 4):
        with monkeypatch.context() as patch:
            real = together._compact

            def watched(*args, real=real, layers=layers):
                with Launches() as mode:
                    real(*args)
                counted.setdefault(layers, []).append(mode.count)

            patch.setattr(together, "_compact", watched)
            model = tiny_llama(layers=layers)
            cache = new_cache(model, config, verify=False)
            compiled(model, cache, prompt(60), backend="eager", new=24)
    few, many = (counted[layers][-1] for layers in (2, 4))
    assert few > 100 and many - few < 12 * 2, (few, many)


def test_an_eager_step_demotes_all_layers_together(monkeypatch):
    """One group for all layers; and a step whose mask is refused has demoted nothing."""
    model, text = tiny_llama(layers=3), prompt(60)["input_ids"]
    cache = new_cache(model, CONFIGS["int4"])
    groups, compact = [], together._compact
    monkeypatch.setattr(
        together, "_compact", lambda x, counters: (groups.append(len(x)), compact(x, counters))
    )
    with torch.no_grad():
        for start in range(0, 48, 12):
            model(text[:, start : start + 12], **{CACHE_NAME: cache})
        assert any(layer.demotion_due for layer in cache.tiered)
        held, known = [layer.middle.count for layer in cache.tiered], len(groups)
        refused = torch.zeros(1, 1, 1, 49)
        refused[..., -1] = -1.0
        with pytest.raises(ValueError):
            model(text[:, 48:49], attention_mask=refused, **{CACHE_NAME: cache})
        assert held == [layer.middle.count for layer in cache.tiered] and len(groups) == known
        model(text[:, 48:49], **{CACHE_NAME: cache})
    assert groups and set(groups) == {3} and held != [layer.middle.count for layer in cache.tiered]


@pytest.mark.parametrize("budgets", [dict(int4_budget=0), dict(int4_budget=0, int2_budget=9)])
def test_budgets_that_keep_no_token(budgets, monkeypatch):
    """A tier without records needs no bound."""
    model, text = tiny_llama(layers=3), prompt(60)["input_ids"]
    states = []
    for most in (together.MOST, 0):
        monkeypatch.setattr(together, "MOST", most)
        cache = new_cache(model, FadeConfig(**SMALL, **budgets, eviction_policy="position"), verify=False)
        with torch.no_grad():
            for start in range(0, 60, 12):
                model(text[:, start : start + 12], **{CACHE_NAME: cache})
        assert cache.memory().forgotten
        states.append(cache.state_dict()[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
