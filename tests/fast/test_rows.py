"""Products of one row, as sums."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fade_fast.kernels import compile as compiling
from fade_fast.kernels import rows


class Block(nn.Module):
    """Products that share a row, one with a bias, one of what others gave, and one too small."""

    def __init__(self, width=256):
        super().__init__()
        self.q, self.k = nn.Linear(width, 512), nn.Linear(width, 256, bias=False)
        self.small, self.down = nn.Linear(width, 8, bias=False), nn.Linear(512, width, bias=False)

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
        return self.down(torch.nn.functional.silu(self.q(x))) + x, self.k(x), self.small(x)


def products(graph):
    aten = torch.ops.aten
    return sum(node.target in (aten.mm.default, aten.addmm.default) for node in graph.nodes)


@pytest.mark.parametrize("batch, left", [(1, 1), (2, 4)])
def test_products_of_one_row_become_sums(batch, left):
    torch.manual_seed(0)
    block, x = Block().double(), torch.randn(batch, 1, 256, dtype=torch.float64)
    with torch.no_grad():
        traced = make_fx(block, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        assert products(traced.graph) == 4
        rows.RowProducts()(traced.graph)
        traced.graph.lint()
        traced.recompile()
        assert products(traced.graph) == left
        for ours, theirs in zip(traced(x), block(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    made = [n for n in traced.graph.nodes if n.target is torch.ops.aten.as_strided.default]
    assert len(made) == (2 if batch == 1 else 0)  # a row that two products share is written once


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_compiles_with_its_products_of_rows(batch):
    """By Inductor's C++ backend; the pass is in the key of graphs kept on disk."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x, seen = Block(), torch.randn(batch, 1, 256), []

    class Seen(rows.RowProducts):
        def __call__(self, graph):
            before = products(graph)
            super().__call__(graph)
            seen.append((before, products(graph)))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(compiling, "RowProducts", Seen)
        with torch._inductor.config.patch(force_disable_caches=True), compiling.row_products():
            found = torch.compile(block, fullgraph=True)(x)
        for ours, theirs in zip(found, block(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    ((before, after),) = seen
    assert after == (before if batch == 2 else min(before, 1))  # Inductor has decomposed some for the CPU
    assert torch._inductor.config.post_grad_custom_pre_pass is None


def test_a_pass_of_the_user_stays():
    class Own(rows.RowProducts):
        pass

    own = Own()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=own), compiling.row_products():
        assert torch._inductor.config.post_grad_custom_pre_pass is own


@pytest.mark.parametrize("summands", [256, 576, 2048, 4096, 14336])
def test_tiles_hold_sixteen_numbers_a_thread(summands):
    tile = rows.tile(summands)
    assert tile["R0_BLOCK"] >= min(summands, 2048) and tile["R0_BLOCK"] == 2 ** (
        tile["R0_BLOCK"].bit_length() - 1
    )
    assert tile["R0_BLOCK"] <= 16 * 32 * tile["num_warps"]
