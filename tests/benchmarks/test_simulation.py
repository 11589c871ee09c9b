"""The cache and the one-forward simulation of its format, which share no code, give the same numbers."""

import pytest
import torch

from benchmarks import quality, simulation
from benchmarks.methods import method
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import prompt, tiny_llama


@pytest.mark.parametrize("name", slow_but(["int8", "int4", "int3", "k4v2", "int2"], "int4"))
def test_the_cache_reads_what_the_simulation_reads(name):
    model, ids, chunk = tiny_llama(dtype=torch.float64), prompt(320)["input_ids"], 32
    cache = method(name)(model, 320)
    streamed = torch.cat(list(quality.stream(model, cache, ids, chunk)), dim=1)
    assert cache.memory().tokens["FP16"] < 320 - 128
    with torch.no_grad(), simulation.simulating(model, cache.fade_config, "blocks", chunk):
        at_once = model(input_ids=ids).logits
    with torch.no_grad():
        exact = model(input_ids=ids).logits
    # The cache's rotation is float32, and a code near a boundary may fall to its other side.
    difference, effect = (streamed - at_once).norm() / exact.norm(), (streamed - exact).norm() / exact.norm()
    assert difference < 0.03 * effect


def test_masks():
    config = FadeConfig(n_sink=2, recent_window=4, block_size=4)
    last = simulation.compressed(12, config, "last", 3)
    assert last.sum(-1).tolist() == [0] * 6 + [1, 2, 3, 4, 5, 6]
    assert not last[:, :2].any()
    blocks = simulation.compressed(24, config, "blocks", 8)  # at 16: 10 tokens beyond sinks and recent ones
    assert blocks.sum(-1).tolist() == [0] * 16 + [8] * 8
    assert blocks[20].nonzero().flatten().tolist() == list(range(2, 10))


def test_results_and_restoration():
    model, ids = tiny_llama(), prompt(200, batch=2)["input_ids"]
    before = model.config._attn_implementation
    found = {(r["format"], r["mask"]): r for r in simulation.run(model, ["int8", "int2"], ids, 32)}
    assert model.config._attn_implementation == before
    for mask in simulation.MASKS:
        assert 0 < found["int8", mask]["kl"] < found["int2", mask]["kl"]
    assert found["int2", "blocks"]["kl"] < found["int2", "last"]["kl"]  # fewer tokens are quantised
    assert "| int2 | last |" in simulation.table(list(found.values()))
