"""Copies of records as words of eight bytes: the same bytes, whatever the layout."""

import random

import pytest
import torch

from fade_fast.cache.buffers import Buffers, as_words, concatenated, take
from fade_fast.formats.base import Field

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool)


def made(rng, dtype, shape) -> torch.Tensor:
    """A random tensor that may be a part of a larger one, may begin anywhere, or be transposed."""
    wholly = rng.random() < 0.5
    spare = [0 if wholly else rng.choice((0, 0, 1, 4, 8)) for _ in shape]
    whole = torch.randint(0, 2 if dtype is torch.bool else 100, [n + s for n, s in zip(shape, spare)])
    part = whole.to(dtype)
    for axis, (n, s) in enumerate(zip(shape, spare)):
        part = part.narrow(axis, rng.randint(0, s), n)
    if rng.random() < 0.2:
        part = part.mT.contiguous().mT
    return part


@pytest.mark.parametrize("seed", range(30))
def test_words_are_the_same_bytes(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, viewed = rng.choice(DTYPES), 0
    for _ in range(20):
        shape = [rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 5, 8, 16)), rng.choice((1, 6, 8, 64))]
        axis, parts = rng.randrange(4), []
        for _ in range(rng.randint(1, 3)):
            size = list(shape)
            size[axis] = rng.choice((4, 8, 16)) if axis == 3 else rng.randint(1, 8)
            parts.append(made(rng, dtype, size))
        viewed += all(as_words(x).dtype == torch.int64 for x in parts)
        joined = concatenated(parts, axis)
        assert joined.dtype == dtype and torch.equal(joined, torch.cat(parts, axis))
        x, slots = parts[0], rng.choice((2, -1))
        index = torch.randint(x.shape[slots], (x.shape[0], 1, 5))
        wanted = torch.stack([row.index_select(1 if slots == 2 else 2, at[0]) for row, at in zip(x, index)])
        assert torch.equal(take(x, index, slots), wanted)
    assert viewed


def test_records_are_filled_up_with_zeros():
    """As many slots as there are, so that whole buffers can be copied; those in use are counted."""
    fields = {"a": Field((6,), torch.uint8, 2), "b": Field((6,), torch.uint8, 2, axis=-1)}
    fields["c"] = Field((), torch.float16, 2)
    buffers = Buffers(fields, 1, 3, "cpu")
    buffers.reserve(9)
    for x in buffers.tensors.values():
        x.fill_(77)
    records = {
        name: torch.randint(1, 9, field.shape_of(3, 4)).to(field.dtype) for name, field in fields.items()
    }
    for held, x in buffers.rewritten(4, buffers.filled_up(records)):
        held.copy_(x)
    assert buffers.count == 4
    for name, x in records.items():
        axis = fields[name].axis
        assert torch.equal(buffers[name], x)
        assert not buffers.tensors[name].narrow(axis, 4, 5).any()
