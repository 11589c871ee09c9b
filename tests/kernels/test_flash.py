"""Attention of many queries by kernels of PyTorch."""

import pytest
import torch

from fade_fast.kernels import flash
from fade_fast.kernels.merge import combine, merge, of_heads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_that_are_hidden(dtype, rows):
    """Tiles with masks of their own together give the attention over the keys that each query sees."""
    generator = torch.Generator().manual_seed(rows)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    query, keys, values = make(2, 6, 5, 16), make(2, 2, 21, 16), make(2, 2, 21, 16)
    seen = torch.rand(rows, 1, 5, 21, generator=generator) > 0.5
    seen[:, :, 1, :10], seen[:, :, 3] = False, False  # sees nothing of the first tile, and nothing at all
    parts = [(0, 10), (10, 21)]
    found = [
        flash.attend(query, keys[:, :, a:b], values[:, :, a:b], 0.3, seen=seen[..., a:b]) for a, b in parts
    ]
    output = of_heads(merge([combine(*found)]), query.shape)
    wide = [x.double().repeat_interleave(3, dim=1) for x in (keys, values)]
    scores = (0.3 * query.double() @ wide[0].mT).masked_fill(~seen, -torch.inf)
    exact = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ wide[1]
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output.double(), exact.transpose(1, 2), rtol=0, atol=error)
    assert not output[:, 3].any()
