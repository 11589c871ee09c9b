"""The `learned` policy inside generate(): its weights, and what is refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch._dynamo.utils import counters

import fade_fast
from fade_fast.policies import scores
from fade_ref.config import FadeConfig
from parity.cases import policy_weights

from ..cache.test_decode_graph import compiled
from ..models import SMALL, generate, prompt, tiny_llama

LEARNED = FadeConfig(**SMALL, int4_budget=12, eviction_policy="learned")


def survivors(cache):
    return [layer.middle.tiers[0].records["position"].clone() for layer in cache.tiered]


def test_weights_from_a_file(tmp_path):
    """A file gives what its tensors give, other weights choose otherwise, and layers differ by depth."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(80)
    save_file(policy_weights(), tmp_path / "weights.safetensors")
    found = []
    for weights in (tmp_path / "weights.safetensors", policy_weights(), policy_weights(1)):
        cache = fade_fast.create_cache(model, LEARNED, policy_weights=weights)
        generate(model, cache, inputs, new=16)
        assert cache.memory().tokens["INT4"] == 12
        found.append(survivors(cache))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2]))
    assert [layer.observer.depth for layer in cache.tiered] == [0.0, 1.0]


@pytest.mark.slow
def test_captured_steps():
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2, pads=(0, 9))
    torch._dynamo.reset()
    counters.clear()
    caches = [fade_fast.create_cache(model, LEARNED, policy_weights=policy_weights()) for _ in range(2)]
    expected = generate(model, caches[0], inputs, new=24)
    assert torch.equal(compiled(model, caches[1], inputs, new=24)[:, 30:], expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(a, b) for a, b in zip(*map(survivors, caches)))


@pytest.mark.slow
def test_weights_that_are_shipped():
    """Without other weights they choose, by more than position; their file says where they come from."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(80)
    found = []
    for weights in (None, scores.SHIPPED):
        cache = fade_fast.create_cache(model, LEARNED, policy_weights=weights)
        generate(model, cache, inputs)
        assert cache.memory().tokens["INT4"] == 12
        found.append(survivors(cache))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    plain = fade_fast.create_cache(model, FadeConfig(**SMALL, int4_budget=12))
    generate(model, plain, inputs)
    assert not all(torch.equal(a, b) for a, b in zip(found[0], survivors(plain)))
    with safe_open(scores.SHIPPED, "pt") as file:
        made = file.metadata()
    assert made["features"] == "; ".join(scores.FEATURES)
    assert made["made by"].startswith("python -m fade_fast.train_policy --text ")
    assert {"model", "text", "examples", "target", "versions"} < made.keys() and "/" not in made["text"]


def test_a_loaded_cache_brings_its_weights(tmp_path):
    """A saved cache goes on with the weights it was filled by, and leaves the tensors of others alone."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(80)
    cache = fade_fast.create_cache(model, LEARNED, policy_weights=policy_weights())
    generate(model, cache, inputs)
    cache.save(tmp_path / "cache.safetensors")
    theirs = policy_weights(1)
    loaded = fade_fast.load_cache(tmp_path / "cache.safetensors", model, policy_weights=theirs)
    for name, x in policy_weights().items():
        assert torch.equal(loaded.tiered[0].observer.weights[name], x.double())
    assert all(torch.equal(x, theirs[name]) for name, x in policy_weights(1).items())


def test_refusals():
    model, weights = tiny_llama(), policy_weights()
    with pytest.raises(ValueError, match="others take none"):
        fade_fast.create_cache(model, "balanced", policy_weights=weights)
    wrong = weights | {"net.0.bias": torch.zeros(31)}
    for bad in (wrong, {k: v for k, v in weights.items() if k != "net.2.bias"}):
        with pytest.raises(ValueError, match="policy_weights have names and shapes"):
            fade_fast.create_cache(model, LEARNED, policy_weights=bad)
