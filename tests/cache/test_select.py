"""A cache that keeps every token and reads the pages that a query chooses."""

import pytest
import torch

from fade_ref.config import FadeConfig

from ..models import new_cache, prompt, teacher_forced, tiny_llama

SMALL = dict(recent_window=8, block_size=8)
SELECT = FadeConfig(**SMALL, select=16)
PLAIN = FadeConfig(**SMALL)


def read_share(cache) -> float:
    """Tokens of the middle that a query and KV head read, as a share of those that are there now."""
    queries = read = held = 0
    for layer in cache.tiered:
        counted = layer.middle.counted.tolist()
        queries, read, held = queries + counted[0], read + counted[1], held + layer.middle.count
    return read / queries / (held / len(cache.tiered)) if queries else 1.0


@pytest.mark.parametrize("codec", ["rotated", "matched"])
def test_below_the_budget_nothing_changes(codec):
    """To the bit: the same codes, read in the same order."""
    model, inputs = tiny_llama(), prompt(60, batch=2, pads=(0, 9))
    chunks = [40, 1, 1, 5, 1, 12]
    ours = new_cache(model, FadeConfig(**SMALL, select=256, quant_backend=codec))
    theirs = new_cache(model, FadeConfig(**SMALL, quant_backend=codec))
    found, expected = (teacher_forced(model, cache, inputs, chunks) for cache in (ours, theirs))
    assert torch.equal(found, expected)
    for a, b in zip(ours.tiered, theirs.tiered):
        assert a.middle.count == b.middle.count > 0
        assert all(torch.equal(x, y) for x, y in zip(a.decode_all(), b.decode_all()))


def test_above_the_budget_fewer_tokens_are_read():
    model, inputs = tiny_llama(), prompt(90, batch=2, pads=(0, 9))
    chunks = [80] + [1] * 10
    cache = new_cache(model, SELECT)
    found = teacher_forced(model, cache, inputs, chunks)
    expected = teacher_forced(model, new_cache(model, PLAIN), inputs, chunks)
    assert found.isfinite().all()
    assert torch.equal(found[:, :80], expected[:, :80])  # a prompt reads everything
    assert not torch.allclose(found[:, 80:], expected[:, 80:], atol=1e-3)
    assert read_share(cache) < 0.3
