"""What caches weigh: `python -m benchmarks.memory`."""

import torch

import fade_fast
from fade_fast.cache import TieredKVCache
from fade_fast.layer import TieredLayer

from .methods import Method, allocated, key_shape


@torch.no_grad()
def fill(model, cache, length: int, dtype=torch.bfloat16, step: int | None = None) -> None:
    """Let a cache take in `length` random tokens of one row, as a model of `dtype` would hand them over.

    No model is run: what a cache weighs depends on shapes alone. `step`: tokens at a time; None: all.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    for start in range(0, length, step or length):
        new = min(start + (step or length), length) - start
        for i, layer in enumerate(cache.layers):
            shape = (1, *key_shape(model, i)[:1], new, key_shape(model, i)[1])
            keys = torch.randn(shape, generator=generator, device=model.device, dtype=dtype)
            if isinstance(layer, TieredLayer):  # as its attention function does
                layer.settle()
                layer.timeline.extend(start, None, 1, new, keys.device)
                layer.store(keys, keys, attended=True)
            else:
                layer.update(keys, keys)


def filled_bytes(model, m: Method, length: int) -> int:
    """Bytes of every storage of a cache that holds `length` bfloat16 tokens of one row."""
    cache = m(model, length)
    try:
        fill(model, cache, length)
        if isinstance(cache, TieredKVCache):
            for layer in cache.tiered:
                layer.settle()
        return allocated(cache)
    finally:
        fade_fast.detach(model)
