"""Bytes from a configuration alone equal those that real caches hold."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, ViTConfig

import fade_fast
from fade_fast.cache import positions
from fade_fast.cli import planning
from fade_fast.hf import capacity
from fade_fast.hf.foreign import ForeignLayer
from fade_fast.hf.models import CACHE_NAME
from fade_fast.saved.memory import storage_bytes
from fade_ref.config import PRESETS, FadeConfig

from ..conformance.families import FAMILIES
from ..models import prompt, tiny_llama

CONFIGS = {name: FadeConfig.preset(name) for name in PRESETS} | {
    "two tiers": FadeConfig(int4_budget=64, int2_budget=64),
    "h2o": FadeConfig(int4_budget=64, int2_budget=64, eviction_policy="h2o"),
    "by head": FadeConfig(int4_budget=64, eviction_policy="h2o", plan_scope="head"),
    "snapkv": FadeConfig(int4_budget=64, eviction_policy="snapkv", positions="original"),
    "learned": FadeConfig(int4_budget=64, eviction_policy="learned"),
    "matched": FadeConfig(quant_backend="matched"),
    "matched, evicting": FadeConfig(quant_backend="matched", int4_budget=64),
    "values as they are": FadeConfig(middle_v_bits=16),
    "by layer": FadeConfig(layer_bits={0: (16, 16), 1: (8, 2)}),
    "all resident": FadeConfig(select=64),
    "one bit": FadeConfig(select=64, index="k1"),
    "bounds, a policy": FadeConfig(select=64, index="bounds", cold="host", eviction_policy="h2o"),
    "two indexes": FadeConfig(select=64, index="deviation+k2", cold="host"),
    "nothing compressed": FadeConfig(recent_window=None),
}


def held(model, config, length, batch=1):
    """What a real cache says of `length` tokens in each row."""
    cache = fade_fast.create_cache(model, config, max_length=length)
    with torch.no_grad():
        model(**prompt(length, batch=batch), **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    return cache.memory()


@pytest.fixture(scope="module")
def llama():
    model = tiny_llama()
    return model, capacity.architecture(model.config, torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_a_cache(name, llama):
    model, architecture = llama
    config = replace(CONFIGS[name], loss_bound=None)
    for length, batch in ((30, 1), (467, 1), (467, 2)):
        memory = held(model, config, length, batch)
        found = capacity.size(architecture, CONFIGS[name], length, batch, on_gpu=False)
        assert (found.device, found.host) == (memory.allocated, memory.host)
        assert capacity.uncompressed(architecture, length, batch) == memory.dense
    if config.compresses:
        assert memory.allocated + memory.host < memory.dense or config.quant_backend == "matched"
    assert bool(memory.host) == (config.cold == "host")


@pytest.mark.parametrize("name", ["safe", "balanced", "recall"])
@pytest.mark.slow
def test_bytes_as_a_gpu_lays_them_out(name, llama, uncompiled_kernels, monkeypatch):
    """Buffers on a GPU have slots to spare, and the table of positions is doubled."""
    model, architecture = llama
    config = replace(FadeConfig.preset(name), loss_bound=None)
    real = positions.TokenPositions.reserve
    monkeypatch.setattr(positions.TokenPositions, "reserve", lambda self, n: real(self, 2 * n))
    memory = held(model, config, 1200)
    found = capacity.size(architecture, config, 1200)
    spare = memory.allocated - found.device
    rows = -(-(2400 + 2400 // 64) // 256) * 256 - -(-2400 // 256) * 256  # the CPU's own spare positions
    assert spare == rows * 4 and found.host == memory.host
    assert found != capacity.size(architecture, config, 1200, on_gpu=False)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2",
        "Mixtral",
        "Gemma 3",
        "gpt-oss",
        "Ministral, alternating windows",
        "Phi-3, partial RoPE",
        "Gemma 4",
        "Qwen3.5",
        "Falcon",
    ],
)
def test_families(name):
    """Keys of other shapes, windows that keep their own tokens, attention that cannot be replaced."""
    family = FAMILIES[name]
    model = family.model().float()
    architecture = capacity.architecture(model.config, torch.float32)
    assert tuple(i for i, x in enumerate(architecture.layers) if x.tiered) == family.tiered
    assert architecture.dispatches == family.dispatches
    assert architecture.weights == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    codec = "matched" if family.dispatches else "rotated"  # the calibration needs the attention
    config = FadeConfig(quant_backend=codec, recent_window=16, block_size=8)
    ids = torch.randint(1, 100, (1, 150))
    sizes = []
    for cache in (DynamicCache(config=model.config), fade_fast.create_cache(model, config, max_length=150)):
        with torch.no_grad():
            for part in (ids[:, :149], ids[:, 149:]):  # a window lets go of its prompt at the next step
                model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True)
        if isinstance(cache, DynamicCache):
            tensors = [x for layer in cache.layers for x in ForeignLayer(layer).tensors()]
            sizes.append(storage_bytes(tensors))
            fade_fast.detach(model)
        else:
            sizes.append(cache.memory().allocated)
    assert sizes[0] == capacity.uncompressed(architecture, 150)
    assert sizes[1] == capacity.size(architecture, config, 150, on_gpu=False).device
    refused = architecture.refusal(FadeConfig.balanced())
    assert bool(refused) == (not family.dispatches)


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match="builds no decoder from this configuration"):
        capacity.architecture(ViTConfig())


def test_what_fits(llama):
    """The largest length and number of rows fit, and one more does not."""
    _, model = llama
    config, room = FadeConfig.int4(), 3_000_000
    size = lambda n, rows=1: capacity.size(model, config, n, rows).device  # noqa: E731
    most = capacity.most_tokens(size, room)
    assert most % 64 == 0 and size(most) <= room < size(most + 64)
    rows = capacity.most_rows(lambda n: size(500, n), room)
    assert rows > 1 and size(500, rows) <= room < size(500, rows + 1)
    assert capacity.most_tokens(size, 0) == capacity.most_rows(size, 0) == 0
    told = planning.row(model, "int4", config, 500, room)
    assert (told["tokens"], told["sequences"], told["bytes"]) == (most, rows, size(500))
    assert planning.row(model, "dynamic", None, 500, room)["per_token"] == 2 * 2 * 2 * 64 * 4


def test_a_plan_larger_than_keeping_everything_is_told(llama):
    _, model = llama
    configs = {"snapkv": FadeConfig(int4_budget=2048, eviction_policy="snapkv"), "safe": FadeConfig.safe()}
    rows = [planning.row(model, name, c, 3000, 10**8) for name, c in {"un": None, **configs}.items()]
    said = planning.notes(model, rows, configs, 3000, 10**8)
    assert sum("yet holds more bytes" in line for line in said) == 1 and "`snapkv`" in "".join(said)
    rows = [planning.row(model, name, c, 100_000, 10**8) for name, c in {"un": None, **configs}.items()]
    assert not any("yet holds" in line for line in planning.notes(model, rows, configs, 100_000, 10**8))
