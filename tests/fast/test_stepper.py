"""Captured decode steps: what generate() compiles gives what eager steps give, in one graph."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import fade_fast
from fade_fast import plan
from fade_ref.config import FadeConfig

from .models import compressed_tokens, prompt, tiny_llama

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "k3v2": FadeConfig(**SMALL, middle_k_bits=3, middle_v_bits=2),
    "evict": FadeConfig(**SMALL, int4_budget=10),
    "evict, original positions": FadeConfig(**SMALL, int4_budget=10, positions="original"),
    "int4, int2, evict": FadeConfig(**SMALL, int4_budget=10, int2_budget=6),
    "off": FadeConfig(recent_window=None),
}
CONFIGS |= {
    policy: FadeConfig(**SMALL, int4_budget=10, int2_budget=6, eviction_policy=policy)
    for policy in plan.SUPPORTED
    if policy not in ("position", "learned")
}


def compiled(model, cache, inputs, backend="aot_eager", new=24, **kwargs):
    """Tokens of generate() whose steps are compiled, as on a GPU, into one graph without breaks."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    cache.stepper.compileable = True
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=new, do_sample=False, compile_config=config, **kwargs
    )


def eager(model, cache, inputs, new=24, **kwargs):
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False, **kwargs)


@pytest.fixture(autouse=True)
def fresh_counters():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_steps_equal_eager_steps(name, padded):
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2, pads=(0, 9) if padded else ())
    theirs = fade_fast.create_cache(model, CONFIGS[name])
    expected = eager(model, theirs, inputs)
    cache = fade_fast.create_cache(model, CONFIGS[name])
    found = compiled(model, cache, inputs)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert name == "off" or compressed_tokens(cache) > 0
    assert cache.get_seq_length() == theirs.get_seq_length()
    assert torch.equal(cache.timeline.positions, theirs.timeline.positions)
    for ours, other in zip(cache.tiered, theirs.tiered):
        for a, b in zip(ours.dense(), other.dense()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for records, twin in zip(_records(ours), _records(other)):
            for name in ours.observer.fields if ours.observer else ():
                torch.testing.assert_close(records[name], twin[name], rtol=1e-9, atol=1e-12)


def _records(layer):
    """The buffers that hold tokens; sinks, whose scores mean nothing, are left out."""
    layer.settle()
    exact = {name: layer.exact[name][..., layer.config.n_sink :] for name in layer.exact.fields}
    return [exact] + [tier.records for tier in layer.held_tiers()]
