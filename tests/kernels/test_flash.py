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


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("causal, back", [(False, None), (True, None), (True, 0), (True, 7)])
@pytest.mark.parametrize(
    "device, dtype",
    [
        ("cpu", torch.float64),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.float16, marks=GPU),
        pytest.param("cuda", torch.bfloat16, marks=GPU),
    ],
)
def test_requests_of_any_lengths(device, dtype, causal, back):
    """Each request over its own keys; keys behind those used are NaN, and some queries see nothing."""
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    counts, rooms, used = [5, 140, 3, 17], [16, 256, 16, 32], [5, 249, 0, 9]
    query, held = make(sum(counts), 6, 16), make(2, 2, sum(rooms), 16)
    starts, firsts = ([sum(x[:i]) for i in range(len(x) + 1)] for x in (counts, rooms))
    for first, n, room in zip(firsts, used, rooms):
        held[:, :, first + n : first + room] = torch.nan
    put = lambda x: torch.tensor(x, dtype=torch.int32, device=device)  # noqa: E731
    keys, values = held.to(device).transpose(1, 2)
    assert flash.takes_ragged(query.to(device))
    output, lse = flash.ragged(
        query.to(device), keys, values, put(starts), put(firsts), put(used), (140, 256), 0.3, causal, back
    )
    assert lse.shape == (6, sum(counts)) and output.dtype == dtype
    error = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for start, count, first, n in zip(starts, counts, firsts, used):
        rows = query[start : start + count].double().transpose(0, 1)
        k, v = (x[:, first : first + n].double().repeat_interleave(3, 0) for x in held)
        last = torch.arange(count)[:, None] + n - count
        at = torch.arange(n)
        seen = torch.ones(count, n, dtype=torch.bool) if not causal else at <= last
        if back is not None:
            seen &= at >= last - back
        scores = (0.3 * rows @ k.mT).masked_fill(~seen, -torch.inf)
        exact = torch.softmax(scores, -1).nan_to_num(0.0) @ v
        found, sums = output[start : start + count].cpu().double(), lse[:, start : start + count].cpu()
        torch.testing.assert_close(found, exact.transpose(0, 1), rtol=0, atol=error)
        blind = ~seen.any(-1)
        assert (sums[:, blind] == torch.inf).all() and not found[blind].any()
        wanted = torch.logsumexp(scores, -1)[:, ~blind].to(sums.dtype)
        torch.testing.assert_close(sums[:, ~blind], wanted, rtol=0, atol=error)
