"""Products of one row, as sums, and of a few, which Inductor generates."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor.kernel import bmm, mm
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fade_fast.compile import compiled as compiling
from fade_fast.compile import inductor, small_matmul

from ..marks import slow_but


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


@pytest.mark.parametrize("batch, left", slow_but([(1, 1), (2, 4), (8, 4), (16, 4), (17, 4)], (1, 1), (17, 4)))
def test_products_of_one_row_become_sums(batch, left):
    torch.manual_seed(0)
    block, x = Block().double(), torch.randn(batch, 1, 256, dtype=torch.float64)
    with torch.no_grad():
        traced = make_fx(block, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        assert products(traced.graph) == 4
        small_matmul.RowProducts()(traced.graph)
        traced.graph.lint()
        traced.recompile()
        assert products(traced.graph) == left
        for ours, theirs in zip(traced(x), block(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    made = [n for n in traced.graph.nodes if n.target is torch.ops.aten.as_strided.default]
    assert len(made) == (2 if batch == 1 else 0)  # a row that two products share is written once


@pytest.mark.slow
@pytest.mark.parametrize("batch", slow_but([1, 2, 8], 2))
def test_a_model_compiles_with_its_products_of_rows(batch):
    """By Inductor's C++ backend; the pass is in the key of graphs kept on disk."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x, seen = Block(), torch.randn(batch, 1, 256), []

    class Seen(small_matmul.RowProducts):
        def __call__(self, graph):
            before = products(graph)
            super().__call__(graph)
            seen.append((before, products(graph)))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(inductor, "RowProducts", Seen)
        with torch._inductor.config.patch(force_disable_caches=True), inductor.row_products():
            found = torch.compile(block, fullgraph=True)(x)
        for ours, theirs in zip(found, block(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    ((before, after),) = seen
    assert after == (min(before, 1) if batch == 1 else before)  # Inductor has decomposed some for the CPU
    assert torch._inductor.config.post_grad_custom_pre_pass is None


def test_a_pass_of_the_user_stays():
    class Own(small_matmul.RowProducts):
        pass

    own = Own()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=own), inductor.row_products():
        assert torch._inductor.config.post_grad_custom_pre_pass is own


@pytest.mark.parametrize("summands", [256, 576, 2048, 4096, 14336])
def test_tiles_hold_sixteen_numbers_a_thread(summands):
    tile = small_matmul.tile(summands)
    assert tile["R0_BLOCK"] >= min(summands, 2048) and tile["R0_BLOCK"] == 2 ** (
        tile["R0_BLOCK"].bit_length() - 1
    )
    assert tile["R0_BLOCK"] <= 16 * 32 * tile["num_warps"]


def product(small_matmul, matrix, bias=False, device="cuda", dtype=torch.bfloat16, linear=True):
    """A product as Inductor meets it, [rows, K] with a [K, N] that a linear layer holds as [N, K]."""
    graph, aten = Graph(), torch.ops.aten
    with FakeTensorMode():
        empty = lambda *shape: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
        weights = empty(*matrix[::-1]).T if linear else empty(*matrix)
        values = [*([empty(matrix[1])] if bias else []), empty(small_matmul, matrix[0]), weights]
    nodes = [graph.placeholder(f"x{i}") for i in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    return graph.call_function(aten.addmm.default if bias else aten.mm.default, tuple(nodes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_2_to_8_rows_are_generated(dtype, bias):
    for n in (1, 2, 4, 8, 9, 16, 64):
        assert small_matmul.of_few_rows(product(n, (512, 256), bias, dtype=dtype), n) == (2 <= n <= 8)


@pytest.mark.parametrize(
    "matrix, options",
    [
        ((512, 256), dict(dtype=torch.float32)),
        ((512, 256), dict(dtype=torch.float64)),
        ((512, 256), dict(device="cpu")),
        ((512, 256), dict(linear=False)),  # results last
        ((512, 128), {}),
        ((128, 512), {}),
        ((512, 50257), {}),
        ((1000, 512), {}),
    ],
)
def test_other_products_of_few_rows_stay(matrix, options):
    assert not small_matmul.of_few_rows(product(8, matrix, **options), 8)


def test_other_operations_stay():
    node = product(8, (512, 256))
    node.target = torch.ops.aten.bmm.default
    assert not small_matmul.of_few_rows(node, 8)


def test_kernels_compiled_within_a_step_keep_their_own_choice():
    theirs, asked = mm.use_native_matmul, []
    before = torch._inductor.config.triton.native_matmul
    with inductor.row_products():
        assert torch._inductor.config.triton.native_matmul
        assert mm.use_native_matmul is bmm.use_native_matmul and mm.use_native_matmul is not theirs
        with inductor.pinned_tiles({}):
            assert V.choices is not inductor._row_choices()
            assert inductor._generates(lambda *x: asked.append(x) or True, 1, 2)
        assert asked == [(1, 2)]
    assert mm.use_native_matmul is theirs and bmm.use_native_matmul is theirs
    assert torch._inductor.config.triton.native_matmul == before


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, compiling.TOGETHER, compiling.OPTIONS], ids=["none", "few", "all"])
def test_kernels_compiled_within_a_step_keep_their_own_options(options, monkeypatch):
    torch._dynamo.reset()
    config, asked = torch._inductor.config, []

    def asks(*operands):
        asked.append((config.triton.native_matmul, config.post_grad_custom_pre_pass))
        return False

    monkeypatch.setattr(bmm, "use_native_matmul", asks)
    monkeypatch.setattr(mm, "use_native_matmul", asks)
    twin = compiling.Compiled(lambda dynamic_sizes, a, b: a @ b, options)
    a, b = torch.randn(2, 300, 300), torch.randn(2, 300, 300)
    with inductor.row_products(), config.patch(force_disable_caches=True):
        assert config.triton.native_matmul and config.post_grad_custom_pre_pass
        torch.testing.assert_close(twin([], dict, a, b), a @ b)
    assert asked == [(options.get("triton.native_matmul", False), None)]


def test_choices_are_restored_after_an_error():
    theirs = mm.use_native_matmul
    with pytest.raises(InterruptedError), inductor.row_products():
        raise InterruptedError
    assert mm.use_native_matmul is theirs and bmm.use_native_matmul is theirs


@pytest.mark.parametrize(
    "results, summands",
    [
        (256, 256),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (4096, 14336),
        (128256, 4096),
        (576, 1536),
        (320, 320),
    ],
)
def test_tiles_of_few_rows_need_no_masks(results, summands):
    tile = small_matmul.few_tile(results, summands)
    assert results % tile["XBLOCK"] == 0 == summands % tile["R0_BLOCK"]
    assert tile["YBLOCK"] >= small_matmul.MOST and tile["R0_BLOCK"] >= 16
    held = (
        (2 * tile["XBLOCK"] + tile["YBLOCK"]) * tile["R0_BLOCK"] * 2 * tile["num_stages"]
    )  # of two products
    assert held <= 227 << 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [2, 5, 8, 9])
def test_generated_products_are_as_exact_as_those_of_a_library(batch, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x = Block().cuda().bfloat16(), torch.randn(batch, 1, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        eager, exact = block(x), copy.deepcopy(block).float()(x.float())
        with inductor.row_products():
            graph = torch.compile(block, fullgraph=True)
            if dynamic:  # as the tokens of drafts are; compiled for half as many
                first = x[: max(2, batch // 2)].clone()
                torch._dynamo.mark_dynamic(first, 0)
                graph(first)
            found = graph(x)
    for ours, theirs, true in zip(found, eager, exact, strict=True):
        error = (ours.float() - true).norm()
        assert error <= 1.1 * (theirs.float() - true).norm() + 1e-3 * true.norm()
