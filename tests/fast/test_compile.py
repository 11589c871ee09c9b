"""What compiled twins are compiled for, and when not again."""

import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fade_fast.kernels import compile as compiling

TRACE = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)


@pytest.fixture
def twin(monkeypatch):
    """A twin of `x * 2 + marker's length`, traced as on CUDA, without code generation."""
    monkeypatch.setattr(compiling.torch, "compile", lambda f, fullgraph, options: TRACE(f))
    torch._dynamo.reset()
    counters.clear()
    return compiling.Compiled(lambda markers, x, *, factor: x * factor + len(markers[0]))


def marker(n: int) -> Tensor:
    x = torch.empty(1).expand(n)
    torch._dynamo.mark_dynamic(x, 0)
    return x


def graphs() -> int:
    return counters["stats"].get("unique_graphs", 0)


def test_one_graph_a_shape_and_constant(twin):
    for n in (5, 6, 9):
        assert twin([marker(n)], dict, torch.ones(3), factor=2).eq(2 + n).all()
    assert graphs() == 1
    for x, factor in ((torch.ones(4), 2), (torch.ones(3), 3), (torch.ones(3, dtype=torch.float64), 2)):
        assert twin([marker(5)], dict, x, factor=factor).eq(factor + 5).all()
    assert graphs() == 4
    assert twin([marker(7)], dict, torch.ones(6)[::2], factor=2).eq(9).all()
    assert graphs() == 5


def test_no_second_graph_inside_another_compiled_one(twin):
    """The first call of the outer graph dispatches otherwise than later ones: the inner must not see it."""

    @torch.library.custom_op("fade_test::inner", mutates_args=())
    def inner(x: Tensor) -> Tensor:
        return twin([marker(5)], dict, x + torch.zeros_like(x), factor=2)

    inner.register_fake(torch.empty_like)
    outer = TRACE(lambda x: inner(inner(x)) - 1)
    with torch.no_grad():
        for _ in range(3):
            assert outer(torch.ones(3)).eq(18).all()
        twin([marker(5)], dict, torch.ones(3), factor=2)
    assert graphs() == 2
